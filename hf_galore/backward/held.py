"""What a low-rank gradient is held as: a tensor, or 8 bits that answer to what is done to a tensor in `.grad`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from ..lowrank.float8 import MIN_ELEMENTS, Dither, Float8, add_float8_, from_float8, to_float8


class Held8bit:
    """R in 8 bits (`hf_galore.lowrank.float8`), with those of a tensor's methods that act on R as a whole.

    Args:
        kept: R.
        dtype: that R had, and has where it is read.
        dither: of the sums.
    """

    __slots__ = ("_dither", "dtype", "kept")

    def __init__(self, kept: Float8, dtype: torch.dtype, dither: Dither) -> None:
        self.kept = kept
        self.dtype = dtype
        self._dither = dither

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.kept.codes.device

    @property
    def scales(self) -> Tensor:
        """What is proportional to R; not finite where R is not."""
        return self.kept.scales

    def tensor(self) -> Tensor:
        """R, computed anew at each call."""
        return from_float8(self.kept, self.dtype)

    def stored(self) -> list[Tensor]:
        """The tensors that are in memory."""
        return list(self.kept)

    def _with(self, change: Callable[[Tensor], Tensor], dtype: torch.dtype | None = None) -> Self:
        return type(self)(Float8(*map(change, self.kept)), dtype or self.dtype, self._dither.copy())

    def clone(self) -> Self:
        """One with its own numbers."""
        return self._with(Tensor.clone)

    def zeros_like(self) -> Self:
        """One that is zero."""
        return self._with(torch.zeros_like)

    def to(self, *, device: Any = None, dtype: torch.dtype | None = None, copy: bool = True) -> Self:
        """One on another device, or to be read in another dtype."""
        return self._with(lambda tensor: tensor.to(device=device, copy=copy), dtype)

    def zero_(self) -> Self:
        """Set R to zero."""
        self.scales.zero_()
        self.kept.codes.zero_()  # NaN is among the codes
        return self

    def copy_(self, values: Tensor) -> Self:
        """Set R, rounded to the nearest."""
        for own, new in zip(self.kept, to_float8(values), strict=True):
            own.copy_(new)
        return self

    def add_(self, values: Tensor, *, alpha: Any = 1) -> Self:
        """Add to R; `hf_galore.lowrank.float8` says how that is rounded."""
        add_float8_(self.kept, values, alpha, self._dither.next(self.device))
        return self


LowRank = Tensor | Held8bit
"""R, as it is held."""


def held_in_8_bits(low_rank: LowRank, seed: int) -> LowRank:
    """R in 8 bits, but for what is small, or is in 8 bits already.

    Args:
        seed: of what sums are rounded with.
    """
    if isinstance(low_rank, Held8bit) or low_rank.numel() < MIN_ELEMENTS:
        return low_rank
    return Held8bit(to_float8(low_rank), low_rank.dtype, Dither(seed))


def zeros_like(low_rank: LowRank) -> LowRank:
    """A low-rank gradient of zero, held in the same way."""
    return low_rank.zeros_like() if isinstance(low_rank, Held8bit) else torch.zeros_like(low_rank)


def linear_part(low_rank: LowRank) -> Tensor:
    """The tensor that is multiplied where R is; it has an element that is not finite where R has one."""
    return low_rank.scales if isinstance(low_rank, Held8bit) else low_rank
