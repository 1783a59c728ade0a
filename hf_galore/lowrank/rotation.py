"""Carrying moments over a refresh, from the old basis to the new one: pure functions on tensors.

With C = P_newᵀP_old, what was measured as x in the old coordinates is Cx in the new ones; for a `right` basis, xCᵀ.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .projection import Bases, at_least_float32


class Rotation(NamedTuple):
    """C for each side that is projected: r × r, or k × r × r for a stack; `None` on a side that is not."""

    left: Tensor | None
    right: Tensor | None


def rotation_between(new: Bases, old: Bases) -> Rotation:
    """C = P_newᵀP_old for both sides, in float32 (float64 for float64 bases)."""
    return Rotation(
        *(
            None if p is None or q is None else p.to(at_least_float32(p.dtype)).mT @ q.to(at_least_float32(q.dtype))
            for p, q in zip(new, old, strict=True)
        )
    )


def rotate(value: Tensor, rotation: Rotation) -> Tensor:
    """C_left · x · C_rightᵀ, for x of the low-rank gradient's shape."""
    if rotation.left is not None:
        value = rotation.left.to(value.dtype) @ value
    if rotation.right is not None:
        value = value @ rotation.right.mT.to(value.dtype)
    return value


def rotate_variance(value: Tensor, rotation: Rotation) -> Tensor:
    """What C does to variances of uncorrelated coordinates: C², its elements squared, instead of C.

    Of the part of a new coordinate that no old one covers nothing is known: it is given the mean over the old ones. To
    leave it at zero would let Adam take several times its normal step there.

    Args:
        value: of the low-rank gradient's shape.
    """
    if rotation.left is not None:
        value = _rotate_rows(value, rotation.left.to(value.dtype).square())
    if rotation.right is not None:
        value = _rotate_rows(value.mT, rotation.right.to(value.dtype).square()).mT
    return value


def _rotate_rows(value: Tensor, squared: Tensor) -> Tensor:
    """C²x for x of r rows, with the mean of x for the part of a row of C² that is missing to 1."""
    uncovered = (1 - squared.sum(dim=-1, keepdim=True)).clamp_(min=0)
    return squared @ value + uncovered * value.mean(dim=-2, keepdim=True)


def rotate_adam(
    exp_avg: Tensor, exp_avg_sq: Tensor, rotation: Rotation, *, step: int, betas: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    """Adam's moments in the new basis: m ← Cm, and v ← (1 − β₂ᵗ) |C²(v̂ − m̂²) + (Cm̂)²|.

    The mean rotates, and the variance around it as `rotate_variance` says.

    Args:
        exp_avg: m, of the low-rank gradient's shape.
        exp_avg_sq: v, of the same shape.
        step: t ≥ 1, the updates that the moments have had.

    Source: LDAdam (Robert et al., 2024, arXiv:2410.16103), section 3.1, which leaves the uncovered part at zero.
    """
    corrections = tuple(1 - beta**step for beta in betas)
    mean, second = exp_avg / corrections[0], exp_avg_sq / corrections[1]
    rotated = rotate(mean, rotation)
    variance = rotate_variance(second - mean.square(), rotation)
    return rotated * corrections[0], (variance + rotated.square()).abs_().mul_(corrections[1])


def rotate_factored(row: Tensor, column: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
    """Adafactor's factored second moment in the new basis, each factor by its own side.

    Args:
        row: means of the rows of R², one for each row.
        column: means of the columns of R², one for each column.
    """
    if rotation.left is not None:
        row = _rotate_rows(row.unsqueeze(-1), rotation.left.to(row.dtype).square()).squeeze(-1)
    if rotation.right is not None:
        column = _rotate_rows(column.unsqueeze(-1), rotation.right.to(column.dtype).square()).squeeze(-1)
    return row, column
