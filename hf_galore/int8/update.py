"""Adding an update to a weight in 8 bits, a tile at a time, in one rounding with the decay."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..lowrank.projection import at_least_float32
from ..lowrank.rounding import decay_unless
from .products import tiles
from .weight import Int8Weight


def add_int8_(
    weight: Int8Weight,
    update: Callable[[slice], Tensor],
    *,
    alpha: float,
    decay: float,
    skip: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> None:
    """W ← decay · W + alpha · U in place, computed in float32 and rounded once.

    Args:
        weight: m × n.
        update: gives the rows of U that a slice names.
        decay: 1 − ηλ.
        skip: 0-dimensional; where it is 1, W stays as it is, and U has to be zero. `None` for never.
        generator: rounds up or down at random, so that the mean is right; `None` to the nearest.
    """
    precise = at_least_float32(weight.dtype)
    factor = decay_unless(skip, weight.dtype, decay)
    for rows in tiles(len(weight), weight.shape[-1]):
        values = weight.rows(rows, precise)
        if decay != 1:
            values.mul_(factor)
        values.add_(update(rows), alpha=alpha)  # a kernel casts as it reads, and there is no copy in float32
        weight.write_rows(rows, values, generator)
        del values  # before the next tile is there
