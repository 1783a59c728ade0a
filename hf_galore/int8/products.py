"""What a linear layer computes with a weight in 8 bits, a tile of it at a time: pure functions on tensors.

Forward takes rows of the weight, and the input's gradient columns: each element of a product is summed over all that it
is summed over at once, and is what the whole weight would give.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .format import BLOCK, Int8Blocks, read_blocks

TILE_ELEMENTS = 2**22
"""Of a weight in a tile, at most: 8 MiB in bfloat16. A tile is never more than half of a weight."""
OF_PRODUCTS = 4
"""Tiles' elements in one of a product: a card multiplies faster than a host launches kernels for small ones."""
_ALIGNED = 128


def tiles(size: int, other: int, multiple: int = 1, times: int = 1) -> Iterator[slice]:
    """Slices of one dimension of a weight.

    Args:
        size: of the dimension.
        other: of the other ones together.
        multiple: that a slice's size is one of.
        times: how many of the usual tiles one is as large as.
    """
    step = max(1, _largest(size, other, times) // multiple) * multiple
    for start in range(0, size, step):
        yield slice(start, min(start + step, size))


def _largest(size: int, other: int, times: int) -> int:
    """The most that a slice may have."""
    return min(times * TILE_ELEMENTS // max(1, other), -(-size // 2))


def product_tiles(size: int, other: int, multiple: int = 1) -> Iterator[slice]:
    """Slices as of `tiles`, of a product's columns, that begin where a card's fast kernels take them.

    A product of bfloat16 that writes to an address which is no multiple of 16 bytes cuBLAS leaves to kernels of old:
    with 381 columns at a time, 2^22 elements of a weight of 11008 columns, it took 8 times as long on an H200.

    Args:
        size: of the dimension.
        other: of the other ones together.
        multiple: that a slice's size is one of; a power of 2.
    """
    aligned = min(_ALIGNED, 1 << max(0, _largest(size, other, OF_PRODUCTS).bit_length() - 1))
    return tiles(size, other, max(multiple, aligned), OF_PRODUCTS)


def int8_linear(x: Tensor, weight: Int8Blocks, bias: Tensor | None) -> Tensor:
    """XWᵀ + b.

    Args:
        x: ... × n, in the dtype of the product.
        weight: m × n.
        bias: m, or `None`.
    """
    m, n = weight.codes.shape
    rows, made = rows_of(x, n), x.new_empty((*x.shape[:-1], m))
    out = rows_of(made, m)
    for part in product_tiles(m, n):
        # Without a name: one that holds a tile until the next is there would double what tiles take.
        blocks = Int8Blocks(weight.codes[part], weight.exponents[part])
        if bias is None:
            torch.mm(rows, read_blocks(blocks, x.dtype).mT, out=out[:, part])
        else:
            torch.addmm(bias[part], rows, read_blocks(blocks, x.dtype).mT, out=out[:, part])
    return made


def times_weight(delta: Tensor, weight: Int8Blocks) -> Tensor:
    """δW, the gradient of the input.

    Args:
        delta: ... × m, in the dtype of the product.
        weight: m × n.
    """
    m, n = weight.codes.shape
    rows, made = rows_of(delta, m), delta.new_empty((*delta.shape[:-1], n))
    out = rows_of(made, n)
    for part in product_tiles(n, m, BLOCK):
        blocks = slice(part.start // BLOCK, -(-part.stop // BLOCK))
        tile = Int8Blocks(weight.codes[:, part], weight.exponents[:, blocks])
        torch.mm(rows, read_blocks(tile, delta.dtype), out=out[:, part])
    return made


def rows_of(x: Tensor, size: int) -> Tensor:
    """A tensor as a matrix with rows of a size, which may be 0.

    What is returned is made in its own shape: autograd refuses to change what is a view of what was made here, as a
    model does that adds to the output of a layer in place.
    """
    return x.reshape(math.prod(x.shape[:-1]), size)
