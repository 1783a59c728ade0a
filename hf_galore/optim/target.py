"""One projected parameter: when its basis is renewed, how gradients become low-rank, how that updates the weight."""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Iterable

import torch
from torch import Tensor

from ..backward.gradient import BasisVersion
from ..lowrank.methods import METHODS
from ..lowrank.nonfinite import Skip
from ..lowrank.projection import (
    Bases,
    Gradient,
    add_projected_back_,
    basis_shapes,
    low_rank_shape,
    norm_of,
    project,
    projected_back,
    side_of,
)
from ..lowrank.refresh import bases_of_lower_rank, cheaper_from_factors, figures_of, may_fail, new_bases
from ..lowrank.rotation import Rotation, rotation_between
from ..lowrank.rounding import decay_unless, is_identity
from ..lowrank.schedule import NEVER, next_gap_factor, phase_of, refreshes_by, step_of_next_refresh
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
    refreshed_at,
    take_back,
)
from .groups import Group
from .report import Refresh, Stopwatch
from .skipped import uncount
from .trained import Owner, Place, Trained, decay_of


class Target(Trained):
    """A matrix W (m × n) that is projected: its moments are those of R, its low-rank gradient.

    What hooks and steps do with it is: `due()`, `project(gradient)`, `update(R)`.
    """

    projected = True

    def __init__(self, owner: Owner, param: Tensor, place: Place, index: int, rule: Rule) -> None:
        super().__init__(owner, param, place, index, rule)
        self._phase: int | None = None
        self.refresh_asked = False
        """Whether the next step is to refresh the basis whatever its turn."""
        self._version: BasisVersion | None = None

    def _derive(self) -> None:
        group, shape = self.group, self.param.shape
        self.rank: int = group["rank"]
        self.side = side_of(shape, group["proj_type"])
        self._shapes = basis_shapes(shape, self.side, self.rank)
        self._layout = BasisLayout(self._shapes, group["proj_bits"])
        self.basis_keys = self._layout.keys
        super()._derive()

    def _shape_of_gradient(self) -> tuple[int, ...]:
        return low_rank_shape(self._shape, self.side, self.rank)

    def new_state(self, like: Tensor) -> State:
        """A state before the first refresh, on the device of `like`."""
        state = super().new_state(like)
        counters = new_counters(self.group["lazy_refresh"])
        return {"step": state.pop("step"), **counters, **self._layout.empty(like), **state}

    # ---- the basis

    @property
    def phase(self) -> int:
        """The step of the gap at which it refreshes, spread over the optimizer's targets that are staggered."""
        if self._phase is None:
            targets = self.owner.targets()
            staggered = [target for target in targets if target.group["stagger"]]
            turns = {id(target): turn for turn, target in enumerate(staggered)}
            for target in targets:  # all at once, as options may change before others are asked
                turn = turns.get(id(target))
                gap = target.group["update_proj_gap"]
                target._phase = 0 if turn is None else phase_of(turn, len(staggered), gap)
        assert self._phase is not None
        return self._phase

    def refresh_counts(self) -> tuple[int, int | None]:
        """How many refreshes there were, and with `lazy_refresh` how many it has saved."""
        state, group = self.present_state, self.group
        done = int(state["refreshes"].item())
        if not group["lazy_refresh"]:
            return done, None
        return done, refreshes_by(int(state["step"].item()), group["update_proj_gap"], self.phase) - done

    def due(self) -> bool:
        """Whether the next step is one with a new basis: the first, and every `update_proj_gap`-th."""
        if self.refresh_asked:
            return True
        state = self.state
        self._place_on_host(state)
        factor = int(state["gap_factor"].item()) if "gap_factor" in state else 1
        due_at = step_of_next_refresh(refreshed_at(state), self.group["update_proj_gap"], self.phase, factor)
        return int(state["step"].item()) >= due_at

    def bases(self) -> Bases:
        """The present bases, in the weight's dtype; zeros before the first refresh."""
        return self._layout.read(self._with_placed_bases(), self.param.dtype)

    def bases_here(self) -> Bases:
        """The present bases as gradients are projected with them here."""
        return self._layout.read_here(self._with_placed_bases(), self.param.dtype)

    def projected_by(self, gradient: Gradient, bases: Bases) -> Tensor:
        """The low-rank gradient of G, with what `bases_here` gave."""
        return project(gradient, bases)

    def _with_placed_bases(self) -> State:
        """The state, with its bases where the weight is: with 16 bits they have its dtype."""
        state = self.state
        self._place(state, self.basis_keys, self.param.dtype if self._layout.bits == 16 else None)
        return state

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
            return target.projected_by(gradient, target.bases_here())

        return BasisVersion(name, low_rank)

    def cheaper_from_factors(self, tokens: int) -> bool:
        """Whether a refresh takes fewer multiply-adds from δ and X of `tokens` rows than from G = δᵀX."""
        return cheaper_from_factors(self.param.shape, self.rank, self.side, self.group["refresh"], tokens)

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
    def new_basis(self, gradient: Gradient) -> NewBasis:
        """Bases from a gradient, and its low-rank gradient in them. Waits for the device once.

        Changes nothing but the count of updates, if only the device knew that some were skipped: the steps at which
        bases are refreshed are right.
        """
        watch = Stopwatch(self.param.device)
        state, method = self.state, self.group["refresh"]
        old = None if refreshed_at(state) == NEVER else self.bases()
        seed = basis_seed(self.group.get("basis_seed", 0), self.index, int(state["refreshes"].item()))
        computed = new_bases(gradient, self.side, self.rank, method, old, seed=seed)
        check = may_fail(method, gradient.device)
        kept, low_rank, (norm, energy, shared, full, defect) = self._figures(gradient, computed, old, check)
        if not defect <= 1 and 0 < norm < math.inf:  # or NaN
            # Rare too. What is not orthonormal is not measured either: all is computed anew.
            del kept, low_rank, computed
            computed = new_bases(gradient, self.side, self.rank, method, old, seed=seed, factorisation="reflections")
            kept, low_rank, (norm, energy, shared, full, _) = self._figures(gradient, computed, old)
        if not full and 0 < norm < math.inf and METHODS[method].by_gradient:
            # Rare, so that it may wait once more; and it takes no more memory than the first time.
            del kept, low_rank
            computed = bases_of_lower_rank(gradient, self.side, self.rank, method, computed)
            kept, low_rank, (norm, energy, shared, *_) = self._figures(gradient, computed, old)
        if norm == 0:
            low_rank.zero_()
        elif not math.isfinite(norm):
            low_rank.fill_(math.nan)  # an infinite element may meet a zero of the basis
        watch.stop()
        return NewBasis(kept, low_rank, norm, energy, shared, watch)

    def _figures(
        self, gradient: Gradient, computed: Bases, old: Bases | None, check: bool = False
    ) -> tuple[State, Tensor, list[float]]:
        """New bases as they are kept, the gradient in them, and what there is to know of the refresh."""
        kept = self._layout.kept(computed, self.param.dtype)
        new = self._layout.read(kept, self.param.dtype)
        low_rank = self.projected_by(gradient, new)
        figures = figures_of(gradient, low_rank, new, old, computed, check)
        skipped = self.owner.journal.skipped
        uncounted = skipped.uncounted(self.param)
        asked = figures if uncounted is None else torch.cat([figures, uncounted.to(figures.dtype)])
        asked = asked if self.ranks is None else self.ranks.of_first(asked)
        # The one time that a refresh waits for the device.
        found = [value.item() for value in asked.cpu().unbind()]
        if uncounted is not None:
            uncount(self.state, skipped.settle(self.param, *found[-2:]))
        return kept, low_rank, found[: len(figures)]

    def parts_of_refresh(self, dtype: torch.dtype) -> dict[str, tuple[torch.Size, torch.dtype]]:
        """The shapes and dtypes of what one process sends the others of a refresh, with R in `dtype`."""
        state = self._with_placed_bases()
        kept = {key: state[key] for key in self.basis_keys}
        return NewBasis.parts(kept, torch.Size(self._shape_of_gradient()), dtype)

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
        state, group = self._with_placed_bases(), self.group
        before = before_refresh(state, self.basis_keys, keep=keep or group["moments"] == "rotate")
        count_refresh(state, int(state["step"].item()))
        for key, value in made.kept.items():
            state[key].copy_(value)
        if "gap_factor" in state and before.had_basis:
            chance = max(self.rank / shape[0] for shape in self._shapes if shape is not None)
            factor = next_gap_factor(int(state["gap_factor"].item()), made.overlap, chance)
            state["gap_factor"] = torch.tensor(float(factor))
        self._version = version
        overlap = made.overlap if before.had_basis else None
        self.owner.journal.refreshes.add(Refresh(made.captured_energy, overlap, made.watch))
        return before

    @torch.no_grad()
    def take_back(self, before: Before) -> None:
        """Set the bases that it had before a refresh whose gradient was dropped."""
        take_back(self.state, before)
        self._version = None

    def forget_version(self) -> None:
        """Let low-rank gradients of before be in another basis than those to come: a checkpoint was loaded."""
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
    ) -> None:
        """One optimizer step from the low-rank gradient R, which is left as it is.

        Args:
            norm: ‖R‖, or what is finite where that is, where it is known already.
            before: from `use_basis`, where this is the first update after a refresh.
            bases: `bases_here()`, where they are at hand: quantised ones take time to read.
        """
        state, group, weight = self._with_placed_bases(), self.group, self.weight
        skip = Skip(self.over_ranks(norm_of(low_rank)) if norm is None else norm)
        if before is not None and before.complete and skip.known:
            self.take_back(before)
            before = None
        if before is not None:
            self._carry_moments(before)
        step = self._begin(state, skip)
        if step is None:
            return
        # Moments that began anew at the last refresh have a bias to correct that is no older.
        moments_step = step - refreshed_at(state) if group["moments"] == "reset" else step
        direction, factor = self._direction(low_rank, group, moments_step, skip)
        bases = self.bases_here() if bases is None else bases
        alpha, decay = -factor * group["scale"], decay_of(group)
        if self._rounds_stochastically(group):
            self._add_rounded(group, functools.partial(projected_back, direction, bases), alpha, step, skip)
        elif skip.known is False or is_identity(weight.dtype, decay):
            # Where only the device knows that the update is skipped, N is zero, and the decay alone changes nothing.
            add_projected_back_(weight, direction, bases, alpha, decay=decay)
        elif weight.dtype not in (torch.float32, torch.float64):
            self._add_rounded(group, functools.partial(projected_back, direction, bases), alpha, step, skip)
        else:
            weight.mul_(decay_unless(skip.flag, weight.dtype, decay))
            add_projected_back_(weight, direction, bases, alpha)

    def _direction(self, low_rank: Tensor, group: Group, step: int, skip: Skip) -> tuple[Tensor, float]:
        """The direction of R, as it is projected back here, and the factor that it is subtracted with."""
        return self.rule.direction(low_rank, self.moments(), group, step, skip)

    def _carry_moments(self, before: Before) -> None:
        """Do to the moments what the option `moments` says, after the basis has changed."""
        group, step = self.group, int(self.state["step"].item())
        if not before.had_basis or step == 0:
            return
        if group["moments"] == "reset":
            self.rule.reset_(self.moments())
        elif group["moments"] == "rotate":
            old = self._layout.read(before.entries, self.param.dtype)
            self.rule.rotate_(self.moments(), group, self._of_moments(rotation_between(self.bases(), old)), step)

    def _of_moments(self, rotation: Rotation) -> Rotation:
        """A rotation of the low-rank gradient, for moments as they are kept."""
        return rotation


def forget_phases(parameters: Iterable[Trained]) -> None:
    """Let the phases of targets be worked out anew."""
    for target in parameters:
        if isinstance(target, Target):
            target._phase = None
