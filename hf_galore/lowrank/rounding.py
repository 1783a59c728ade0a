"""Adding small updates to weights without losing them: one rounding for decay and update, stochastic if asked for.

A bfloat16 has 8 bits of precision: an update below 1/512 of its weight vanishes when the sum is rounded to the nearest.
Rounded up or down at random, with a probability that makes the mean right, it arrives on average.

Source: Revisiting BFloat16 Training (Zamirai et al., 2020, arXiv:2010.06192), section 3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .projection import at_least_float32
from .seeds import mixed_seed

# Rows are taken in chunks of about this many elements: float32 copies and random bits of a whole 7B output head would
# need a gigabyte.
CHUNK_ELEMENTS = 2**22


def generator_for(device: torch.device, seed: int, index: int, step: int) -> torch.Generator:
    """The random numbers of one parameter's update: a function of the seed, so that nothing has to be saved.

    Args:
        device: of the parameter.
        seed: of the run.
        index: of the parameter in its optimizer.
        step: of the update.
    """
    return torch.Generator(device).manual_seed(mixed_seed(seed, index, step))


def round_stochastically(values: Tensor, generator: torch.Generator) -> Tensor:
    """float32 values in bfloat16, each rounded to one of its two neighbours so that the mean is the value.

    Args:
        values: float32, finite.
    """
    # A bfloat16 is the upper half of a float32: adding random lower halves carries with the right probability.
    bits = values.contiguous().view(torch.int32)
    noise = torch.randint(0, 2**16, bits.shape, dtype=torch.int32, device=values.device, generator=generator)
    return ((bits + noise) & -(2**16)).view(torch.float32).to(torch.bfloat16)


def part_of(elements: int) -> int:
    """How many elements of so many to take at a time: `CHUNK_ELEMENTS`, and of very many a 64th, in whole 256s."""
    return CHUNK_ELEMENTS if elements <= 64 * CHUNK_ELEMENTS else -(-elements // (64 * 256)) * 256


def parts(length: int, size: int) -> Iterator[slice]:
    """Slices of one dimension, of `size` each but for the last."""
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))


def add_rounded_(
    weight: Tensor,
    update: Callable[[slice], Tensor],
    *,
    alpha: float,
    decay: float,
    skip: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> None:
    """W ← decay · W + alpha · U in place: for weights of less than float32 computed in float32, and rounded once.

    Args:
        weight: any floating-point dtype.
        update: gives the rows of U that a slice of the first dimension names; U has one row for a scalar.
        decay: 1 − ηλ.
        skip: 0-dimensional; where it is 1, W stays as it is, and U has to be zero. `None` for never.
        generator: rounds stochastically to bfloat16; `None` to the nearest.
    """
    weight = weight.reshape(-1) if weight.ndim == 0 else weight  # a view
    factor = decay_unless(skip, weight.dtype, decay)
    precise = at_least_float32(weight.dtype)
    if weight.dtype == precise:
        if decay != 1:
            weight.mul_(factor)
        weight.add_(update(slice(None)), alpha=alpha)
        return
    per_row = max(1, weight[:1].numel())
    # In two parts at least: what is computed is never a copy of the weight.
    size = max(1, min(part_of(weight.numel()) // per_row, -(-len(weight) // 2)))
    for rows in parts(len(weight), size):
        values = weight[rows].to(precise)
        if decay != 1:
            values.mul_(factor)
        values.add_(update(rows).to(precise), alpha=alpha)
        weight[rows] = values if generator is None else round_stochastically(values, generator)


def add_whole_(weight: Tensor, update: Tensor, *, alpha: float, decay: float, skip: Tensor | None = None) -> None:
    """W ← decay · W + alpha · U in place, rounded once and to the nearest, in few operations on all of it.

    Args:
        weight: any floating-point dtype.
        update: U, which is overwritten, of the weight's dtype: its own rounding is a small part of it.
        alpha: not 0 unless the decay is 1.
        decay: 1 − ηλ.
        skip: 0-dimensional; where it is 1, W stays as it is, and U has to be zero. `None` for never.
    """
    if decay != 1:
        # W decays as a part of U: by itself it would be rounded, and in bfloat16 lost.
        update.add_(weight, alpha=(decay - 1) / alpha)
        if skip is not None:
            update.masked_fill_(skip.bool(), 0.0)
    weight.add_(update, alpha=alpha)


def is_identity(dtype: torch.dtype, decay: float) -> bool:
    """Whether any weight, multiplied by the decay and rounded to the nearest, is the weight again.

    It is where the decay takes less than half the distance from a power of 2 to its lower neighbour: a quarter of ε.
    """
    return 0 <= 1 - decay < torch.finfo(dtype).eps / 4


def decay_unless(skip: Tensor | None, dtype: torch.dtype, decay: float) -> Tensor | float:
    """The decay, or 1 where `skip` is 1: a number if the host knows, else on the device, precise enough for `dtype`.

    Args:
        skip: 0-dimensional, 1 or 0; `None` for never.
        dtype: of the weight.
        decay: 1 − ηλ.
    """
    if decay == 1 or skip is None:
        return decay
    return 1 - (1 - decay) * (1 - skip.to(at_least_float32(dtype)))
