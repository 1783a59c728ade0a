"""Gradients in the forms in which they come, and products of them with narrow matrices: all that a refresh needs.

A gradient G, m × n, may be there as it is, in factors, or divided among processes; or that of a stack of k matrices,
k × m × n, whose products are k products. Pure functions on tensors.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .grouped import GroupedGradient
from .ranks import Ranks

__all__ = [
    "FactoredGradient",
    "Gradient",
    "GroupedGradient",
    "ShardedGradient",
    "SummedGradient",
    "times",
    "transposed",
    "transposed_times",
]


class FactoredGradient(NamedTuple):
    """The gradient G = δᵀX of a linear layer's weight, m × n, as its two factors: G itself is never computed.

    Of a stack of k weights, each of which has T rows, both factors have a dimension k before the others.
    """

    output_gradient: Tensor  # δ, T × m
    inputs: Tensor  # X, T × n

    @property
    def shape(self) -> tuple[int, ...]:
        """m × n, or k × m × n."""
        return *self.output_gradient.shape[:-2], self.output_gradient.shape[-1], self.inputs.shape[-1]

    def whole(self) -> Tensor:
        """G itself."""
        return self.output_gradient.mT @ self.inputs

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
    def shape(self) -> tuple[int, ...]:
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


Gradient = Tensor | FactoredGradient | GroupedGradient | ShardedGradient | SummedGradient


def transposed(gradient: Gradient) -> Gradient:
    """Gᵀ, n × m, without copying anything."""
    if isinstance(gradient, FactoredGradient):
        return FactoredGradient(gradient.inputs, gradient.output_gradient)
    if isinstance(gradient, GroupedGradient):
        return gradient.transposed()
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
    if isinstance(gradient, GroupedGradient):
        return gradient.times(matrix)
    if isinstance(gradient, SummedGradient):
        return gradient.ranks.sum(times(gradient.factors, matrix)).div_(gradient.ranks.size)
    if isinstance(gradient, ShardedGradient):
        part, (m, n), dim, ranks = gradient
        return ranks.gather(times(part, matrix), m) if dim == 0 else ranks.sum(times(part, matrix[ranks.own(n)]))
    if gradient.dtype == matrix.dtype:
        return gradient @ matrix
    if gradient.ndim == 3:
        return torch.stack([times(one, _of(matrix, index)) for index, one in enumerate(gradient)])
    product = matrix.new_empty(len(gradient), matrix.shape[1])
    for rows in _parts(gradient):
        torch.mm(gradient[rows].to(matrix.dtype), matrix, out=product[rows])
    return product


def _of(matrices: Tensor, index: int) -> Tensor:
    """The matrix for one of a stack: of several its own, of one that one."""
    return matrices[index] if matrices.ndim == 3 else matrices


def transposed_times(gradient: Gradient, matrix: Tensor) -> Tensor:
    """GᵀM for an m × k matrix M, computed in the dtype of M."""
    if isinstance(gradient, FactoredGradient):
        return _transposed_product(gradient.inputs, gradient.output_gradient, matrix)
    if isinstance(gradient, (GroupedGradient, ShardedGradient, SummedGradient)):
        return times(transposed(gradient), matrix)
    if gradient.dtype == matrix.dtype:
        return gradient.mT @ matrix
    if gradient.ndim == 3:
        return torch.stack([transposed_times(one, _of(matrix, index)) for index, one in enumerate(gradient)])
    product = matrix.new_zeros(gradient.shape[1], matrix.shape[1])
    for rows in _parts(gradient):
        product.addmm_(gradient[rows].to(matrix.dtype).mT, matrix[rows])
    return product


def _transposed_product(a: Tensor, b: Tensor, matrix: Tensor) -> Tensor:
    """Aᵀ(BM) for A and B of T rows and one dtype."""
    if a.dtype == matrix.dtype:
        return a.mT @ (b @ matrix)
    if a.ndim == 3:
        pairs = enumerate(zip(a, b, strict=True))
        return torch.stack([_transposed_product(one, other, _of(matrix, index)) for index, (one, other) in pairs])
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
