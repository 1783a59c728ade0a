"""Projecting a gradient to low rank and an update back: pure functions on tensors.

Shapes, for a weight of m × n and rank r:

======  ==========  ===========  =============
side    left basis  right basis  low-rank grad
======  ==========  ===========  =============
left    m × r       none         r × n
right   none        n × r        m × r
full    m × r       n × r        r × r
======  ==========  ===========  =============

Source: GaLore (Zhao et al., 2024, arXiv:2403.03507), section 4 and algorithm 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from torch import Tensor

from .config import ProjType

Side = Literal["left", "right", "full"]


class Bases(NamedTuple):
    """The basis on each side that is projected: orthonormal columns, `None` on a side that is not."""

    left: Tensor | None
    right: Tensor | None


class BasisShapes(NamedTuple):
    """The shapes of a target's bases; `None` on a side that is not projected."""

    left: tuple[int, int] | None
    right: tuple[int, int] | None


def side_of(shape: Sequence[int], proj_type: ProjType) -> Side:
    """The side that `proj_type` projects for a weight of `shape` m × n.

    `std` projects the smaller side (right where m ≥ n, else left), `reverse_std` the larger one.
    """
    m, n = shape
    if proj_type == "std":
        return "right" if m >= n else "left"
    if proj_type == "reverse_std":
        return "left" if m >= n else "right"
    return proj_type


def is_projectable(shape: Sequence[int], rank: int) -> bool:
    """Whether a weight of `shape` gets smaller moments at `rank`: only below its smaller side."""
    return len(shape) == 2 and min(shape) > rank


def basis_shapes(shape: Sequence[int], side: Side, rank: int) -> BasisShapes:
    """The shapes of the bases for a weight of `shape` m × n."""
    m, n = shape
    return BasisShapes(
        left=(m, rank) if side != "right" else None,
        right=(n, rank) if side != "left" else None,
    )


def low_rank_shape(shape: Sequence[int], side: Side, rank: int) -> tuple[int, int]:
    """The shape of the low-rank gradient, and so of its moments, for a weight of `shape` m × n."""
    m, n = shape
    return (rank if side != "right" else m, rank if side != "left" else n)


def project(gradient: Tensor, bases: Bases) -> Tensor:
    """R = PᵀG, GQ or PᵀGQ: the low-rank gradient, in the gradient's dtype."""
    low_rank = gradient
    if bases.left is not None:
        low_rank = bases.left.mT @ low_rank
    if bases.right is not None:
        low_rank = low_rank @ bases.right
    return low_rank


def add_projected_back_(weight: Tensor, direction: Tensor, bases: Bases, alpha: float) -> None:
    """W ← W + alpha·back(N) in place, with back(N) = PN, NQᵀ or PNQᵀ.

    One fused matrix product: neither the full-rank update nor a copy of the weight exists.

    Args:
        weight: m × n.
        direction: N, of the shape of the low-rank gradient, in any floating-point dtype.
        bases: the bases that the gradient was projected with, in the weight's dtype.
        alpha: −η·scale.
    """
    direction = direction.to(weight.dtype)
    if bases.left is None:
        assert bases.right is not None
        weight.addmm_(direction, bases.right.mT, alpha=alpha)
    elif bases.right is None:
        weight.addmm_(bases.left, direction, alpha=alpha)
    else:
        weight.addmm_(bases.left @ direction, bases.right.mT, alpha=alpha)
