"""Bases in 8 and 4 bits, by bitsandbytes' kernels (`hf_galore.integrations.bitsandbytes`): pure functions on tensors.

=========  ==============================================================  ======================
proj_bits  what is stored                                                  bits an element
=========  ==============================================================  ======================
16         the basis in the weight's dtype                                 that dtype's
8          one of 255 equal steps, one float32 scale for 256 elements      8.125
4          NormalFloat4, two to a byte, one bfloat16 scale for 64 elements 4.25
=========  ==============================================================  ======================

The entries of an orthonormal basis of many rows are nearly normally distributed. NormalFloat4 is made for that;
equal steps come closer to it than bitsandbytes' dynamic 8-bit code, which is made for moments that span many orders.

Sources: Q-GaLore (Zhang et al., 2024, arXiv:2407.08296), section 3.3, for keeping bases in 4 bits; NormalFloat4 from
QLoRA (Dettmers et al., 2023, arXiv:2305.14314), section 3.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..config import ProjBits
from ..integrations import bitsandbytes as kernels

BLOCK_SIZE = {8: 256, 4: 64}  # elements that share a scale
# What bfloat16 rounds off a scale, 1/512 of it at most, is a fiftieth of what 4 bits round off the elements.
ABSMAX_DTYPE = {8: torch.float32, 4: torch.bfloat16}


class QuantizedBasis(NamedTuple):
    """A basis as it is kept: codes and the largest magnitude of each block; for 16 bits the basis itself and `None`."""

    codes: Tensor
    absmax: Tensor | None


def empty_basis(shape: Sequence[int], bits: ProjBits, like: Tensor) -> QuantizedBasis:
    """Room for a basis of `shape` k × r, on the device of `like` and, for 16 bits, in its dtype.

    Raises:
        ImportError: bitsandbytes is not installed, for 8 and 4 bits.
    """
    if bits == 16:
        return QuantizedBasis(like.new_zeros(tuple(shape)), None)
    _require_bitsandbytes()  # fail here, not in the first step
    numel = math.prod(shape)
    codes = tuple(shape) if bits == 8 else (math.ceil(numel / 2), 1)
    absmax = like.new_zeros(math.ceil(numel / BLOCK_SIZE[bits]), dtype=ABSMAX_DTYPE[bits])
    return QuantizedBasis(like.new_zeros(codes, dtype=torch.uint8), absmax)


def quantize_basis(basis: Tensor, bits: ProjBits, dtype: torch.dtype) -> QuantizedBasis:
    """A basis as it is kept.

    Args:
        basis: k × r, float32 or float64.
        bits: 16, 8 or 4.
        dtype: the weight's, for 16 bits.

    Raises:
        ImportError: bitsandbytes is not installed, for 8 and 4 bits.
    """
    if bits == 16:
        return QuantizedBasis(basis.to(dtype), None)
    _require_bitsandbytes()
    basis = basis.to(torch.float32).contiguous()
    if bits == 8:
        kept = kernels.quantize_8bit(basis, _equal_steps(basis.device), BLOCK_SIZE[8])
    else:
        kept = kernels.quantize_4bit(basis, BLOCK_SIZE[4])
    return QuantizedBasis(kept.codes, kept.absmax.to(ABSMAX_DTYPE[bits]))


def dequantize_basis(kept: QuantizedBasis, shape: Sequence[int], bits: ProjBits, dtype: torch.dtype) -> Tensor:
    """The basis, of `shape` k × r in `dtype`; for 16 bits the tensor that is kept, cast if need be."""
    if bits == 16:
        return kept.codes.to(dtype)
    assert kept.absmax is not None
    _require_bitsandbytes()
    quantized = kernels.Quantized(kept.codes, kept.absmax.float())
    direct = dtype if dtype in kernels.DTYPES else torch.float32
    if bits == 8:
        basis = kernels.dequantize_8bit(quantized, _equal_steps(kept.codes.device), BLOCK_SIZE[8], direct)
    else:
        basis = kernels.dequantize_4bit(quantized, BLOCK_SIZE[4], shape, direct)
    return basis.to(dtype)


@functools.cache
def _equal_steps(device: torch.device) -> Tensor:
    """bitsandbytes' table of 255 equal steps from −1 to 1; copied to a device once."""
    table: Tensor = kernels.functional().create_linear_map().to(torch.float32)
    # The one in the middle is 6e-8: columns of zeros have to stay zero, for Adam would blow up what they give.
    return table.masked_fill(table.abs() < 1e-6, 0.0).to(device)


def _require_bitsandbytes() -> None:
    try:
        kernels.functional()
    except ImportError as error:
        raise ImportError(
            "proj_bits=8 and proj_bits=4 need bitsandbytes: pip install bitsandbytes, or set proj_bits=16."
        ) from error
