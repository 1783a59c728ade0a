"""Targets that move along their gradient itself, scaled by what the rule makes of R in random projections.

No basis is in their state: projections are functions of the seed of the run and the count of refreshes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..backward.gradient import BasisVersion
from ..lowrank.nonfinite import Skip
from ..lowrank.products import Gradient
from ..lowrank.projection import Bases, BasisShapes, Side, norm_of_each
from ..lowrank.random_projection import random_projections
from ..lowrank.residual import Term
from ..lowrank.scales import channel_norms, ratios
from ..lowrank.seeds import basis_seed
from .bases import BasisLayout, Before, NewBasis, OfStack, before_refresh, count_refresh, numbers_of
from .movement import Movement
from .report import Stopwatch
from .residual import TargetOfGradient
from .skipped import uncount


class ScaledTarget(TargetOfGradient):
    """A target that moves along G, each channel of it or the whole scaled by ‖N‖ / ‖R‖, with R = PᵀG of a random P.

    W ← (1 − ηλ)W − η·scale · l · sG with s_j = ‖N_j‖ / ‖R_j‖ of each channel j, or one s of the matrix, and l the limit
    of its growth. A refresh takes other random numbers.

    Source: APOLLO (Zhu et al., 2024, arXiv:2412.05270), algorithm 1, and section 4.2 for one s of the matrix.
    """

    def _derive(self) -> None:
        super()._derive()
        self.layout = BasisLayout(BasisShapes(None, None), 16)
        self.basis_keys = ()
        self.side_of_scales: Side = "full" if self.group["scaling"] == "tensor" else self.side
        """What channels are of; `full` for one scale of the matrix."""

    # ---- the projections

    def bases(self) -> Bases:
        """The present projections, in the weight's dtype."""
        return self._projections(numbers_of(self.state["refreshes"]))

    def bases_here(self) -> Bases:
        """The present projections, as gradients are projected with them here."""
        return self._projections_here(numbers_of(self.state["refreshes"]))

    def _projections_here(self, refreshes: Sequence[int]) -> Bases:
        """What `_projections` gives, as gradients are projected with them here."""
        return self._projections(refreshes)

    def _projections(self, refreshes: Sequence[int]) -> Bases:
        """The projections after so many refreshes; of a stack of each matrix."""
        seed = self.group.get("basis_seed", 0)
        seeds = [basis_seed(seed, self.index, count) for count in refreshes]
        return random_projections(self._shapes, self.rank, seeds, self.param.dtype, self.param.device)

    @torch.no_grad()
    def new_basis(self, gradient: Gradient, *, held: bool = False) -> NewBasis:
        """The low-rank gradient in the next projections, unless the gradient is zero or not finite.

        Waits for the device once, and changes nothing but the count of updates, as where bases are made of gradients.

        Args:
            gradient: G.
            held: of no meaning here: what needs the gradient itself is not held.
        """
        watch = Stopwatch(self.param.device)
        gradient = self._as_matrices(gradient)
        assert isinstance(gradient, Tensor)
        norms = self._numbers_of(self.over_ranks(norm_of_each(gradient)))
        made = [index for index in self.matrices_due() if norms[index] != 0]
        refreshes = numbers_of(self.state["refreshes"])
        for index in made:
            refreshes[index] += 1
        low_rank, norm = self.projected_by(gradient, self._projections_here(refreshes)), math.hypot(*norms)
        if not math.isfinite(norm):
            low_rank.fill_(math.nan)
        watch.stop()
        of_stack = None if self.stack is None else OfStack(tuple(made), (0.0,) * len(made))
        return NewBasis({}, low_rank, norm, 1.0, 0.0, watch, of_stack)

    def _numbers_of(self, norms: Tensor) -> list[float]:
        """The norms as numbers, and the count of updates put right that only the device knows to have been skipped."""
        norms, skipped = norms.reshape(-1), self.owner.journal.skipped
        uncounted = skipped.uncounted(self.param)
        asked = norms if uncounted is None else torch.cat([norms, uncounted.to(norms.dtype)])
        found = [value.item() for value in asked.cpu().unbind()]
        if uncounted is not None:
            uncount(self.state, skipped.settle(self.param, *found[-2:]))
        return found[: len(norms)]

    @torch.no_grad()
    def use_basis(self, made: NewBasis, version: BasisVersion, *, keep: bool) -> Before:
        """Count a refresh: the projections follow from that."""
        state = self.with_placed_bases()
        matrices = None if made.of_stack is None else made.of_stack.matrices
        before = before_refresh(state, (), keep=keep, matrices=matrices)
        count_refresh(state, int(state["step"].item()), matrices)
        self._version = version
        return before

    # ---- the update

    def _move(self, by: Movement, step: int, skip: Skip) -> None:
        gradient, spare = self._whole_of(by, skip)
        side = self.side_of_scales
        own = channel_norms(gradient, side)
        matrices = by.direction, self._here(by.low_rank)
        of_direction, of_low_rank = (self._low_rank_norms(matrix, side) for matrix in matrices)
        # R has the norm of G by chance.
        factors = ratios(of_direction, of_low_rank, self._whole_norms(own, side))
        self._add(Term(gradient, self._limited(factors, own)), self._alpha(by.factor), step, skip, spare=spare)
