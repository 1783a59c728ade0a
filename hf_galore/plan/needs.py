"""What a card has to have for a run besides its tensors: blocks of torch's allocator, and what is outside of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from .allocator import reserved_bytes

_MIB = 2**20

# Outside of torch's allocator, as processes that trained a 7B recipe took it of an H200 (torch 2.11, CUDA 13): first
# what was there before a product of matrices, then what it and the first QR added, and last what is left of 0.95 GiB
# (0.84 on one machine and 0.94 on another, rounded up). A card with fewer multiprocessors takes less; nobody
# has measured how much.
CONTEXT = "CUDA's context"
OUTSIDE: Mapping[str, int] = {
    CONTEXT: 529 * _MIB,
    "cuBLAS": 66 * _MIB,
    "cuSOLVER": 186 * _MIB,
    "other kernels": int(0.95 * 2**30) - 781 * _MIB,
}
OUTSIDE_BYTES = sum(OUTSIDE.values())

# cuBLAS has a work space from torch's allocator for each thread that multiplies: two, one for the backward pass.
# This is torch's default for all cards but those of compute capability 9 and 10, where it is 32 MiB.
WORK_SPACES = (8 * _MIB + 128 * 2**10,) * 2

# How far the model of the allocator may be off: what was reserved on the H200 was between 0.1 % less and 0.5 % more.
MODEL_ERROR = 0.005

# What the allocator takes by the model, as a part of the peak: about the middle of the recipes with a GaLore optimizer.
_TYPICAL = {True: 1.01, False: 1.035}


def allocator_bytes(events: Iterable[tuple[int, int]], *, expandable: bool) -> int:
    """The most that torch's allocator holds of a card, with the work spaces that no tensor is seen of.

    Args:
        events: storages that grow and shrink, as `reserved_bytes` takes them, with numbers from 0.
        expandable: whether segments are expandable.
    """
    spaces = [(-1 - index, nbytes) for index, nbytes in enumerate(WORK_SPACES)]
    return int(reserved_bytes([*spaces, *events], expandable=expandable) * (1 + MODEL_ERROR))


def needed_at_a_guess(peak_bytes: int, *, expandable: bool) -> int:
    """About what a card has to have for a peak, where it is not known what is allocated on the way there."""
    return int(peak_bytes * _TYPICAL[expandable]) + OUTSIDE_BYTES
