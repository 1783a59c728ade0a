"""Blockwise 4 and 8 bits and AdamW by the best kernel at hand: ours, bitsandbytes', or plain torch.

Blockwise 4 and 8 bits go to our Triton kernels (`hf_galore.kernels`) where they serve, on NVIDIA's cards; else to
bitsandbytes. A kernel that is wrong or fails is found out on its first use (`bitsandbytes_checks`), and the next takes
over; plain torch (`hf_galore.lowrank.blockwise`) is the last. `dequantize_4bit` of bitsandbytes 0.50.2 is wrong on CPUs
with AVX-512, for rows whose length is a multiple of 16 but not of 64. (Given one flat row it is right: it is called so
here.)

`adam_8bit_` and `adam_32bit_` are bitsandbytes' or plain torch, which know no update that is skipped. `fused` says
whether one of our kernels for that is to be called instead.

Fake and meta tensors have no numbers to check, and always go to a kernel: a plan counts what a training takes where the
kernels are right. (Plain torch takes a few temporaries of the size of one tensor more.)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..kernels import blockwise as own
from ..kernels import where
from ..lowrank.blockwise import (
    MOMENT_BLOCK,
    NF4,
    AdamStep,
    Moments8bit,
    Quantized,
    plain_adam_,
    plain_adam_8bit_,
    plain_dequantize_4bit,
    plain_dequantize_8bit,
    plain_quantize_4bit,
    plain_quantize_8bit,
)
from . import bitsandbytes_calls as calls
from . import bitsandbytes_checks as checks
from .bitsandbytes_calls import dynamic_tables, functional, linear_table

__all__ = [
    "DTYPES",
    "MOMENT_BLOCK",
    "NF4",
    "AdamStep",
    "Moments8bit",
    "Quantized",
    "adam_8bit_",
    "adam_32bit_",
    "dequantize_4bit",
    "dequantize_8bit",
    "dynamic_tables",
    "functional",
    "fused",
    "linear_table",
    "plain_adam_",
    "plain_adam_8bit_",
    "plain_dequantize_4bit",
    "plain_dequantize_8bit",
    "plain_quantize_4bit",
    "plain_quantize_8bit",
    "quantize_4bit",
    "quantize_8bit",
]

# What the kernels compute in besides; anything else is cast.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def fused(name: str, tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether to use a kernel of `hf_galore.kernels`: it serves where `tensor` is, knows `dtype`, and is right there.

    Args:
        name: of its function there.
        tensor: any that it works on.
        dtype: of the gradient for a direction, of the weight for an update, of what is quantised or read.
    """
    return where.serves(tensor) and dtype in where.DTYPES and checks.own_is_right(name, tensor, dtype)


def quantize_4bit(values: Tensor, block: int) -> Quantized:
    """NormalFloat4 codes of float32 `values`, two to a byte: the first of each two in the upper half.

    Args:
        values: contiguous.
        block: elements that share a scale.

    Returns:
        The codes are one column of bytes, ⌈elements / 2⌉ of them.
    """
    if fused("quantize_4bit", values, values.dtype):
        return own.quantize_4bit(values, block)
    use = calls.quantize_4bit if checks.is_right("quantize_4bit", values, values.dtype) else plain_quantize_4bit
    return use(values, block)


def dequantize_4bit(kept: Quantized, block: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The tensor of `shape` that NormalFloat4 codes stand for, in one of `DTYPES`.

    Args:
        kept: its scales in any floating-point dtype.
        block: elements that share a scale.
        shape: of the result.
        dtype: likewise.
    """
    if fused("dequantize_4bit", kept.codes, dtype):
        return own.dequantize_4bit(kept, block, shape, dtype)
    use = calls.dequantize_4bit if checks.is_right("dequantize_4bit", kept.codes, dtype) else plain_dequantize_4bit
    return use(kept, block, shape, dtype)


def quantize_8bit(values: Tensor, table: Tensor, block: int) -> Quantized:
    """Codes of float32 `values`, in their shape: places in a `table` of 256 ascending values from −1 or 0 to 1.

    Args:
        values: contiguous.
        table: on their device.
        block: elements that share a scale.
    """
    if fused("quantize_8bit", values, values.dtype):
        return own.quantize_8bit(values, table, block)
    use = calls.quantize_8bit if checks.is_right("quantize_blockwise", values, values.dtype) else plain_quantize_8bit
    return use(values, table, block)


def dequantize_8bit(kept: Quantized, table: Tensor, block: int, dtype: torch.dtype) -> Tensor:
    """What 8-bit codes stand for, in their shape and in one of `DTYPES`; the scales in any floating-point dtype."""
    if fused("dequantize_8bit", kept.codes, dtype):
        return own.dequantize_8bit(kept, table, block, dtype)
    use = calls.dequantize_8bit if checks.is_right("dequantize_blockwise", kept.codes, dtype) else plain_dequantize_8bit
    return use(kept, table, block, dtype)


def adam_8bit_(weight: Tensor, gradient: Tensor, moments: Moments8bit, now: AdamStep) -> None:
    """One step of AdamW in place, with moments in 8 bits.

    Args:
        weight: contiguous, in one of `DTYPES`.
        gradient: contiguous, in the same.
    """
    right = checks.is_right("optimizer_update_8bit_blockwise", weight, weight.dtype)
    (calls.adam_8bit_ if right else plain_adam_8bit_)(weight, gradient, moments, now)


def adam_32bit_(weight: Tensor, gradient: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, now: AdamStep) -> None:
    """One step of AdamW in place, with float32 moments; else as `adam_8bit_`."""
    right = checks.is_right("optimizer_update_32bit", weight, weight.dtype)
    (calls.adam_32bit_ if right else plain_adam_)(weight, gradient, exp_avg, exp_avg_sq, now)
