"""Random projections of which nothing is kept: they are made anew, from a seed, whenever they are needed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .projection import Bases, BasisShapes, at_least_float32


def random_projections(
    shapes: BasisShapes, rank: int, seeds: Sequence[int], dtype: torch.dtype, device: torch.device
) -> Bases:
    """Projections of independent normal numbers of variance 1/r, so that R is about as large as G.

    Source: APOLLO (Zhu et al., 2024, arXiv:2412.05270), algorithm 1.

    Args:
        shapes: of the projections, of one matrix or of a stack.
        rank: r.
        seeds: one; or those of each matrix of a stack, which has other numbers than the others also with their seed.
        dtype: of the projections.
        device: of the projections; the numbers are those of its kind.
    """

    def of_all(shape: tuple[int, ...], seed: int) -> Tensor:
        generator = torch.Generator(device).manual_seed(seed)
        sample = torch.randn(shape, generator=generator, dtype=at_least_float32(dtype), device=device)
        return sample.mul_(rank**-0.5).to(dtype)

    def projection(shape: tuple[int, ...]) -> Tensor:
        different = sorted(set(seeds))
        found = of_all(shape, different[0])
        for seed in different[1:]:  # matrices of a stack that were refreshed together have one
            indices = [index for index, other in enumerate(seeds) if other == seed]
            found[indices] = of_all(shape, seed)[indices]
        return found

    return Bases(*(None if shape is None else projection(shape) for shape in shapes))
