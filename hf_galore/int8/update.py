"""Adding an update to a weight in 8 bits, a tile at a time, in one rounding with the decay.

On NVIDIA's cards by a kernel of ours (`hf_galore.kernels.int8`), which has no float tile but of the update.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from ..integrations import bitsandbytes as kernels
from ..kernels import int8 as own
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
        generator: rounds up or down at random, so that the mean is right; `None` to the nearest. Our kernel draws
            other numbers of the seed that it was made with.
    """
    for rows in tiles(len(weight), weight.shape[-1]):
        # U without a name here: one that holds a tile until the next is there would double what tiles take.
        _add_rows_(weight, rows, update(rows), alpha, decay, skip, generator)


def _add_rows_(
    weight: Int8Weight,
    rows: slice,
    update: Tensor,
    alpha: float,
    decay: float,
    skip: Tensor | None,
    generator: torch.Generator | None,
) -> None:
    if weight.dtype in kernels.DTYPES and kernels.fused("add_int8_", weight.codes, update.dtype):
        own.add_int8_(
            weight.codes[rows],
            weight.exponents[rows],
            update,
            alpha=alpha,
            decay=decay,
            skip=skip,
            seed=None if generator is None else generator.initial_seed(),
            first_row=rows.start,
        )
        increment_version(weight)
        return
    values = weight.rows(rows, at_least_float32(weight.dtype))
    if decay != 1:
        values.mul_(decay_unless(skip, weight.dtype, decay))
    values.add_(update, alpha=alpha)  # a kernel casts as it reads, and there is no copy in float32
    weight.write_rows(rows, values, generator)
