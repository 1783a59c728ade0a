"""Weights in MXINT8 by Triton: what `hf_galore.int8.format` does in plain torch, each in one kernel.

No float copy is made but what is asked for: an update reads codes, decays, adds, rounds and writes codes, in registers.
Fake and meta tensors get what has the right shape and dtype, and are left alone.

Sources: OCP Microscaling Formats (MX) Specification v1.0 (2023), section 6. Random numbers are Philox' (Salmon et al.,
2011, "Parallel random numbers: as easy as 1, 2, 3"), 4 × 32 bits and ten rounds, of a seed and an element's place.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from ..lowrank.nonfinite import has_numbers
from .where import DTYPES, launch

# Codes that share an exponent (`hf_galore.int8.format.BLOCK`), and blocks that one program takes: four warps, eight
# elements to a thread.
_BLOCK = 32
_ROWS = 32


def read_int8(codes: Tensor, exponents: Tensor, dtype: torch.dtype) -> Tensor:
    """The values that codes stand for: a new tensor, contiguous, exact in float32 and bfloat16.

    Args:
        codes: int8, ... × n; rows or columns of a matrix may be slices of it.
        exponents: uint8, ... × ⌈n/32⌉, of the same rows.
        dtype: float32, bfloat16 or float16.

    Raises:
        ValueError: A dtype, a shape, a device or a stride is another.
    """
    if dtype not in DTYPES:
        raise ValueError(f"The values have to be float32, bfloat16 or float16, but are {dtype}.")
    _check(codes, exponents)
    values = codes.new_empty(codes.shape, dtype=dtype)
    if has_numbers(codes):
        kept = [part.reshape(math.prod(part.shape[:-1]), part.shape[-1]) for part in (codes, exponents)]
        numbers = _numbers(*kept)
        launch("read_int8", math.ceil(numbers[0] / _ROWS), values, *kept, *numbers, rows=_ROWS)
    return values


def add_int8_(
    codes: Tensor,
    exponents: Tensor,
    update: Tensor,
    *,
    alpha: float,
    decay: float,
    skip: Tensor | None = None,
    seed: int | None = None,
    first_row: int = 0,
) -> None:
    """W ← decay · W + alpha · U in place, computed in float32 and rounded once; exponents are the smallest that fit.

    Args:
        codes: int8, m × n: rows of a matrix, or all of it.
        exponents: uint8, m × ⌈n/32⌉.
        update: U, m × n, float32, bfloat16 or float16, of any strides.
        alpha: a factor of U.
        decay: a factor of W, 1 − ηλ.
        skip: one number; where it is not 0, W stays as it is. `None` for never.
        seed: rounds up or down at random, so that the mean is right; `None` to the nearest. The same seed gives the
            same numbers, others than torch's, however the matrix is divided.
        first_row: the number of the first row in the matrix that random numbers are drawn for.

    Raises:
        ValueError: A dtype, a shape, a device or a stride is another.
    """
    _check(codes, exponents)
    if codes.ndim != 2 or update.shape != codes.shape or update.dtype not in DTYPES or update.device != codes.device:
        raise ValueError(
            f"The update has to be of the codes' shape, a matrix, {tuple(codes.shape)}, on {codes.device}, in float32, "
            f"bfloat16 or float16, but is {tuple(update.shape)} {update.dtype} on {update.device}."
        )
    if skip is not None and (skip.numel() != 1 or skip.device != codes.device):
        raise ValueError(
            f"What says to skip has to be one number on {codes.device}, but is {tuple(skip.shape)} on {skip.device}."
        )
    if not has_numbers(codes):
        return
    numbers = _numbers(codes, exponents)
    launch(
        "add_int8",
        math.ceil(numbers[0] / _ROWS),
        codes,
        exponents,
        update,
        exponents if skip is None else skip,
        *numbers,
        *update.stride(),
        float(alpha),
        float(decay),
        (seed or 0) & (2**63 - 1),
        first_row,
        is_random=seed is not None,
        has_skip=skip is not None,
        rows=_ROWS,
    )
    increment_version([codes, exponents])


def _numbers(codes: Tensor, exponents: Tensor) -> tuple[int, ...]:
    """Of two matrices: all blocks, those of a row, columns, and how far rows of each are apart."""
    (m, n), blocks = codes.shape, exponents.shape[1]
    return m * blocks, blocks, n, codes.stride(0), exponents.stride(0)


def _check(codes: Tensor, exponents: Tensor) -> None:
    expected = (*codes.shape[:-1], math.ceil(codes.shape[-1] / _BLOCK)) if codes.ndim else ()
    if codes.ndim == 0 or codes.dtype != torch.int8 or (codes.numel() and codes.stride(-1) != 1 != codes.shape[-1]):
        raise ValueError(
            f"The codes have to be rows of int8, each contiguous, but are {tuple(codes.shape)} {codes.dtype} with "
            f"strides {codes.stride()}."
        )
    strided = exponents.numel() and exponents.stride(-1) != 1 != exponents.shape[-1]
    if exponents.shape != expected or exponents.dtype != torch.uint8 or exponents.device != codes.device or strided:
        raise ValueError(
            f"The exponents have to be {expected} uint8 on {codes.device}, in contiguous rows, but are "
            f"{tuple(exponents.shape)} {exponents.dtype} on {exponents.device} with strides {exponents.stride()}."
        )
