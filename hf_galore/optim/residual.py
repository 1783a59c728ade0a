"""Targets whose gradient itself moves them too: by what its low-rank gradient has not, the residual.

State of one whose term is limited, besides that of a target::

    limited_norm    the norm that the limited term had at the last update, float32; of a stack k of them

That of the momentum of a residual is in `hf_galore.optim.whole_muon`.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from ..lowrank.nonfinite import Skip
from ..lowrank.projection import Bases, Side, add_projected_back_, norm_of, projected_back
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
from ..lowrank.rounding import add_whole_, decay_unless
from ..lowrank.scales import channel_norms, ratios, sign_part
from ..rules.rule import Moment
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
        self._of_whole = self._moments_of_whole()
        self.whole_keys = tuple(self._of_whole)

    def _moments_of_whole(self) -> dict[str, Moment]:
        """What is kept besides the moments of R, by its keys in the state; it starts as zeros."""
        norms = () if self.stack is None else (self.stack,)
        return {LIMITED_NORM: Moment(norms, torch.float32)} if self.is_limited else {}

    def new_state(self, like: Tensor) -> State:
        """A state before the first refresh, on the device of `like`."""
        state = super().new_state(like)
        for key, moment in self._of_whole.items():
            state[key] = like.new_zeros(moment.shape, dtype=moment.dtype)
        return state

    def with_placed_bases(self) -> State:
        """The state, with its bases and what is kept for the gradient itself where the weight is."""
        state = super().with_placed_bases()
        self._place(state, self.whole_keys)
        return state

    def _step(self, gradient: Tensor, norm: Tensor | None) -> None:
        self.use(gradient, self.over_ranks(norm_of(gradient)) if norm is None else norm, spare=False)

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

    def _add(self, term: Term, alpha: float, step: int, skip: Skip, *, spare: bool) -> None:
        """W ← (1 − ηλ)W + alpha · term, in one rounding.

        Args:
            spare: whether the term's matrix may be overwritten.
        """
        group, (weight, is_view) = self.group, self._matrices()
        decay = decay_of(group)
        if self._is_precise:
            if decay != 1:
                weight.mul_(decay_unless(skip.flag, weight.dtype, decay))
            term.add_to_(weight, alpha)
        elif not self._rounds_stochastically(group):
            add_whole_(weight, term.whole(spare=spare), alpha=alpha, decay=decay, skip=skip.flag)
        else:
            self._add_rounded(weight, group, term.rows, alpha, step, skip)
        if not is_view:
            self.weight.copy_(weight.view(self.weight.shape))

    # ---- of one of several processes that have a part of the weight each (`hf_galore.optim.sharded_gradient`) these
    # differ

    def _here(self, low_rank: Tensor) -> Tensor:
        """R as it meets what this process has of G: as directions do."""
        return low_rank

    def _whole_norms(self, norms: Tensor, side: Side) -> Tensor:
        """The norms of channels of G, from those of the part that this process has."""
        return norms

    def _low_rank_norms(self, matrix: Tensor, side: Side) -> Tensor:
        """The norms of channels of R, or of a direction, as `_here` gives it."""
        return channel_norms(matrix, side)

    def _limited(self, factors: Tensor, norms: Tensor) -> Tensor:
        """The factors of a term, with its growth limited.

        Args:
            factors: of each channel.
            norms: of the channels without factors, of what this process has.
        """
        before = self.with_placed_bases()[LIMITED_NORM]
        norm = self.over_ranks(torch.linalg.vector_norm(factors * norms, dim=(-2, -1)))
        factors, now = limited(factors, norm, before)
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
        if self._is_precise:
            super()._move(by, step, skip)
        weight, is_view = self._matrices()
        if self._is_precise:
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
        norms = self._whole_norms(channel_norms(gradient, self.side), self.side)
        low_rank = self._here(by.low_rank)
        low_rank = low_rank if skip.flag is None else low_rank.masked_fill(skip.flag.bool(), 0.0)
        residual = residual_of(gradient, low_rank, bases, spare=spare)
        own = channel_norms(residual, self.side)
        if not self.is_limited:
            own = self._whole_norms(own, self.side)
            channel = math.prod(self.matrix_shape[-2:]) // self._channels
            signs = sign_of_(residual, own, norms, channel, group["proj_bits"])
            return Term(signs, group["residual_scale"] * sign_part(group, self.matrix_shape))
        of_direction, of_low_rank = (self._low_rank_norms(matrix, self.side) for matrix in (by.direction, low_rank))
        by_chance = norms * part_by_chance(self.matrix_shape, self.side, self.rank)
        factors = ratios(of_direction, of_low_rank, by_chance, ROUNDING * precision(gradient.dtype))
        return Term(residual, self._limited(factors, own) * group["residual_scale"])

    @property
    def _channels(self) -> int:
        """How many channels a matrix has."""
        m, n = self.matrix_shape[-2:]
        return {"left": n, "right": m, "full": 1}[self.side]
