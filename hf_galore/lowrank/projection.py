"""Projecting a gradient to low rank and an update back: pure functions on tensors.

Shapes, for a weight of m × n and rank r:

======  ==========  ===========  =============
side    left basis  right basis  low-rank grad
======  ==========  ===========  =============
left    m × r       none         r × n
right   none        n × r        m × r
full    m × r       n × r        r × r
======  ==========  ===========  =============

All of it holds for a stack of k matrices too, k × m × n: of each there are its own bases, in one more dimension before
the others, and what is a number for a matrix is k numbers for a stack.

Source: GaLore (Zhao et al., 2024, arXiv:2403.03507), section 4 and algorithm 2.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..config import ProjType
from .products import FactoredGradient, Gradient, GroupedGradient, ShardedGradient, SummedGradient

Side = Literal["left", "right", "full"]


class Bases(NamedTuple):
    """The basis on each side that is projected: orthonormal columns, `None` on a side that is not."""

    left: Tensor | None
    right: Tensor | None


def with_columns(bases: Bases, others: Bases) -> Bases:
    """The bases, with other columns beside those of each."""
    pairs = zip(bases, others, strict=True)
    return Bases(*(None if p is None or q is None else torch.cat([p, q], dim=-1) for p, q in pairs))


class BasisShapes(NamedTuple):
    """The shapes of a target's bases; `None` on a side that is not projected."""

    left: tuple[int, ...] | None
    right: tuple[int, ...] | None


def side_of(shape: Sequence[int], proj_type: ProjType) -> Side:
    """The side that `proj_type` projects for weights of `shape` m × n, or k × m × n.

    `std` projects the smaller side (right where m ≥ n, else left), `reverse_std` the larger one.
    """
    m, n = shape[-2:]
    if proj_type == "std":
        return "right" if m >= n else "left"
    if proj_type == "reverse_std":
        return "left" if m >= n else "right"
    return proj_type


def is_projectable(shape: Sequence[int], rank: int) -> bool:
    """Whether matrices of `shape` (m × n, or k × m × n) get smaller moments at `rank`: below their smaller side.

    The shape is that of `hf_galore.lowrank.matrices.matrix_shape`.
    """
    return len(shape) in (2, 3) and min(shape[-2:]) > rank


def basis_shapes(shape: Sequence[int], side: Side, rank: int) -> BasisShapes:
    """The shapes of the bases for weights of `shape` m × n, or k × m × n."""
    *stack, m, n = shape
    return BasisShapes(
        left=(*stack, m, rank) if side != "right" else None,
        right=(*stack, n, rank) if side != "left" else None,
    )


def low_rank_shape(shape: Sequence[int], side: Side, rank: int) -> tuple[int, ...]:
    """The shape of the low-rank gradient, and so of its moments, for weights of `shape` m × n, or k × m × n."""
    *stack, m, n = shape
    return (*stack, rank if side != "right" else m, rank if side != "left" else n)


