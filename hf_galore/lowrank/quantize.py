"""How bases are stored: in the weight's dtype, or in 8 and 4 bits. Pure functions on tensors.

=========  ==============================================================  ======================
proj_bits  what is stored                                                  bits an element
=========  ==============================================================  ======================
16         the basis in the weight's dtype                                 that dtype's
8          one of 255 equal steps, one float32 scale for 256 elements      8.125
4          NormalFloat4, two to a byte, one bfloat16 scale for 64 elements 4.25
=========  ==============================================================  ======================

Of a stack of bases (k × m × r) the codes and scales have a dimension k before the others.

8 and 4 bits are computed by kernels, ours or bitsandbytes' (`hf_galore.integrations.bitsandbytes`). A new storage is a
row of `STORAGES`, with a function to quantise and one to dequantise, and its name in `hf_galore.config.ProjBits`.

The entries of an orthonormal basis of many rows are nearly normally distributed. NormalFloat4 is made for that;
equal steps come closer to it than bitsandbytes' dynamic 8-bit code, which is made for moments that span many orders.

Sources: Q-GaLore (Zhang et al., 2024, arXiv:2407.08296), section 3.3, for keeping bases in 4 bits; NormalFloat4 from
QLoRA (Dettmers et al., 2023, arXiv:2305.14314), section 3.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..config import ProjBits
from ..integrations import bitsandbytes as kernels


class QuantizedBasis(NamedTuple):
    """A basis as it is kept: codes and the largest magnitude of each block; for 16 bits the basis itself and `None`."""

    codes: Tensor
    absmax: Tensor | None


class Storage(NamedTuple):
    """How a basis is stored."""

    empty: Callable[[Sequence[int], Tensor], QuantizedBasis]
    """Room for a basis of this shape, k × r, on the device of this tensor and, if unquantised, in its dtype."""
    quantize: Callable[[Tensor, torch.dtype], QuantizedBasis]
    """A float32 or float64 basis as it is kept for a weight of this dtype."""
    dequantize: Callable[[QuantizedBasis, Sequence[int], torch.dtype], Tensor]
    """The basis of this shape that is kept, in this dtype."""


def empty_basis(shape: Sequence[int], bits: ProjBits, like: Tensor) -> QuantizedBasis:
    """Room for a basis of `shape` k × r, on the device of `like` and, for 16 bits, in its dtype.

    Raises:
        ImportError: bitsandbytes is not installed, for 8 and 4 bits.
    """
    return STORAGES[bits].empty(shape, like)


def quantize_basis(basis: Tensor, bits: ProjBits, dtype: torch.dtype) -> QuantizedBasis:
    """A basis as it is kept.

    Args:
        basis: k × r, float32 or float64.
        bits: 16, 8 or 4.
        dtype: the weight's, for 16 bits.

    Raises:
        ImportError: bitsandbytes is not installed, for 8 and 4 bits.
    """
    return STORAGES[bits].quantize(basis, dtype)


def dequantize_basis(kept: QuantizedBasis, shape: Sequence[int], bits: ProjBits, dtype: torch.dtype) -> Tensor:
    """The basis, of `shape` k × r in `dtype`; for 16 bits the tensor that is kept, cast if need be.

    Raises:
        ImportError: bitsandbytes is not installed, for 8 and 4 bits.
    """
    return STORAGES[bits].dequantize(kept, shape, dtype)


def _in_blocks(
    quantize_: Callable[[Tensor, int], kernels.Quantized],
    dequantize_: Callable[[kernels.Quantized, int, Sequence[int], torch.dtype], Tensor],
    *,
    block: int,
    absmax_dtype: torch.dtype,
    codes_shape: Callable[[Sequence[int]], tuple[int, ...]],
) -> Storage:
    """Codes in bytes, with one scale for each block of them.

    Args:
        quantize_: takes a contiguous float32 basis and the block.
        dequantize_: takes what that returned, the block, the basis's shape, and one of `kernels.DTYPES`.
        block: elements that share a scale.
        absmax_dtype: of the scales.
        codes_shape: gives the shape of the codes of a basis of a shape.
    """

    def empty(shape: Sequence[int], like: Tensor) -> QuantizedBasis:
        _require_bitsandbytes()  # fail here, not in the first step
        if len(shape) == 3:
            one = empty(shape[1:], like)
            assert one.absmax is not None
            codes = like.new_zeros((shape[0], _bytes_of_row(shape, block, codes_shape)), dtype=torch.uint8)
            return QuantizedBasis(codes, one.absmax.new_zeros((shape[0], len(one.absmax))))
        absmax = like.new_zeros(math.ceil(math.prod(shape) / block), dtype=absmax_dtype)
        return QuantizedBasis(like.new_zeros(codes_shape(shape), dtype=torch.uint8), absmax)

    def quantize(basis: Tensor, dtype: torch.dtype) -> QuantizedBasis:
        _require_bitsandbytes()
        count = len(basis) if basis.ndim == 3 else 0
        basis = basis.to(torch.float32)
        kept = quantize_((_in_whole_blocks(basis, block) if count else basis).contiguous(), block)
        codes, absmax = kept.codes, kept.absmax.to(absmax_dtype)
        return QuantizedBasis(codes.view(count, -1), absmax.view(count, -1)) if count else QuantizedBasis(codes, absmax)

    def dequantize(kept: QuantizedBasis, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        assert kept.absmax is not None
        _require_bitsandbytes()
        direct = dtype if dtype in kernels.DTYPES else torch.float32
        if len(shape) != 3:
            return dequantize_(kernels.Quantized(kept.codes, kept.absmax), block, shape, direct).to(dtype)
        row = math.ceil(math.prod(shape[1:]) / block) * block
        flat = kernels.Quantized(kept.codes.view(codes_shape((shape[0], row))), kept.absmax.view(-1))
        rows = dequantize_(flat, block, (shape[0], row), direct).to(dtype)
        return rows[:, : math.prod(shape[1:])].view(tuple(shape))

    return Storage(empty, quantize, dequantize)


# Of a stack each basis has blocks of its own, the last of them filled up, so that some can be renewed without the rest.


def _bytes_of_row(shape: Sequence[int], block: int, codes_shape: Callable[[Sequence[int]], tuple[int, ...]]) -> int:
    """The bytes of the codes of one basis of a stack."""
    return math.prod(codes_shape((math.ceil(math.prod(shape[1:]) / block), block)))


def _in_whole_blocks(bases: Tensor, block: int) -> Tensor:
    """A stack of bases, one in each row, filled up to whole blocks with zeros."""
    rows = bases.flatten(1)
    return torch.nn.functional.pad(rows, (0, -rows.shape[1] % block))


def _quantize_8bit(basis: Tensor, block: int) -> kernels.Quantized:
    return kernels.quantize_8bit(basis, _equal_steps(basis.device), block)


def _dequantize_8bit(kept: kernels.Quantized, block: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return kernels.dequantize_8bit(kept, _equal_steps(kept.codes.device), block, dtype)


STORAGES: dict[ProjBits, Storage] = {
    16: Storage(  # the basis itself
        empty=lambda shape, like: QuantizedBasis(like.new_zeros(tuple(shape)), None),
        quantize=lambda basis, dtype: QuantizedBasis(basis.to(dtype), None),
        dequantize=lambda kept, shape, dtype: kept.codes.to(dtype),
    ),
    8: _in_blocks(_quantize_8bit, _dequantize_8bit, block=256, absmax_dtype=torch.float32, codes_shape=tuple),
    4: _in_blocks(
        kernels.quantize_4bit,
        kernels.dequantize_4bit,
        block=64,
        # What bfloat16 rounds off a scale, 1/512 of it at most, is a fiftieth of what 4 bits round off the elements.
        absmax_dtype=torch.bfloat16,
        codes_shape=lambda shape: (math.ceil(math.prod(shape) / 2), 1),  # two to a byte
    ),
}


@functools.cache
def _equal_steps(device: torch.device) -> Tensor:
    """bitsandbytes' table of 255 equal steps from −1 to 1; copied to a device once."""
    table = kernels.linear_table()
    # The one in the middle is 6e-8: columns of zeros have to stay zero, for Adam would blow up what they give.
    return table.masked_fill(table.abs() < 1e-6, 0.0).to(device)


def _require_bitsandbytes() -> None:
    try:
        kernels.functional()
    except ImportError as error:
        raise ImportError(
            "proj_bits=8 and proj_bits=4 need bitsandbytes: pip install bitsandbytes, or set proj_bits=16."
        ) from error
