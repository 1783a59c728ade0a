"""Blockwise 4 and 8 bits by Triton: what `hf_galore.lowrank.blockwise` does in plain torch, each in one kernel.

Fake and meta tensors get what has the right shape and dtype.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from ..lowrank.blockwise import Quantized, nf4
from ..lowrank.nonfinite import has_numbers
from .where import DTYPES, launch

# Elements that one program takes: four warps, eight to a thread.
_SIZE = 1024


def quantize_4bit(values: Tensor, block: int) -> Quantized:
    """NormalFloat4 codes, two to a byte, the first in the upper half; the half after an odd number stands for 0.

    Args:
        values: float32, bfloat16 or float16; made contiguous.
        block: elements that share a scale: 2 to 1,024, a power of two.

    Returns:
        The codes are one column of ⌈elements / 2⌉ bytes, and the scales float32.

    Raises:
        ValueError: The dtype or the block is another.
    """
    _check(values.dtype, block)
    codes = values.new_empty((math.ceil(values.numel() / 2), 1), dtype=torch.uint8)
    absmax = values.new_empty(math.ceil(values.numel() / block), dtype=torch.float32)
    if has_numbers(values):
        tensors = (codes, absmax, values.contiguous(), _nf4(values.device))
        _launch("quantize_4bit", block, values.numel(), tensors, codes.numel())
    return Quantized(codes, absmax)


def dequantize_4bit(kept: Quantized, block: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The tensor of `shape` that NormalFloat4 codes stand for, computed in float32 and rounded to `dtype`.

    Args:
        kept: contiguous codes, and scales in any floating-point dtype.
        block: as in `quantize_4bit`.
        shape: of the result.
        dtype: float32, bfloat16 or float16.

    Raises:
        ValueError: The dtype or the block is another, or codes or scales are too few.
    """
    numel = math.prod(shape)
    _check(dtype, block)
    _check_kept(kept, math.ceil(numel / 2), math.ceil(numel / block))
    values = kept.codes.new_empty(tuple(shape), dtype=dtype)
    if has_numbers(values):
        _launch("dequantize_4bit", block, numel, (values, *kept, _nf4(values.device)), math.ceil(numel / 2))
    return values


def quantize_8bit(values: Tensor, table: Tensor, block: int) -> Quantized:
    """Codes in the shape of `values`: places in a `table` of 256 ascending float32 values from −1 or 0 to 1.

    Args:
        values: float32, bfloat16 or float16; made contiguous.
        table: on the same device.
        block: elements that share a scale: 1 to 1,024, a power of two.

    Raises:
        ValueError: The dtype, the block or the table is another.
    """
    _check(values.dtype, block)
    _check_table(table, values.device)
    codes = torch.empty_like(values, dtype=torch.uint8, memory_format=torch.contiguous_format)
    absmax = values.new_empty(math.ceil(values.numel() / block), dtype=torch.float32)
    if has_numbers(values):
        _launch("quantize_8bit", block, values.numel(), (codes, absmax, values.contiguous(), table))
    return Quantized(codes, absmax)


def dequantize_8bit(kept: Quantized, table: Tensor, block: int, dtype: torch.dtype) -> Tensor:
    """What 8-bit codes stand for, in their shape, computed in float32 and rounded to `dtype`.

    Args:
        kept: contiguous codes, and scales in any floating-point dtype.
        table: as in `quantize_8bit`.
        block: likewise.
        dtype: float32, bfloat16 or float16.

    Raises:
        ValueError: The dtype, the block or the table is another, or scales are too few.
    """
    _check(dtype, block)
    _check_kept(kept, kept.codes.numel(), math.ceil(kept.codes.numel() / block))
    _check_table(table, kept.codes.device)
    values = torch.empty_like(kept.codes, dtype=dtype, memory_format=torch.contiguous_format)
    if has_numbers(values):
        _launch("dequantize_8bit", block, values.numel(), (values, *kept, table))
    return values


def _launch(name: str, block: int, numel: int, tensors: tuple[Tensor, ...], *numbers: int) -> None:
    first, *others = tensors
    launch(name, math.ceil(numel / _SIZE), first, *others, numel, *numbers, block=block, rows=_SIZE // block)


@functools.cache
def _nf4(device: torch.device) -> Tensor:
    """The table of NormalFloat4, copied to a device once: a copy waits for it."""
    with _disable_current_modes(), torch.inference_mode(False):
        return nf4(device)


def _check(dtype: torch.dtype, block: int) -> None:
    if dtype not in DTYPES:
        raise ValueError(f"The values have to be float32, bfloat16 or float16, but are {dtype}.")
    if not 2 <= block <= _SIZE or block & (block - 1):
        raise ValueError(f"A block has to be a power of two from 2 to {_SIZE}, but is {block}.")


def _check_kept(kept: Quantized, num_codes: int, num_scales: int) -> None:
    codes, absmax = kept
    if codes.numel() < num_codes or codes.dtype != torch.uint8 or not codes.is_contiguous():
        raise ValueError(f"The codes have to be {num_codes} contiguous bytes, but are {codes.numel()} {codes.dtype}.")
    if absmax.numel() < num_scales or not absmax.is_floating_point() or not absmax.is_contiguous():
        raise ValueError(
            f"The scales have to be {num_scales} contiguous floating-point numbers, but are {absmax.numel()} "
            f"{absmax.dtype}."
        )
    if absmax.device != codes.device:
        raise ValueError(f"Codes and scales have to be on one device, but are on {codes.device} and {absmax.device}.")


def _check_table(table: Tensor, device: torch.device) -> None:
    if table.numel() != 256 or table.dtype != torch.float32 or table.device != device or not table.is_contiguous():
        raise ValueError(
            f"The table has to be 256 contiguous float32 values on {device}, but is {table.numel()} {table.dtype} on "
            f"{table.device}."
        )
