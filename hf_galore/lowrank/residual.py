"""What moves a weight besides back(N): the residual S = G − back(R), or G itself, by factors of each channel.

Pure functions on tensors, for matrices and for stacks of k of them, which read nothing back from the device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..config import ProjBits
from .nonfinite import Skip
from .projection import Bases, Side, add_projected_back_, at_least_float32, basis_shapes, for_each
from .scales import channel_norms, growth_limit

# Of what R has of a channel by chance, the part that rounding makes of a channel without any, as a multiple of the
# precision: rounding spreads over all directions, too.
ROUNDING = 4.0
# ‖S_j‖ / ‖G_j‖ of a gradient in the span of bases that are kept in so many bits: 5e-8 in float64, 0.006 ± 0.002, and
# 0.07 ± 0.01.
_LEFT_BY_BASES: dict[ProjBits, float] = {16: 2.5e-7, 8: 0.01, 4: 0.1}


class Term(NamedTuple):
    """A matrix of the weight's shape, and the factors that multiply it."""

    matrix: Tensor
    factors: Tensor | float
    """A number, or one of each channel in the shape that multiplies the matrix."""

    def add_to_(self, weight: Tensor, alpha: float) -> None:
        """W ← W + alpha · factors · matrix in place, for a weight of at least float32."""
        if isinstance(self.factors, Tensor):
            weight.addcmul_(self.matrix, self.factors.to(weight.dtype), value=alpha)
        else:
            weight.add_(self.matrix, alpha=alpha * self.factors)

    def whole(self, *, spare: bool) -> Tensor:
        """factors · matrix in the matrix's dtype, in its place if `spare` says so."""
        return self.matrix.mul_(self.factors) if spare else self.matrix.mul(self.factors).to(self.matrix.dtype)

    def rows(self, rows: slice) -> Tensor:
        """The rows of factors · matrix that a slice names, of at least float32; of a stack the matrices."""
        matrix, factors = self.matrix[rows], self.factors
        if isinstance(factors, Tensor) and (self.matrix.ndim == 3 or len(factors) > 1):
            factors = factors[rows]
        return matrix.to(at_least_float32(matrix.dtype)) * factors


def without_skipped(gradient: Tensor, skip: Skip, *, spare: bool) -> Tensor:
    """The gradient, or zeros of an update that only the device knows to be skipped: 0 · NaN would be NaN.

    Args:
        gradient: G.
        skip: whether the update is skipped.
        spare: whether the gradient may be overwritten.
    """
    if skip.flag is None:
        return gradient
    skipped = skip.flag.bool()
    return gradient.masked_fill_(skipped, 0.0) if spare else gradient.masked_fill(skipped, 0.0)


def residual_of(gradient: Tensor, low_rank: Tensor, bases: Bases, *, spare: bool) -> Tensor:
    """S = G − back(R), the part of a gradient that its low-rank gradient has not; where G was if `spare` says so.

    Args:
        gradient: G.
        low_rank: R, in these bases, which need not be orthonormal to the last digit.
        bases: as R was computed with them.
        spare: whether G may be overwritten.
    """
    residual = gradient if spare else gradient.clone()
    add_projected_back_(residual, low_rank, bases, -1.0)
    return residual


def part_by_chance(shape: Sequence[int], side: Side, rank: int) -> float:
    """‖R_j‖ / ‖G_j‖ in random orthonormal bases, which have r of m directions.

    Args:
        shape: m × n, or k × m × n, of G.
        side: that is projected.
        rank: r.
    """
    shapes = basis_shapes(shape, side, rank)
    return math.sqrt(math.prod(rank / basis[-2] for basis in shapes if basis is not None))


def precision(dtype: torch.dtype) -> float:
    """What is nothing beside 1 in products of matrices of `dtype`, with bases that a refresh has made of a gradient."""
    # Those of float32 may be made of 10 bits (TF32). A power iteration leaves 1e-9 of the basis before, in any dtype.
    return 2.0**-26 if dtype == torch.float64 else max(torch.finfo(dtype).eps, 2.0**-10)


def limited(factors: Tensor, norms: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
    """The factors of a term whose growth is limited, and the norm that it has then.

    Args:
        factors: of each channel.
        norms: of each channel before it is multiplied with its factor.
        before: the norm at the update before, 0-dimensional, or k numbers of a stack; 0 where there was none.

    Returns:
        The factors, and the norm that the next update is to be limited by: that before where there is none now.
    """
    norm: Tensor = torch.linalg.vector_norm(factors * norms, dim=(-2, -1))
    limit = growth_limit(norm, before.to(norm.dtype))
    return factors * for_each(limit), torch.where(norm > 0, norm * limit, before)


def sign_of_(residual: Tensor, norms: Tensor, side: Side, bits: ProjBits) -> Tensor:
    """sign(S) in place of S, and 0 for what rounding has left of a gradient that the bases have.

    That is what there is where the gradient has a lower rank than the bases: a sign would blow it up to full size.

    Args:
        residual: S.
        norms: ‖G_j‖, from `channel_norms`.
        side: that is projected.
        bits: that an element of a basis is kept in.
    """
    certain = channel_norms(residual, side) > norms * max(precision(residual.dtype), _LEFT_BY_BASES[bits])
    lengths = {"left": residual.shape[-2], "right": residual.shape[-1], "full": residual.shape[-2:].numel()}
    least = norms * (2 * precision(residual.dtype) / lengths[side] ** 0.5)
    least = torch.where(certain, least.clamp_min_(torch.finfo(least.dtype).tiny), torch.inf)
    # In place throughout: a comparison would make two matrices more.
    signs: Tensor = residual.div_(least).trunc_().sign_()
    return signs
