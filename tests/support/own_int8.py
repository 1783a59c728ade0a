"""What tests of our kernels for weights in 8 bits share: weights, and what plain torch reads of them."""

from __future__ import annotations

from unittest import mock

import torch
from torch import Tensor

from hf_galore.int8 import BLOCK, Int8Blocks, read_blocks, to_blocks
from hf_galore.kernels import where

# Whole blocks and others, several programs, less than a block, one element, none.
SHAPES = ((40, 96), (33, 70), (33, 7), (2, 1), (1, 2), (1, 1025), (0, 40))


def weights(shape: tuple[int, int], seed: int = 0) -> Int8Blocks:
    """Of usual sizes, and rows that differ in it; no two blocks need have the same exponent."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.exp2(torch.randint(-7, -2, (shape[0], 1), generator=generator).float())
    return to_blocks(sizes * torch.randn(shape, generator=generator))


def copy_of(blocks: Int8Blocks) -> Int8Blocks:
    """The same, apart."""
    return Int8Blocks(blocks.codes.clone(), blocks.exponents.clone())


def plain_read(blocks: Int8Blocks, dtype: torch.dtype) -> Tensor:
    """What plain torch reads, wherever the kernels serve."""
    with mock.patch.object(where, "_look", return_value=False):
        return read_blocks(blocks, dtype)


def of_each(exponents: Tensor, columns: int) -> Tensor:
    """The exponent of each element, float64."""
    return exponents.double().repeat_interleave(BLOCK, dim=1)[:, :columns]


def step_of(blocks: Int8Blocks) -> Tensor:
    """The distance of neighbours, of each element, float64."""
    return torch.exp2(of_each(blocks.exponents, blocks.codes.shape[1]) - 127)
