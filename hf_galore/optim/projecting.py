"""How gradients of a target are projected: its present bases, and the norm probes beside them.

Norm probes (`hf_galore.lowrank.probes`) are no state: they follow from the bases and from how often these were
refreshed, and are made when they are first needed.
"""

from __future__ import annotations

import dataclasses
import math
import weakref

import torch
from torch import Tensor

from ..backward.stand_in import BasisVersion, LowRankTensor
from ..config import NORM_PROBES
from ..lowrank.matrices import as_matrices
from ..lowrank.probes import held_shape, probe_shapes, probes_for, without_probes
from ..lowrank.products import Gradient
from ..lowrank.projection import Bases, Side, low_rank_shape, project, with_columns
from ..lowrank.seeds import held_seed, probe_seed
from .bases import BasisLayout, NewBasis, State, numbers_of
from .groups import Group
from .turns import Turns


class Projecting(Turns):
    """The bases of a target as gradients are projected with them; `hf_galore.optim.target` has the rest of it."""

    side: Side
    matrix_shape: tuple[int, ...]
    """m × n, or k × m × n: what the parameter is viewed as."""
    layout: BasisLayout
    """How the bases lie in the state."""
    probes: int
    """How many norm probes there are beside a basis, at most."""
    _version: BasisVersion | None = None

    @property
    def low_rank_shape(self) -> tuple[int, ...]:
        """The shape of R."""
        return low_rank_shape(self.matrix_shape, self.side, self.rank)

    @property
    def held_shape(self) -> tuple[int, ...]:
        """The shape of what is held of a gradient: that of R, with norm probes."""
        return held_shape(self.low_rank_shape, probe_shapes(self._shapes, self.probes))

    def _as_matrices(self, gradient: Gradient) -> Gradient:
        if isinstance(gradient, Tensor) and gradient.shape == self.param.shape:
            return as_matrices(gradient, self.matrix_shape)
        return gradient  # of some matrices of a stack

    def bases(self) -> Bases:
        """The present bases, in the weight's dtype; zeros before the first refresh."""
        return self.layout.read(self.with_placed_bases(), self.param.dtype)

    def bases_here(self) -> Bases:
        """The present bases as gradients are projected with them here."""
        return self.layout.read_here(self.with_placed_bases(), self.param.dtype)

    def with_placed_bases(self) -> State:
        """The state, with its bases where the weight is: with 16 bits they have its dtype."""
        state = self.state
        self._place(state, self.basis_keys, self.param.dtype if self.layout.bits == 16 else None)
        return state

    def projected_by(self, gradient: Gradient, bases: Bases) -> Tensor:
        """The low-rank gradient of G, with what `bases_here` gave."""
        return project(self._as_matrices(gradient), bases)

    # ---- versions of the bases

    @property
    def version(self) -> BasisVersion:
        """What low-rank gradients in the present basis have in common."""
        if self._version is None:
            self._version = self.new_version()
        return self._version

    def new_version(self) -> BasisVersion:
        """What low-rank gradients in a basis that is to come will have in common."""
        me, name = weakref.ref(self), self.name

        def low_rank(gradient: Tensor) -> Tensor:
            target = me()
            if target is None or target.is_orphan:
                raise RuntimeError(f"The optimizer of the low-rank gradient in {name}.grad is gone: set it to None.")
            return target.projected_by(gradient, target.with_probes_here(target.bases_here()))

        return BasisVersion(name, low_rank)

    def forget_version(self) -> None:
        """Let low-rank gradients of before be in another basis than those to come: a checkpoint was loaded."""
        self._version = None

    # ---- norm probes

    def with_probes(self, bases: Bases) -> Bases:
        """What `bases` gave, with the norm probes beside it: what is projected with them may stand for a gradient."""
        return with_columns(bases, self._present_probes()) if self.probes else bases

    def with_probes_here(self, bases: Bases) -> Bases:
        """The same of what `bases_here` gave."""
        return self.with_probes(bases)

    def _present_probes(self) -> Bases:
        """The probes of the present bases, made anew where the weight has moved."""
        version, param = self.version, self.param
        made = version.probes
        if made is None or any(p is not None and (p.device, p.dtype) != (param.device, param.dtype) for p in made):
            number = max(numbers_of(self.state["refreshes"]))
            made = version.probes = probes_for(self.bases(), self.probes, probe_seed(self.index, number))
        return made

    def _held(self, made: NewBasis, gradient: Gradient) -> NewBasis:
        """A refresh from a gradient, with what norm probes give beside R.

        They are those that its bases will have once they are used.
        """
        counts = numbers_of(self.state["refreshes"])
        if made.usable:
            matrices = range(len(counts)) if made.of_stack is None else made.of_stack.matrices
            counts = [count + (index in matrices) for index, count in enumerate(counts)]
        bases = self.layout.read(made.kept, self.param.dtype)
        probes = probes_for(bases, self.probes, probe_seed(self.index, max(counts)))
        if self.side == "full":
            held = self.projected_by(gradient, with_columns(bases, probes))
        else:
            held = torch.cat([made.low_rank, self.projected_by(gradient, probes)], self._probed_dim(gradient))
        if made.is_zero:
            held.zero_()
        elif made.is_lost:
            held.fill_(math.nan)
        return dataclasses.replace(made, low_rank=held, probes=probes)

    def _probed_dim(self, gradient: Gradient) -> int:
        """The dimension in which norm probes are beside R, as `projected_by` gives that of a gradient."""
        return -2 if self.side == "left" else -1

    def hold(self, gradient: LowRankTensor) -> None:
        """Let a low-rank gradient take no more memory until `step()` than it has to."""
        if self.group.get("gradient_bits", 16) == 8:
            seed = held_seed(self.group.get("gradient_seed", 0), self.index, int(self.state["step"].item()))
            gradient.hold_in_8_bits(seed)

    def _of_held(self, held: Tensor) -> Tensor:
        """R of what is held of a gradient."""
        return without_probes(held, self.side, self.rank) if self.probes else held


def probes_asked(group: Group) -> int:
    """How many norm probes a group asks for; none where updates need the gradient itself, whose norm is known then."""
    needs_gradient = any(group.get(key, "none") != "none" for key in ("residual", "scaling"))
    return 0 if needs_gradient else int(group.get("norm_probes", NORM_PROBES))
