"""MXINT8: whole numbers of 8 bits, and a power of 2 for each 32 of a row. Pure functions on tensors.

A value is code · 2^(exponent − 127), with codes from −127 to 127. That is 8.25 bits an element. The exponent of a block
is the smallest that its largest element allows, which the values themselves say: so blocks have no memory, and whatever
has the values has the blocks.

Powers of 2 instead of any scales, because then

- a value is a bfloat16 without rounding: 7 bits and a sign. A checkpoint in bfloat16 is exact, and a run that resumes
  from it goes on as if it had not stopped;
- an element that an update leaves alone keeps its value. With scales that follow the largest element all others of
  its block would be rounded anew at every step, at random;
- a block of 32 costs a byte, and its largest element is nearer to the others than that of 256 would be, which makes
  good what powers of 2 lose.

Source: OCP Microscaling Formats (MX) Specification v1.0 (2023), sections 5.3 and 6: MXINT8, blocks of 32, scales of
E8M0. Its code −128 is not used, as there. Its elements are code / 64 and not whole numbers, so that its scales are 6
greater than the exponents here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..integrations import bitsandbytes as kernels
from ..kernels import int8 as own
from ..lowrank.projection import at_least_float32

BLOCK = 32
LARGEST = 127
_BIAS = 127
# Of a float32: where its exponent begins, its mantissa, and the largest mantissa m with 2^k · m ≤ 127 · 2^(k − 6).
_EXPONENT_AT, _MANTISSA, _MANTISSA_OF_LARGEST = 23, 0x7FFFFF, 0x7E0000
NOT_FINITE = 255
"""The exponent of a block that is NaN."""
# Below it a power of 2 is no normal float32; above it 127 of them are none, so that larger values become that.
_LEAST, _MOST = 1, 248


class Int8Blocks(NamedTuple):
    """Values in 8 bits."""

    codes: Tensor
    """int8, of the values' shape."""
    exponents: Tensor
    """uint8, one for each 32 codes in a row: 127 stands for 1, 128 for 2; 255 of a block that is NaN."""


def exponents_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of the exponents of values of a shape."""
    return *shape[:-1], math.ceil(shape[-1] / BLOCK)


def empty_blocks(shape: Sequence[int], device: torch.device | str | None = None) -> Int8Blocks:
    """Zeros of a shape."""
    return Int8Blocks(
        torch.zeros(tuple(shape), dtype=torch.int8, device=device),
        torch.full(exponents_shape(shape), _LEAST, dtype=torch.uint8, device=device),
    )


def read_blocks(blocks: Int8Blocks, dtype: torch.dtype) -> Tensor:
    """The values in a dtype: exact in float32, float64 and bfloat16; a new tensor, contiguous."""
    codes, exponents = blocks
    if kernels.fused("read_int8", codes, dtype):
        return own.read_int8(codes, exponents, dtype)
    size = codes.shape[-1]
    # The bits of a power of 2 in float32 are its exponent's. Those of 255 are infinity's, which times 0 is NaN.
    factors = (exponents.to(torch.int32) << _EXPONENT_AT).view(torch.float32)
    exact = torch.float32 if dtype == torch.float16 else dtype
    values = _by_block(codes.to(exact))
    values = values.mul_(factors.to(exact).unsqueeze(-1)).flatten(-2)
    return (values if values.shape[-1] == size else values[..., :size].contiguous()).to(dtype)


def write_blocks_(blocks: Int8Blocks, values: Tensor, generator: torch.Generator | None = None) -> None:
    """Set values, each rounded to the nearest that its block has, or to one of the two beside it.

    A block with a value that is not finite becomes NaN. Values beyond ±127 · 2^121 become that: float32 has 0.4 % more.

    Args:
        blocks: whose codes and exponents are set.
        values: of their shape, in any floating-point dtype; those of float32 and float64 are used up.
        generator: rounds up or down at random, so that the mean is the value. `None`: to the nearest.
    """
    by_block = _by_block(values.to(at_least_float32(values.dtype)))
    largest = torch.linalg.vector_norm(by_block, math.inf, dim=-1).to(torch.float32)
    exponents = _exponents_for(largest)
    inverse = ((2 * _BIAS - exponents) << _EXPONENT_AT).view(torch.float32)
    scaled = by_block.mul_(inverse.to(by_block.dtype).unsqueeze(-1))
    if generator is None:
        scaled.round_()
    else:
        noise = torch.rand(scaled.shape, dtype=scaled.dtype, device=scaled.device, generator=generator)
        # Not the floor of their sum, which is rounded: at random a whole number would become the next now and then.
        low = scaled.floor()
        scaled = low.add_(noise.lt_(scaled.sub_(low)))
    # Rounded down the largest may have become what the next smaller exponent has too: then that is the block's.
    halved = (torch.linalg.vector_norm(scaled, math.inf, dim=-1) <= LARGEST // 2) & (exponents > _LEAST)
    scaled.mul_(1 + halved.unsqueeze(-1).to(scaled.dtype))
    exponents = exponents - halved.to(exponents.dtype)
    finite = largest.isfinite()
    blocks.exponents.copy_(exponents.masked_fill_(~finite, NOT_FINITE))
    scaled.masked_fill_(~finite.unsqueeze(-1), 0.0).clamp_(-LARGEST, LARGEST)
    blocks.codes.copy_(scaled.flatten(-2)[..., : values.shape[-1]])


def to_blocks(values: Tensor, generator: torch.Generator | None = None) -> Int8Blocks:
    """Values in 8 bits, as `write_blocks_` rounds them."""
    blocks = empty_blocks(values.shape, values.device)
    write_blocks_(blocks, values.clone(), generator)
    return blocks


def _exponents_for(largest: Tensor) -> Tensor:
    """The smallest exponents with which blocks of these largest magnitudes have codes, int32."""
    bits = largest.view(torch.int32)
    above = ((bits & _MANTISSA) > _MANTISSA_OF_LARGEST).to(torch.int32)
    # 127 is 2^6 times 1.984375.
    return ((bits >> _EXPONENT_AT) - 6 + above).clamp_(_LEAST, _MOST)


def _by_block(values: Tensor) -> Tensor:
    """Rows by blocks, the last one of each filled up with zeros."""
    missing = -values.shape[-1] % BLOCK
    by_block: Tensor = (pad(values, (0, missing)) if missing else values).unflatten(-1, (-1, BLOCK))
    return by_block