@functools.cache  # torch dispatches the question as it does an operation
def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """The dtype to compute in with tensors of `dtype`: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def norm_of(tensor: Tensor) -> Tensor:
    """The Frobenius norm, 0-dimensional and of at least float32."""
    norm: Tensor = torch.linalg.vector_norm(tensor, dtype=at_least_float32(tensor.dtype))
    return norm


def norm_of_each(matrices: Tensor) -> Tensor:
    """The Frobenius norm of a matrix, 0-dimensional, or of each of a stack of k, k numbers; of at least float32."""
    if matrices.ndim == 2:
        return norm_of(matrices)
    norms: Tensor = torch.linalg.vector_norm(matrices, dim=(-2, -1), dtype=at_least_float32(matrices.dtype))
    return norms


def for_each(numbers: Tensor) -> Tensor:
    """A number, or k of them, in the shape that multiplies a matrix, or each of k."""
    return numbers[..., None, None]


def norms_of(tensors: Sequence[Tensor]) -> list[Tensor]:
    """What `norm_of` gives of each tensor, in few kernels for all of them."""
    alike: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for index, tensor in enumerate(tensors):
        alike.setdefault((tensor.device, tensor.dtype), []).append(index)
    norms: dict[int, Tensor] = {}
    for (_, dtype), indices in alike.items():
        found = torch._foreach_norm([tensors[index] for index in indices], dtype=at_least_float32(dtype))
        norms.update(zip(indices, found, strict=True))
    return [norms[index] for index in range(len(tensors))]


def nonzero_columns(basis: Tensor) -> Tensor:
    """Which columns of a basis stand for a direction, r booleans: the others are zero (see `bases_of_lower_rank`)."""
    size: Tensor = torch.linalg.vector_norm(basis, dim=-2, dtype=at_least_float32(basis.dtype))
    return size > 0.5


def project(gradient: Gradient, bases: Bases, *, out: Tensor | None = None) -> Tensor:
    """R = PᵀG, GQ or PᵀGQ: the low-rank gradient, in the gradient's dtype.

    From factors G = δᵀX it is (δP)ᵀX, δᵀ(XQ) or (δP)ᵀ(XQ): Tr(m + n) multiply-adds instead of the Tmn of G and the
    rmn of projecting it, and no m × n tensor ever exists. (GaLore is cheaper than AdamW for r < mn/(m + n).)

    Args:
        gradient: G, or its factors; of a sharded one a process projects what it has (`hf_galore.optim.sharded`).
        bases: cast to the gradient's dtype for the products.
        out: a tensor of R's shape to add R to; returned.
    """
    left, right = bases
    assert not isinstance(gradient, (ShardedGradient, SummedGradient))
    if isinstance(gradient, GroupedGradient):
        low_rank = gradient.projected(left, right)
        return low_rank if out is None else out.add_(low_rank)
    if isinstance(gradient, FactoredGradient):
        factor = gradient.output_gradient
        factor = factor if left is None else factor @ left.to(factor.dtype)
        other = gradient.inputs if right is None else gradient.inputs @ right.to(factor.dtype)
        factor = factor.mT
    else:
        factor = gradient if left is None else left.mT.to(gradient.dtype) @ gradient
        if right is None:
            return factor if out is None else out.add_(factor)
        other = right.to(gradient.dtype)
    if out is None:
        return factor @ other
    if out.dtype == factor.dtype:
        return _add_product_(out, factor, other)
    return out.add_(factor @ other)


def _add_product_(out: Tensor, a: Tensor, b: Tensor, *, beta: float = 1.0, alpha: float = 1.0) -> Tensor:
    """beta·out + alpha·AB in place, of matrices or of each of a stack."""
    return (out.addmm_ if out.ndim == 2 else out.baddbmm_)(a, b, beta=beta, alpha=alpha)


def add_projected_back_(weight: Tensor, direction: Tensor, bases: Bases, alpha: float, *, decay: float = 1.0) -> None:
    """W ← decay·W + alpha·back(N) in place, with back(N) = PN, NQᵀ or PNQᵀ, rounded once.

    One fused matrix product: neither the full-rank update nor a copy of the weight exists. A separate multiplication by
    the decay would be lost in bfloat16, where 1 − 1e-3 is 1.

    Args:
        weight: m × n.
        direction: N, of the shape of the low-rank gradient, in any floating-point dtype.
        bases: the bases that the gradient was projected with, in the weight's dtype.
        alpha: −η·scale.
        decay: 1 − ηλ.
    """
    direction = direction.to(weight.dtype)
    if bases.left is None:
        assert bases.right is not None
        _add_product_(weight, direction, bases.right.mT, beta=decay, alpha=alpha)
    elif bases.right is None:
        _add_product_(weight, bases.left, direction, beta=decay, alpha=alpha)
    else:
        _add_product_(weight, bases.left @ direction, bases.right.mT, beta=decay, alpha=alpha)


def projected_back(direction: Tensor, bases: Bases, rows: slice) -> Tensor:
    """The rows of back(N) that a slice names, in the bases' dtype; of a stack the matrices."""
    left, right = bases
    if direction.ndim == 3:
        left, right = (basis if basis is None else basis[rows] for basis in bases)
        direction, rows = direction[rows], slice(None)
    if left is None:
        assert right is not None
        return direction[rows].to(right.dtype) @ right.mT
    update = left[rows] @ direction.to(left.dtype)
    return update if right is None else update @ right.mT
