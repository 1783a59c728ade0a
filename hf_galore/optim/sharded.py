"""Parameters that FSDP2 shards: what their steps exchange with the other processes, and what of their state is whose.

Each process has some rows of a weight, and of its gradient once FSDP2 has reduced that. (Or columns: then everything
here holds for the transposes.) Of what a target needs,

=====================================  ========================================================
R where rows are its long side (GQ)    each process has its rows: nothing is exchanged but the
                                       rows of Q
R where columns are (PᵀG)              partial sums, n × r, are summed, and each process keeps
                                       some rows of Rᵀ; the direction's rows are gathered
PᵀGQ                                   likewise, r × r
a refresh                              products of G with narrow matrices, m × r and n × r
=====================================  ========================================================

so that nothing of m × n is ever sent. Moments are of the rows that a process has; where both sides are projected they
are r × r, and whole on each. Which side is projected follows from the whole shape, and what is decided by numbers
(whether an update is skipped, a basis usable, a gap doubled) from numbers that all processes have alike.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ..lowrank.nonfinite import Skip
from ..lowrank.products import FactoredGradient, Gradient, ShardedGradient, SummedGradient
from ..lowrank.projection import Bases, project, with_columns
from ..lowrank.ranks import Ranks
from ..lowrank.rotation import Rotation
from ..lowrank.seeds import mixed_seed
from ..rules import Rule
from ..rules.rule import Moment
from .bases import NewBasis, State
from .groups import Group
from .shard import Shard
from .sharded_state import ShardedBasisLayout, columns_of_scales, moments_of_rows, scales_of_rows
from .target import Target
from .trained import FullRank, Owner, Place, Trained


class Sharded(Trained):
    """What sharded parameters have in common."""

    _shard: Shard
    _rows: int
    """Of the moments, on all processes together."""
    _whole_moments: dict[str, Moment]

    def __init__(self, owner: Owner, param: Tensor, place: Place, index: int, rule: Rule) -> None:
        self._shard = Shard(param)
        super().__init__(owner, param, place, index, rule)

    @property
    def weight(self) -> Tensor:
        """This process's part."""
        return self._shard.tensor

    @property
    def local(self) -> Shard:
        """What has the gradient of that part."""
        return self._shard

    @property
    def ranks(self) -> Ranks:
        """The processes."""
        return self._shard.ranks

    def _derive(self) -> None:
        super()._derive()  # by the whole shape
        self._whole_moments = self._moments
        shape, group = self._shape_of_gradient(), self.group
        self._rows = shape[0]
        if not self._keeps_moments_whole():
            self.rule = self.rule.over_rows(self.ranks, self._rows, transposed=self._is_transposed())
            own = (self.ranks.count(self._rows), *shape[1:])
            self._moments = self.rule.moments(own, self.param.dtype, group)

    def _keeps_moments_whole(self) -> bool:
        """Whether every process has all moments."""
        return False

    def _is_transposed(self) -> bool:
        """Whether rows here, which are divided, are columns of what one process would have."""
        raise NotImplementedError

    def _rounding_seed(self, group: Group) -> int:
        return mixed_seed(super()._rounding_seed(group), self.ranks.rank, 0)  # other rows, other numbers

    def step(self, gradient: Tensor, norm: Tensor | None = None) -> None:
        """One optimizer step from this process's part of the gradient.

        None from a gradient of zero at a learning rate of zero: `torch.distributed.checkpoint` makes state so.
        """
        if float(self.group["lr"]) == 0 and norm is not None and not norm.any():
            _ = self.state
            return
        super().step(gradient, norm)

    # ---- checkpoints

    def to_saved(self, state: State) -> State:
        """A state with DTensors in place of this process's rows."""
        saved = dict(state)
        for key in self.basis_keys:
            saved[key] = self._shard.as_dtensor(state[key], self._rows_of_basis(key))
        for key, moment in self._moments.items():
            if self._keeps_moments_whole() or not moment.by_rows:
                continue
            if f"{key}_absmax" in self._moments:
                columns = state[key].shape[1:].numel()
                codes = state[key].reshape(len(state[key]), columns)
                scales = scales_of_rows(state[f"{key}_absmax"], len(codes), columns)
                saved[key] = self._shard.as_dtensor(codes, self._rows)
                saved[f"{key}_row_scales"] = self._shard.as_dtensor(scales, self._rows)
                del saved[f"{key}_absmax"]
            elif not _is_scale(key):
                saved[key] = self._shard.as_dtensor(state[key], self._rows)
        return saved

    def of_saved(self, saved: State) -> State:
        """This process's rows of what a checkpoint has, from any number of processes."""
        state = dict(saved)
        for key in self.basis_keys:
            state[key] = self._shard.own_of(saved[key], self._rows_of_basis(key))
        for key, moment in self._moments.items():
            if self._keeps_moments_whole() or not moment.by_rows or _is_scale(key):
                continue
            state[key] = self._shard.own_of(saved[key], self._rows)
            if f"{key}_row_scales" in saved:
                scales = self._shard.own_of(state.pop(f"{key}_row_scales"), self._rows)
                codes, state[f"{key}_absmax"] = moments_of_rows(state[key], scales, key)
                state[key] = codes.view(moment.shape)
        return state

    def saved_shapes(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """What a checkpoint has to have of it, whole."""
        shapes = super().saved_shapes()
        for key in self.basis_keys:
            shape, dtype = shapes[key]
            shapes[key] = ((self._rows_of_basis(key), *shape[1:]), dtype)
        for key, moment in self._whole_moments.items():
            if self._keeps_moments_whole() or _is_scale(key):
                continue
            shapes[key] = (moment.shape, moment.dtype)
            if shapes.pop(f"{key}_absmax", None) is not None:
                columns = torch.Size(moment.shape[1:]).numel()
                shapes[key] = ((self._rows, columns), moment.dtype)
                shapes[f"{key}_row_scales"] = ((self._rows, columns_of_scales(columns)), torch.float32)
        return shapes

    def _rows_of_basis(self, key: str) -> int:
        raise NotImplementedError


def _is_scale(key: str) -> bool:
    return key.endswith("_absmax")


class ShardedFullRank(Sharded, FullRank):
    """A sharded parameter that trains as it would without GaLore: on its part, the divided dimension first."""

    @property
    def weight(self) -> Tensor:
        """This process's part, its rows first."""
        return self._shard.tensor.transpose(0, self._shard.dim)

    def _is_transposed(self) -> bool:
        return self._shard.dim == 1

    def _shape_of_gradient(self) -> tuple[int, ...]:
        shape = super()._shape_of_gradient()
        return shape[::-1] if self._is_transposed() else shape

    def _step(self, gradient: Tensor, norm: Tensor | None) -> None:
        super()._step(gradient.transpose(0, self._shard.dim), norm)


class ShardedTarget(Sharded, Target):
    """A sharded matrix that is projected."""

    layout: ShardedBasisLayout

    def _derive(self) -> None:
        super()._derive()
        self.layout = ShardedBasisLayout(self._shapes, self.group["proj_bits"], self.ranks, self._shard.dim)

    def _shape_of_gradient(self) -> tuple[int, ...]:
        """The shape of R, its long side first: that is divided."""
        shape = super()._shape_of_gradient()
        return shape[::-1] if self._is_transposed() else shape

    def _keeps_moments_whole(self) -> bool:
        return self.side == "full"

    def _is_transposed(self) -> bool:
        return self.side == "left"

    def _rows_of_basis(self, key: str) -> int:
        return self.layout.tables[key].rows

    @property
    def _is_local(self) -> bool:
        """Whether this process has its rows of R from its part of the gradient alone."""
        return (self.side, self._shard.dim) in (("right", 0), ("left", 1))

    # ---- the basis

    def with_probes_here(self, bases: Bases) -> Bases:
        """What `bases_here()` gave, with this process's part of the norm probes beside it."""
        return with_columns(bases, self.layout.here(self._present_probes())) if self.probes else bases

    def projected_by(self, gradient: Gradient, bases: Bases) -> Tensor:
        """This process's rows of R, its long side first.

        Args:
            gradient: this process's part of it, with the bases that `bases_here` gave; or what else there is of it on
                each process, with bases that are whole. Of a `SummedGradient` all have all of R, as it is.
            bases: as said.
        """
        if isinstance(gradient, SummedGradient):
            return self.ranks.sum(self._of_own(gradient.factors, bases))
        if isinstance(gradient, FactoredGradient):
            low_rank = self._of_own(gradient, bases)
            return self.ranks.sum_to_rows(low_rank.mT if self._is_transposed() else low_rank)
        if isinstance(gradient, ShardedGradient):
            gradient, bases = gradient.part, self.layout.here(bases)
        low_rank = project(gradient, bases)
        low_rank = low_rank.mT if self._is_transposed() else low_rank
        return low_rank.contiguous() if self._is_local else self.ranks.sum_to_rows(low_rank)

    def _of_own(self, factors: FactoredGradient, bases: Bases) -> Tensor:
        """What this process adds to R, which is a mean."""
        return project(factors, bases).to(self.param.dtype).div_(self.ranks.size)

    def new_basis(self, gradient: Gradient, *, held: bool = False) -> NewBasis:
        """Bases from a gradient of which this process has a part; R of it is as `projected_by` gives it."""
        if isinstance(gradient, Tensor):
            m, n = self.param.shape
            gradient = ShardedGradient(gradient, (m, n), self._shard.dim, self.ranks)
        elif isinstance(gradient, FactoredGradient):
            tokens = self.ranks.sum(torch.tensor(len(gradient.inputs), device=gradient.device))
            gradient = SummedGradient(gradient, int(tokens.item()), self.ranks)
        made = super().new_basis(gradient, held=held)
        if not isinstance(gradient, SummedGradient):
            return made
        low_rank = made.low_rank.mT if self._is_transposed() else made.low_rank
        return dataclasses.replace(made, low_rank=low_rank[self.ranks.own(len(low_rank))].contiguous())

    # ---- the update

    def _step(self, gradient: Tensor, norm: Tensor | None) -> None:
        if self.due():
            self.update(self.project(gradient, refresh=True))
        else:
            bases = self.bases_here()
            self.update(self.projected_by(gradient, bases), norm, bases=bases)

    def _probed_dim(self, gradient: Gradient) -> int:
        return super()._probed_dim(gradient) if isinstance(gradient, SummedGradient) else -1

    def _of_held(self, held: Tensor) -> Tensor:
        """This process's rows of R; where both sides are projected, and rows are divided otherwise with probes, all."""
        if held.shape[1] == self.rank:
            return held
        if self.side == "full":
            held = self.ranks.gather(held, self.held_shape[0])[: self.rank]
        return held[:, : self.rank].contiguous()

    def _direction(self, low_rank: Tensor, group: Group, step: int, skip: Skip) -> tuple[Tensor, float]:
        if self.side == "full" and len(low_rank) < self.rank:
            low_rank = self.ranks.gather(low_rank, self.rank)
        direction, factor = super()._direction(low_rank, group, step, skip)
        if self.side != "full" and not self._is_local:
            direction = self.ranks.gather(direction, self._rows)
        return direction.mT if self._is_transposed() else direction, factor

    def _matrices(self) -> tuple[Tensor, bool]:
        return self.weight, True

    def _of_moments(self, rotation: Rotation) -> Rotation:
        return Rotation(None, rotation.left) if self._is_transposed() else rotation
