"""Low-rank gradients in 8 bits while they are held: floating-point numbers of 8 bits, and a scale for each 256.

A code is torch's `float8_e4m3fn` (4 bits of exponent, 3 of mantissa), and an element is its code times the float32
scale of its block. That is 8.125 bits an element, and at worst a sixteenth of it is wrong, however small it is beside
others. Adam divides each element by its own history, so small ones count as much as large ones, and a block has both:
elements of several singular directions, and of inputs of several sizes. A code of equal steps loses the small ones.

A sum is rounded up where what is lost exceeds a threshold, which is random for each element and moves on by the golden
ratio, modulo 1, from one sum to the next. To the nearest, a micro-batch that adds less than half a step to what is
there would vanish, each time anew, where many add up. With thresholds at random the mean is right, but errors grow as
the square root of the number of sums; these even out.

Sources: FP8 Formats for Deep Learning (Micikevicius et al., 2022, arXiv:2209.05433), table 1; the thresholds are Weyl's
sequence of low discrepancy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from .rounding import part_of, parts

BLOCK = 256
MIN_ELEMENTS = 4096
"""Smaller tensors stay as they are, as 8-bit moments do: they save nothing."""

_LARGEST = 448.0  # of float8_e4m3fn
_SMALLEST_NORMAL, _MANTISSA_STEPS = 2.0**-6, 2.0**-3
_EXPONENT = 0x7F800000  # the bits of a float32's
_TINY = torch.finfo(torch.float32).tiny
_GOLDEN = (math.sqrt(5) - 1) / 2


class Float8(NamedTuple):
    """A tensor in 8 bits. Where a scale is not finite, no element of its block is."""

    codes: Tensor  # float8_e4m3fn, contiguous, of the tensor's shape
    scales: Tensor  # float32, one for each 256 elements in a row


Thresholds = Callable[[torch.Size], Tensor]
"""Gives the thresholds of the next elements, in their order: float32, at least 0 and below 1."""


class Dither:
    """The thresholds of one tensor's sums: a function of the seed and of how many sums there were.

    Args:
        seed: of the tensor and the step.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._count = 0

    def next(self, device: torch.device) -> Thresholds:
        """The thresholds of the next sum."""
        self._count += 1
        shift = self._count * _GOLDEN % 1
        generator = torch.Generator(device).manual_seed(self._seed)

        def thresholds(shape: torch.Size) -> Tensor:
            return torch.rand(shape, device=device, generator=generator).add_(shift).frac_()

        return thresholds

    def copy(self) -> Dither:
        """The same thresholds again, from here on."""
        made = Dither(self._seed)
        made._count = self._count
        return made


@torch.no_grad()
def to_float8(values: Tensor) -> Float8:
    """A tensor in 8 bits, each element rounded to the nearest.

    Args:
        values: any floating-point dtype.
    """
    numel = values.numel()
    kept = Float8(
        torch.empty(values.shape, dtype=torch.float8_e4m3fn, device=values.device),
        torch.empty(math.ceil(numel / BLOCK), dtype=torch.float32, device=values.device),
    )
    flat = values.reshape(-1)
    for part in _parts(numel):
        _write(kept, part, flat[part].to(torch.float32, copy=True), None)
    return kept


@torch.no_grad()
def from_float8(kept: Float8, dtype: torch.dtype) -> Tensor:
    """The tensor that codes and scales stand for, computed in float32 and rounded to `dtype`."""
    values = torch.empty(kept.codes.shape, dtype=dtype, device=kept.codes.device)
    flat = values.view(-1)
    for part in _parts(len(flat)):
        flat[part] = _read(kept, part)
    return values


@torch.no_grad()
def add_float8_(kept: Float8, values: Tensor, alpha: float, thresholds: Thresholds) -> None:
    """Add `alpha` · `values` in place, computed in float32 and rounded up where a threshold says so.

    Args:
        values: any floating-point dtype, of the tensor's shape.
        thresholds: from `Dither`.
    """
    flat = values.reshape(-1)
    for part in _parts(values.numel()):
        _write(kept, part, _read(kept, part).add_(flat[part], alpha=alpha), thresholds)


def _parts(numel: int) -> Iterator[slice]:
    """Parts of a flat tensor, of whole blocks but for the last: float32 copies of it all would take what is saved."""
    return parts(numel, part_of(numel))


def _blocks_of(part: slice) -> slice:
    return slice(part.start // BLOCK, math.ceil(part.stop / BLOCK))


def _by_block(flat: Tensor) -> Tensor:
    """A flat tensor by blocks, the last one filled up with zeros."""
    missing = -len(flat) % BLOCK
    return (pad(flat, (0, missing)) if missing else flat).view(-1, BLOCK)


def _read(kept: Float8, part: slice) -> Tensor:
    """A part of the elements in float32."""
    values = kept.codes.view(-1)[part].to(torch.float32)
    return _by_block(values).mul_(kept.scales[_blocks_of(part)].unsqueeze(1)).view(-1)[: len(values)]


def _write(kept: Float8, part: slice, values: Tensor, thresholds: Thresholds | None) -> None:
    """Put float32 values, which are used up, where a part of the elements is."""
    blocks = _by_block(values)
    # At least the smallest normal number, so that zeros stay zeros.
    scales = torch.linalg.vector_norm(blocks, math.inf, dim=1).div_(_LARGEST).clamp_(min=_TINY)
    kept.scales[_blocks_of(part)] = scales
    blocks.div_(scales.unsqueeze(1))
    if thresholds is not None:
        # Codes are an eighth of the power of 2 below apart, and from the smallest normal one down equally far.
        step = (blocks.view(torch.int32) & _EXPONENT).view(torch.float32).clamp_(min=_SMALLEST_NORMAL)
        step.mul_(_MANTISSA_STEPS)
        blocks.div_(step).add_(thresholds(blocks.shape)).floor_().mul_(step)
    # The division may have rounded up, to where there is no code.
    kept.codes.view(-1)[part] = blocks.clamp_(-_LARGEST, _LARGEST).view(-1)[: len(values)]
