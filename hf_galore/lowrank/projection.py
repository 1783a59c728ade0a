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

import functools
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..config import ProjType
from .ranks import Ranks

Side = Literal["left", "right", "full"]


class Bases(NamedTuple):
    """The basis on each side that is projected: orthonormal columns, `None` on a side that is not."""

    left: Tensor | None
    right: Tensor | None


class FactoredGradient(NamedTuple):
    """The gradient G = δᵀX of a linear layer's weight, m × n, as its two factors: G itself is never computed."""

    output_gradient: Tensor  # δ, T × m
    inputs: Tensor  # X, T × n

    @property
    def shape(self) -> tuple[int, int]:
        """m × n."""
        return self.output_gradient.shape[1], self.inputs.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of both factors."""
        return self.output_gradient.dtype

    @property
    def device(self) -> torch.device:
        """The device of both factors."""
        return self.output_gradient.device


class ShardedGradient(NamedTuple):
    """A gradient G, m × n, of which each process has some rows or columns; products with it all make together.

    What comes of it is whole, and the same everywhere: only narrow matrices are gathered and summed, never G.
    """

    part: Tensor  # what this process has: m' × n, or m × n'
    shape: tuple[int, int]
    dim: int  # which of its dimensions is divided
    ranks: Ranks

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of all parts."""
        return self.part.dtype

    @property
    def device(self) -> torch.device:
        """The device of this process's part."""
        return self.part.device


class SummedGradient(NamedTuple):
    """The mean over processes of gradients in factors, of which each process has its own; products are of the mean."""

    factors: FactoredGradient
    tokens: int  # rows of the factors, of all processes
    ranks: Ranks

    @property
    def shape(self) -> tuple[int, int]:
        """m × n."""
        return self.factors.shape

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the factors."""
        return self.factors.dtype

    @property
    def device(self) -> torch.device:
        """The device of this process's factors."""
        return self.factors.device


Gradient = Tensor | FactoredGradient | ShardedGradient | SummedGradient


def transposed(gradient: Gradient) -> Gradient:
    """Gᵀ, n × m, without copying anything."""
    if isinstance(gradient, FactoredGradient):
        return FactoredGradient(gradient.inputs, gradient.output_gradient)
    if isinstance(gradient, ShardedGradient):
        part, (m, n), dim, ranks = gradient
        return ShardedGradient(part.mT, (n, m), 1 - dim, ranks)
    if isinstance(gradient, SummedGradient):
        return gradient._replace(factors=FactoredGradient(gradient.factors.inputs, gradient.factors.output_gradient))
    return gradient.mT


# Where a product is computed in another dtype than the gradient's, so many elements of it are cast at a time: float32
# copies of a whole bfloat16 gradient, or of its factors, would take more than all else in a refresh.
CAST_ELEMENTS = 2**24  # 64 MiB in float32


def times(gradient: Gradient, matrix: Tensor) -> Tensor:
    """GM for an n × k matrix M, computed in the dtype of M."""
    if isinstance(gradient, FactoredGradient):
        return _transposed_product(gradient.output_gradient, gradient.inputs, matrix)
    if isinstance(gradient, SummedGradient):
        return gradient.ranks.sum(times(gradient.factors, matrix)).div_(gradient.ranks.size)
    if isinstance(gradient, ShardedGradient):
        part, (m, n), dim, ranks = gradient
        return ranks.gather(times(part, matrix), m) if dim == 0 else ranks.sum(times(part, matrix[ranks.own(n)]))
    if gradient.dtype == matrix.dtype:
        return gradient @ matrix
    product = matrix.new_empty(len(gradient), matrix.shape[1])
    for rows in _parts(gradient):
        torch.mm(gradient[rows].to(matrix.dtype), matrix, out=product[rows])
    return product


def transposed_times(gradient: Gradient, matrix: Tensor) -> Tensor:
    """GᵀM for an m × k matrix M, computed in the dtype of M."""
    if isinstance(gradient, FactoredGradient):
        return _transposed_product(gradient.inputs, gradient.output_gradient, matrix)
    if isinstance(gradient, (ShardedGradient, SummedGradient)):
        return times(transposed(gradient), matrix)
    if gradient.dtype == matrix.dtype:
        return gradient.mT @ matrix
    product = matrix.new_zeros(gradient.shape[1], matrix.shape[1])
    for rows in _parts(gradient):
        product.addmm_(gradient[rows].to(matrix.dtype).mT, matrix[rows])
    return product


def _transposed_product(a: Tensor, b: Tensor, matrix: Tensor) -> Tensor:
    """Aᵀ(BM) for A and B of T rows and one dtype."""
    if a.dtype == matrix.dtype:
        return a.mT @ (b @ matrix)
    product = matrix.new_zeros(a.shape[1], matrix.shape[1])
    for rows in _parts(a, b):
        inner = b[rows].to(matrix.dtype) @ matrix
        product.addmm_(a[rows].to(matrix.dtype).mT, inner)
    return product


def _parts(*tensors: Tensor) -> Iterator[slice]:
    """The rows of the tensors, as many at a time as may be cast."""
    size = max(1, CAST_ELEMENTS // max(1, *(tensor.shape[1] for tensor in tensors)))
    for start in range(0, len(tensors[0]), size):
        yield slice(start, start + size)


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
    """Whether matrices of `shape` (m × n, or a stack k × m × n) get smaller moments at `rank`: below their smaller side.

    The shape is that of `hf_galore.lowrank.matrices.matrix_shape`.
    """
    return len(shape) in (2, 3) and min(shape[-2:]) > rank


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


@functools.cache  # torch dispatches the question as it does an operation
def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """The dtype to compute in with tensors of `dtype`: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def norm_of(tensor: Tensor) -> Tensor:
    """The Frobenius norm, 0-dimensional and of at least float32."""
    norm: Tensor = torch.linalg.vector_norm(tensor, dtype=at_least_float32(tensor.dtype))
    return norm


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
    size: Tensor = torch.linalg.vector_norm(basis, dim=0, dtype=at_least_float32(basis.dtype))
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
        return out.addmm_(factor, other)
    return out.add_(factor @ other)


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
        weight.addmm_(direction, bases.right.mT, beta=decay, alpha=alpha)
    elif bases.right is None:
        weight.addmm_(bases.left, direction, beta=decay, alpha=alpha)
    else:
        weight.addmm_(bases.left @ direction, bases.right.mT, beta=decay, alpha=alpha)


def projected_back(direction: Tensor, bases: Bases, rows: slice) -> Tensor:
    """The rows of back(N) that a slice names, in the bases' dtype."""
    left, right = bases
    if left is None:
        assert right is not None
        return direction[rows].to(right.dtype) @ right.mT
    update = left[rows] @ direction.to(left.dtype)
    return update if right is None else update @ right.mT
