"""Targets that Muon moves along the whole gradient, of which only the part that their bases have has a momentum.

State with `residual_bits=8`, and with `residual=normuon`, besides that of a target::

    residual_momentum           M_S of the whole matrix, in codes of bitsandbytes' signed 8-bit table; in 32 bits where
                                `galore_adamw_8bit` would keep moments of the matrix so
    residual_momentum_absmax    with 8 bits, one float32 scale for each 256 elements
    line_mean_squares           with normuon, v of each row, or column where these are more: m × 1 or 1 × n
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor

from ..integrations.bitsandbytes import Quantized
from ..lowrank.nonfinite import Skip
from ..lowrank.projection import Bases, add_projected_back_, at_least_float32, norm_of_each, project
from ..lowrank.residual import Term, residual_of
from ..rules.adam_8bit import codebooks, dequantize_moment, is_in_8_bits, moment_8bit, quantize_moment_
from ..rules.muon import Muon, lines_of, look_ahead, make_lines_alike_
from ..rules.rule import Moment, full_precision
from .bases import Before, State
from .groups import Group
from .movement import Movement
from .residual import TargetOfGradient
from .stack import of_matrices, put_of_matrices

RESIDUAL_MOMENTUM, ABSMAX = "residual_momentum", "residual_momentum_absmax"
LINE_MEAN_SQUARES = "line_mean_squares"


class WholeMuonTarget(TargetOfGradient):
    """A target that moves along 0.2 √l · orth(back(D) + residual_scale · S), with l the longer side.

    D = (1 − μ)R + μM is what Muon orthogonalises of R alone, and S = G − back(R) what the bases do not have of G: it
    takes part with no momentum. With bases of the whole space this is Muon, and with no bases Muon without a momentum.

    With `residual_bits=8` S takes part as S' = (1 − μ)S + μM_S, with a momentum of its own, M_S ← μM_S + (1 − μ)S
    before, which is rounded to 8 bits after S' is made of it. With `moments=rotate` a refresh divides the momentum of
    the whole, back(M) + M_S, anew between the new bases and what they do not have: but for rounding, with a
    residual_scale of 1, this is Muon. With `keep` and `reset` M_S stays as it is: of the space outside of the bases
    that were, and what the new bases have of it counts beside D for a few steps.

    With `residual=normuon` the rows of what is orthogonalised, or the columns where these are more, are made equally
    long, by a mean of their squares over the steps (`hf_galore.rules.muon.make_lines_alike_`).

    Sources: Muon (Jordan et al., 2024, https://kellerjordan.github.io/posts/muon/). Of its relatives, GUM (Pan et al.,
    2025, arXiv:2510.17802) takes turns between the two parts, and MLorc (Shen et al., 2025, arXiv:2506.01897) has a
    low-rank momentum of whole gradients too, which it compresses at every step. Of codes in 8 bits: 8-bit Optimizers
    via Block-wise Quantization (Dettmers et al., 2022, arXiv:2110.02861).
    """

    is_limited = False  # each of its steps has the same length

    def _moments_of_whole(self) -> dict[str, Moment]:
        shape, dtype = self.matrix_shape, full_precision(self.param.dtype)
        found: dict[str, Moment] = {}
        if self.group.get("residual_bits", 0):
            in_8_bits = is_in_8_bits(shape)
            found |= moment_8bit(RESIDUAL_MOMENTUM, shape) if in_8_bits else {RESIDUAL_MOMENTUM: Moment(shape, dtype)}
        if self.group["residual"] == "normuon":
            found[LINE_MEAN_SQUARES] = Moment(lines_of(shape), dtype)
        return found

    def _direction(self, low_rank: Tensor, group: Group, step: int, skip: Skip) -> tuple[Tensor, float]:
        return self._ahead(low_rank, self.moments(), skip)

    def _direction_of_some(self, group: Group, skip: Skip) -> Callable[[Tensor, State, int], tuple[Tensor, float]]:
        return lambda low_rank, moments, age: self._ahead(low_rank, moments, skip)

    def _ahead(self, low_rank: Tensor, moments: State, skip: Skip) -> tuple[Tensor, float]:
        return self._muon.ahead(low_rank, moments, self.group, skip), float(self.group["lr"])

    @property
    def _muon(self) -> Muon:
        return cast("Muon", self.rule)

    def _move(self, by: Movement, step: int, skip: Skip) -> None:
        bases = self.bases_here() if by.bases is None else by.bases
        gradient, spare = self._whole_of(by, skip)
        norm = norm_of_each(gradient)
        low_rank = by.low_rank if skip.flag is None else by.low_rank.masked_fill(skip.flag.bool(), 0.0)
        together = residual_of(gradient, low_rank, bases, spare=spare)
        if RESIDUAL_MOMENTUM in self.whole_keys:
            together.copy_(self._residual_ahead(together, skip))
        together.mul_(self.group["residual_scale"])
        add_projected_back_(together, by.direction, bases, 1.0)
        together.copy_(self._made_alike(together, norm))
        self._add(Term(together, 1.0), self._alpha(by.factor), step, skip, spare=True)

    def _carry(self, moments: State, new: Bases, before: Before, some: Sequence[int]) -> None:
        if RESIDUAL_MOMENTUM not in self.whole_keys or self.group["moments"] != "rotate":
            super()._carry(moments, new, before, some)
            return
        state = self.with_placed_bases()
        kept = {key: state[key] for key in (RESIDUAL_MOMENTUM, ABSMAX) if key in self.whole_keys}
        count = self.stack or 1
        part = kept if len(some) == count else of_matrices(kept, some, count)
        buffer = moments["momentum_buffer"]
        whole = _read_momentum(part)
        # One that is not in 8 bits is itself what is written to.
        old, new = (_in_dtype(bases, whole.dtype) for bases in (self._old_bases(before, some), new))
        add_projected_back_(whole, buffer, old, 1.0)
        buffer.copy_(project(whole, new))
        add_projected_back_(whole, buffer, new, -1.0)
        if ABSMAX in part:
            _write_momentum_(part, whole, None)
        if part is not kept:
            put_of_matrices(kept, part, some, count)

    def _made_alike(self, together: Tensor, norm: Tensor) -> Tensor:
        """0.2 √l · orth(X) of X, and of that the lines, where these are to be alike; of at least float32.

        Args:
            together: X.
            norm: ‖G‖, or k of a stack; nothing moves where it is zero, as of an update that is skipped.
        """
        direction = self._muon.made_alike(together.to(at_least_float32(together.dtype)), norm)
        if LINE_MEAN_SQUARES in self.whole_keys:
            lines = self.with_placed_bases()[LINE_MEAN_SQUARES]
            make_lines_alike_(direction, lines, norm.ne(0).to(direction.dtype))
        return direction

    def _residual_ahead(self, residual: Tensor, skip: Skip) -> Tensor:
        """S', of at least float32; updates M_S.

        Args:
            residual: S, finite also where the update is skipped.
            skip: whether it is.
        """
        state, momentum = self.with_placed_bases(), self.group["momentum"]
        if ABSMAX not in self.whole_keys:
            return look_ahead(residual, state[RESIDUAL_MOMENTUM], momentum, skip.flag)
        buffer = _read_momentum(state).to(at_least_float32(residual.dtype))
        ahead = look_ahead(residual, buffer, momentum, None)
        _write_momentum_(state, buffer, skip.flag)
        return ahead


def _read_momentum(kept: State) -> Tensor:
    """M_S as its codes stand for it, in float32; the one that is kept where it is not in 8 bits."""
    if ABSMAX not in kept:
        return kept[RESIDUAL_MOMENTUM]
    codes = Quantized(kept[RESIDUAL_MOMENTUM], kept[ABSMAX])
    return dequantize_moment(codes, codebooks(codes.codes.device).signed)


def _write_momentum_(kept: State, momentum: Tensor, skip: Tensor | None) -> None:
    """Put M_S where its codes are, unless it is skipped."""
    codes = Quantized(kept[RESIDUAL_MOMENTUM], kept[ABSMAX])
    quantize_moment_(codes, momentum.to(torch.float32), codebooks(codes.codes.device).signed, skip)


def _in_dtype(bases: Bases, dtype: torch.dtype) -> Bases:
    return Bases(*(None if basis is None else basis.to(dtype) for basis in bases))
