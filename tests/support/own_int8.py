"""What tests of our kernels for weights in 8 bits share: weights, and what plain torch reads of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar
from unittest import mock

import torch
from torch import Tensor, nn

from hf_galore.int8 import BLOCK, Int8Blocks, Int8Weight, read_blocks, to_blocks
from hf_galore.kernels import where

Module = TypeVar("Module", bound=nn.Module)

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


def in_8_bits(model: Module) -> Module:
    """The model, with weights in 8 bits in its linear layers, but for an output head."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and "head" not in name:
            module.weight = nn.Parameter(Int8Weight.from_float(module.weight.detach()))
    return model


def noise_of(seed: int, rows: Iterable[int], columns: int) -> Tensor:
    """What Philox 4 × 32 of ten rounds gives, 24 bits of it, for elements in rows of a matrix: from 0 to below 1.

    Source: Random123 (Salmon et al., 2011), `philox.h`.
    """
    return torch.tensor([[_noise(seed, row, column) for column in range(columns)] for row in rows])


def _noise(seed: int, row: int, column: int) -> float:
    low = 2**32 - 1
    counter, keys = [column // 4, row, 0, 0], [seed & low, seed >> 32]
    for _ in range(10):
        first, second = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [
            (second >> 32) ^ counter[1] ^ keys[0],
            second & low,
            (first >> 32) ^ counter[3] ^ keys[1],
            first & low,
        ]
        keys = [(keys[0] + 0x9E3779B9) & low, (keys[1] + 0xBB67AE85) & low]
    return float(counter[column % 4] >> 8) / 2**24
