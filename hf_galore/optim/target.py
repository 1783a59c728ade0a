"""One projected parameter: when its basis is renewed, how gradients become low-rank, how that updates the weight.

What computes a refresh is in `hf_galore.optim.refreshing`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..backward.gradient import BasisVersion
from ..lowrank.matrices import viewed
from ..lowrank.nonfinite import Skip
from ..lowrank.products import FactoredGradient, Gradient, GroupedGradient
from ..lowrank.projection import (
    Bases,
    add_projected_back_,
    basis_shapes,
    norm_of,
    projected_back,
    side_of,
)
from ..lowrank.refresh import cheaper_from_factors
from ..lowrank.rotation import Rotation, rotation_between
from ..lowrank.rounding import decay_unless, is_identity
from ..lowrank.scales import scale_of
from ..lowrank.seeds import basis_seed
from ..rules import Rule
from .bases import (
    BasisLayout,
    Before,
    NewBasis,
    State,
    before_refresh,
    count_refresh,
    new_counters,
    numbers_of,
    take_back,
)
from .groups import Group, shape_in
from .movement import Movement, WholeGradient
from .projecting import Projecting, probes_asked
from .refreshing import refresh_of_matrix, refresh_of_stack
from .report import Refresh, Stopwatch
from .skipped import uncount
from .stack import bases_of_matrices, by_age, of_matrices, put_of_matrices
from .trained import decay_of


class Target(Projecting):
    """A matrix W (m × n), or a stack of k, that is projected: its moments are those of R, its low-rank gradient.

    What hooks and steps do with it is: `due()`, `project(gradient)`, `update(R)`.
    """

    projected = True

    def _derive(self) -> None:
        group, shape = self.group, shape_in(self.param, self.group)
        self.rank: int = group["rank"]
        self.matrix_shape = shape
        self.stack = shape[0] if len(shape) == 3 else None
        """How many matrices a stack has; `None` for one matrix."""
        self.side = side_of(shape, group["proj_type"])
        self._shapes = basis_shapes(shape, self.side, self.rank)
        self.layout = BasisLayout(self._shapes, group["proj_bits"])
        self.probes = probes_asked(group)
        self.basis_keys = self.layout.keys
        super()._derive()

    def _rule_for(self, shape: tuple[int, ...], group: Group) -> Rule:
        rule = super()._rule_for(shape[-2:], group)
        return rule if self.stack is None else rule.of_stack(shape[-2:])

    def _shape_of_gradient(self) -> tuple[int, ...]:
        return self.low_rank_shape

    @property
    def is_stack_of_experts(self) -> bool:
        """Whether the parameter itself is a stack of k × m × n."""
        return self.matrix_shape == tuple(self.param.shape) and self.stack is not None

    def new_state(self, like: Tensor) -> State:
        """A state before the first refresh, on the device of `like`."""
        state = super().new_state(like)
        counters = new_counters(self.group["lazy_refresh"], self.stack)
        return {"step": state.pop("step"), **counters, **self.layout.empty(like), **state}

    # ---- the basis

    def takes_factors(self, factors: FactoredGradient | GroupedGradient) -> bool:
        """Whether a refresh takes fewer multiply-adds from δ and X than from G = δᵀX; of groups it builds G itself."""
        if isinstance(factors, GroupedGradient):
            return True
        tokens = factors.inputs.shape[-2]
        return cheaper_from_factors(self.matrix_shape, self.rank, self.side, self.group["refresh"], tokens)

    @torch.no_grad()
    def project(self, gradient: Gradient, *, refresh: bool = False) -> Tensor:
        """The low-rank gradient R, with new bases from this gradient where `refresh` says so.

        A gradient that is zero or not finite makes no basis: the refresh stays due. R is NaN of one that is not finite.
        """
        if not refresh:
            return self.projected_by(gradient, self.bases_here())
        made = self.new_basis(gradient)
        if made.usable:
            self._carry_moments(self.use_basis(made, self.new_version(), keep=False))
        return made.low_rank

    @torch.no_grad()
    def new_basis(self, gradient: Gradient, *, held: bool = False) -> NewBasis:
        """Bases from a gradient, and its low-rank gradient in them. Waits for the device once.

        Changes nothing but the count of updates, if only the device knew that some were skipped: the steps at which
        bases are refreshed are right.

        Args:
            gradient: G.
            held: whether the low-rank gradient may be held: with norm probes.
        """
        gradient = self._as_matrices(gradient)
        seed = basis_seed(self.group.get("basis_seed", 0), self.index, sum(numbers_of(self.state["refreshes"])))
        made = (refresh_of_matrix if self.stack is None else refresh_of_stack)(self, gradient, seed)
        return self._held(made, gradient) if held and self.probes else made

    def parts_of_refresh(self, dtype: torch.dtype, *, held: bool) -> dict[str, tuple[torch.Size, torch.dtype]]:
        """The shapes and dtypes of what one process sends the others of a refresh, with R in `dtype`."""
        state = self.with_placed_bases()
        kept = {key: state[key] for key in self.basis_keys}
        return NewBasis.parts(kept, torch.Size(self.held_shape if held else self.low_rank_shape), dtype)

    def refresh_from(self, tensors: State) -> NewBasis:
        """The refresh that another process has computed."""
        watch = Stopwatch(self.param.device)
        watch.stop()
        return NewBasis.from_tensors(tensors, watch)

    def settle_skipped(self) -> None:
        """Put the count of updates right, as `new_basis` does, where another process computes the refresh."""
        skipped = self.owner.journal.skipped
        uncounted = skipped.uncounted(self.param)
        if uncounted is not None:
            uncount(self.state, skipped.settle(self.param, *uncounted.tolist()))

    @torch.no_grad()
    def use_basis(self, made: NewBasis, version: BasisVersion, *, keep: bool) -> Before:
        """Set the bases that the target has from now on.

        Args:
            made: usable.
            version: of the new bases.
            keep: whether the refresh may be taken back.

        Returns:
            What `update` needs for the first update in the new bases, and `take_back`.
        """
        state, group = self.with_placed_bases(), self.group
        matrices = None if made.of_stack is None else made.of_stack.matrices
        keep = keep or group["moments"] == "rotate"
        before = before_refresh(state, self.basis_keys, keep=keep, matrices=matrices)
        count_refresh(state, int(state["step"].item()), matrices)
        for key, value in made.kept.items():
            state[key].copy_(value)
        if "gap_factor" in state:
            self._lengthen_gaps(made, before)
        self._version, version.probes = version, made.probes
        overlap = made.overlap if before.had_basis else None
        self.owner.journal.refreshes.add(Refresh(made.captured_energy, overlap, made.watch))
        return before

    @torch.no_grad()
    def take_back(self, before: Before) -> None:
        """Set the bases that it had before a refresh whose gradient was dropped."""
        take_back(self.state, before)
        self._version = None

    # ---- the update

    def _step(self, gradient: Tensor, norm: Tensor | None) -> None:
        if self.due():
            self.update(self.project(gradient, refresh=True))
        else:
            bases = self.bases_here()
            self.update(self.projected_by(gradient, bases), bases=bases)

    @torch.no_grad()
    def update(
        self,
        low_rank: Tensor,
        norm: Tensor | None = None,
        *,
        before: Before | None = None,
        bases: Bases | None = None,
        whole: WholeGradient | None = None,
    ) -> None:
        """One optimizer step from the low-rank gradient R, or from what is held of it, which is left as it is.

        Args:
            norm: its norm, or what is finite where that is, where it is known already.
            before: from `use_basis`, where this is the first update after a refresh.
            bases: `bases_here()`, where they are at hand: quantised ones take time to read.
            whole: the gradient, where `needs_gradient` says so.
        """
        state, group = self.with_placed_bases(), self.group
        skip = Skip(self.over_ranks(norm_of(low_rank)) if norm is None else norm)
        low_rank = self._of_held(low_rank)
        if before is not None and before.complete and skip.known:
            self.take_back(before)
            before = None
        if before is not None:
            self._carry_moments(before)
        step = self._begin(state, skip)
        if step is None:
            return
        # Moments that began anew at the last refresh have a bias to correct that is no older.
        resets = group["moments"] == "reset"
        ages = {step - last for last in numbers_of(state["refreshed_at"])} if resets else {step}
        if len(ages) == 1:
            direction, factor = self._direction(low_rank, group, ages.pop(), skip)
        else:
            each = [step - last for last in numbers_of(state["refreshed_at"])]
            direction, factor = by_age(self._direction_of_some(group, skip), low_rank, self.moments(), each)
        self._move(Movement(direction, factor, low_rank, bases, whole), step, skip)

    def _move(self, by: Movement, step: int, skip: Skip) -> None:
        """Subtract a direction, projected back, from the weight."""
        group, (weight, is_view) = self.group, self._matrices()
        direction, bases = by.direction, self.bases_here() if by.bases is None else by.bases
        alpha, decay = self._alpha(by.factor), decay_of(group)
        if self._rounds_stochastically(group):
            self._add_rounded(weight, group, functools.partial(projected_back, direction, bases), alpha, step, skip)
        elif skip.known is False or is_identity(weight.dtype, decay):
            # Where only the device knows that the update is skipped, N is zero, and the decay alone changes nothing.
            add_projected_back_(weight, direction, bases, alpha, decay=decay)
        elif not self._is_precise:
            self._add_rounded(weight, group, functools.partial(projected_back, direction, bases), alpha, step, skip)
        else:
            weight.mul_(decay_unless(skip.flag, weight.dtype, decay))
            add_projected_back_(weight, direction, bases, alpha)
        if not is_view:
            self.weight.copy_(weight.view(self.weight.shape))

    def _alpha(self, factor: float) -> float:
        """What an update, which a rule's factor multiplies, is added with."""
        return -factor * scale_of(self.group, self.matrix_shape)

    def _matrices(self) -> tuple[Tensor, bool]:
        """The weight as matrices, and whether that is a view of it: else it has to be copied back."""
        return viewed(self.weight, self.matrix_shape)

    def _direction_of_some(self, group: Group, skip: Skip) -> Callable[[Tensor, State, int], tuple[Tensor, float]]:
        """What gives the direction of some matrices of a stack, from their R, their moments and the moments' age."""
        return lambda low_rank, moments, age: self.rule.direction(low_rank, moments, group, age, skip)

    def _direction(self, low_rank: Tensor, group: Group, step: int, skip: Skip) -> tuple[Tensor, float]:
        """The direction of R, as it is projected back here, and the factor that it is subtracted with."""
        return self.rule.direction(low_rank, self.moments(), group, step, skip)

    def _carry_moments(self, before: Before) -> None:
        """Do to the moments what the option `moments` says, after the basis has changed."""
        group, step = self.group, int(self.state["step"].item())
        if not before.had_basis or step == 0 or group["moments"] == "keep":
            return
        moments, some, count = self.moments(), before.matrices, self.stack or 1
        if some is None or len(some) == count:
            self._carry(moments, self.bases(), before, range(count))
        else:
            part = of_matrices(moments, some, count)
            self._carry(part, bases_of_matrices(self.bases(), some), before, some)
            put_of_matrices(moments, part, some, count)

    def _carry(self, moments: State, new: Bases, before: Before, some: Sequence[int]) -> None:
        """Do it to the moments of some matrices of a stack, or of one matrix; those of the new bases."""
        group = self.group
        if group["moments"] == "reset":
            self.rule.reset_(moments)
            return
        rotation = self._of_moments(rotation_between(new, self._old_bases(before, some)))
        self.rule.rotate_(moments, group, rotation, int(self.state["step"].item()))

    def _old_bases(self, before: Before, some: Sequence[int]) -> Bases:
        """Those that some matrices of a stack, or one matrix, had."""
        old = self.layout.read(before.entries, self.param.dtype)
        return old if self.stack is None else bases_of_matrices(old, some)

    def _of_moments(self, rotation: Rotation) -> Rotation:
        """A rotation of the low-rank gradient, for moments as they are kept."""
        return rotation
