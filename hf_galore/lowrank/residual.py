"""What moves a weight besides back(N): the residual S = G − back(R), or G itself, by factors of each channel.

Pure functions on tensors, for matrices and for stacks of k of them, which read nothing back from the device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .nonfinite import Skip
from .projection import Bases, Side, add_projected_back_, at_least_float32, basis_shapes, for_each
from .scales import growth_limit

# R of a channel that is this many times what rounding makes of a channel without any says nothing of the channel.
_CERTAIN = 4.0


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


def least_low_rank(norms: Tensor, shape: Sequence[int], side: Side, rank: int, dtype: torch.dtype) -> Tensor:
    """The norm of R_j that rounding alone may give: what is not above it says nothing of a channel j.

    A channel that lies beside the basis has an R_j of rounding, and ‖N_j‖ / ‖R_j‖ would blow S_j up by as much as
    numbers of `dtype` are precise.

    Args:
        norms: ‖G_j‖, from `channel_norms`.
        shape: m × n, or k × m × n, of G.
        side: that is projected.
        rank: r.
        dtype: of G.
    """
    # Rounding spreads over all m directions, of which a basis has r.
    part = math.prod((rank / basis[-2]) ** 0.5 for basis in basis_shapes(shape, side, rank) if basis is not None)
    return norms * (_CERTAIN * precision(dtype) * part)


def precision(dtype: torch.dtype) -> float:
    """The relative error of a matrix product of `dtype`; in float32 it may have been made of 10 bits (TF32)."""
    return max(torch.finfo(dtype).eps, 2.0**-10) if dtype != torch.float64 else torch.finfo(dtype).eps


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


def sign_of_(residual: Tensor, norms: Tensor, side: Side) -> Tensor:
    """sign(S) in place of S, and 0 for elements that are what rounding has left of a gradient that the basis has.

    Args:
        residual: S.
        norms: ‖G_j‖, from `channel_norms`.
        side: that is projected.
    """
    lengths = {"left": residual.shape[-2], "right": residual.shape[-1], "full": residual.shape[-2:].numel()}
    least = norms * (precision(residual.dtype) / lengths[side] ** 0.5)
    # In place throughout: a comparison would make two matrices more.
    signs: Tensor = residual.div_(least.clamp_min_(torch.finfo(least.dtype).tiny)).trunc_().sign_()
    return signs
