"""Targets whose gradient itself moves them too: by what its low-rank gradient has not, the residual.

State of one whose term is limited, besides that of a target::

    limited_norm    the norm that the limited term had at the last update, float32; of a stack k of them
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..lowrank.nonfinite import Skip
from ..lowrank.projection import Bases, add_projected_back_, norm_of, projected_back
from ..lowrank.residual import (
    ROUNDING,
    Term,
    limited,
    part_by_chance,
    precision,
    residual_of,
    sign_of_,
    without_skipped,
)
from ..lowrank.rounding import add_whole_
from ..lowrank.scales import channel_norms, channel_scales
from .bases import NewBasis, State
from .movement import Movement, WholeGradient
from .target import Target
from .trained import decay_of

LIMITED_NORM = "limited_norm"


class TargetOfGradient(Target):
    """A target whose updates need the gradient itself: what residuals and scaling have in common."""

    is_limited = True
    """Whether the growth of what the gradient adds is limited."""

    def _derive(self) -> None:
        super()._derive()
        option = "residual" if self.group.get("scaling", "none") == "none" else "scaling"
        self.needs_gradient = f"{option}={self.group[option]}"
        self.limit_keys = (LIMITED_NORM,) if self.is_limited else ()

    def new_state(self, like: Tensor) -> State:
        """A state before the first refresh, on the device of `like`."""
        state = super().new_state(like)
        for key in self.limit_keys:
            state[key] = like.new_zeros(() if self.stack is None else (self.stack,), dtype=torch.float32)
        return state

    def with_placed_bases(self) -> State:
        """The state, with its bases and the norm of the limited term where the weight is."""
        state = super().with_placed_bases()
        self._place(state, self.limit_keys)
        return state

    def _step(self, gradient: Tensor, norm: Tensor | None) -> None:
        self.use(gradient, norm_of(gradient) if norm is None else norm, spare=False)

    def use(self, gradient: Tensor, norm: Tensor, *, spare: bool) -> None:
        """One optimizer step from the gradient.

        Args:
            gradient: G.
            norm: ‖G‖.
            spare: whether the gradient may be overwritten.
        """
        bases = None
        if self.due():
            low_rank = self.project(gradient, refresh=True)
        else:
            bases = self.bases_here()
            low_rank = self.projected_by(gradient, bases)
        self.update(low_rank, norm, bases=bases, whole=WholeGradient(gradient, spare))

    def use_refreshed(self, made: NewBasis, gradient: Tensor, norm: Tensor, *, spare: bool) -> None:
        """One optimizer step from the gradient and the refresh that was made from it, by whichever process."""
        if made.usable:
            self._carry_moments(self.use_basis(made, self.new_version(), keep=False))
        self.update(made.low_rank, norm, whole=WholeGradient(gradient, spare))

    def _whole_of(self, by: Movement, skip: Skip) -> WholeGradient:
        """The gradient as matrices, without what is not finite in one that is skipped."""
        if by.whole is None:
            raise RuntimeError(
                f"{self.needs_gradient} of {self.name} needs the gradient itself, and hooks were made when its group "
                "had other options. Make the optimizer anew after a change of options."
            )
        gradient = self._as_matrices(by.whole.gradient)
        assert isinstance(gradient, Tensor)
        # Reshaped or made without what is skipped it is a copy, which may be overwritten.
        finite = without_skipped(gradient, skip, spare=by.whole.spare)
        return WholeGradient(finite, spare=by.whole.spare or finite is not gradient)

    def _limited(self, factors: Tensor, norms: Tensor) -> Tensor:
        """The factors of a term, with its growth limited; norms are those of its channels without them."""
        before = self.with_placed_bases()[LIMITED_NORM]
        factors, now = limited(factors, norms, before)
        before.copy_(now)
        return factors


class ResidualTarget(TargetOfGradient):
    """A target that its residual S moves too, scaled as the rule has scaled R, or by its sign.

    W ← (1 − ηλ)W − η·scale·(back(N) + residual_scale · l · φS) with φ_j = ‖N_j‖ / ‖R_j‖ of each channel j, and l the
    limit of its growth; or sign(S) in the place of l · φS.

    Sources: Fira (Chen et al., 2024, arXiv:2410.01623), equations 6 to 8; FRUGAL (Zmushko et al., 2024,
    arXiv:2411.07837), algorithm 1.
    """

    def _derive(self) -> None:
        self.is_limited = self.group["residual"] == "fira"
        super()._derive()

    def _move(self, by: Movement, step: int, skip: Skip) -> None:
        bases = self.bases_here() if by.bases is None else by.bases
        by = by._replace(bases=bases)
        term, alpha = self._term(by, bases, skip), self._alpha(by.factor)
        if self.weight.dtype in (torch.float32, torch.float64):
            super()._move(by, step, skip)
        weight, is_view = self._matrices()
        if weight.dtype in (torch.float32, torch.float64):
            term.add_to_(weight, alpha)
        elif not self._rounds_stochastically(self.group):
            update = term.whole(spare=True)
            add_projected_back_(update, by.direction, bases, 1.0)
            add_whole_(weight, update, alpha=alpha, decay=decay_of(self.group), skip=skip.flag)
        else:
            back = functools.partial(projected_back, by.direction, bases)
            self._add_rounded(weight, self.group, lambda rows: term.rows(rows).add_(back(rows)), alpha, step, skip)
        if not is_view:
            self.weight.copy_(weight.view(self.weight.shape))

    def _term(self, by: Movement, bases: Bases, skip: Skip) -> Term:
        """What the residual adds to back(N)."""
        group, (gradient, spare) = self.group, self._whole_of(by, skip)
        norms = channel_norms(gradient, self.side)
        low_rank = by.low_rank if skip.flag is None else by.low_rank.masked_fill(skip.flag.bool(), 0.0)
        residual = residual_of(gradient, low_rank, bases, spare=spare)
        if not self.is_limited:
            return Term(sign_of_(residual, norms, self.side, group["proj_bits"]), group["residual_scale"])
        by_chance = norms * part_by_chance(self.matrix_shape, self.side, self.rank)
        rounding = ROUNDING * precision(gradient.dtype)
        factors = channel_scales(by.direction, low_rank, self.side, by_chance, rounding)
        factors = self._limited(factors, channel_norms(residual, self.side))
        return Term(residual, factors * group["residual_scale"])
