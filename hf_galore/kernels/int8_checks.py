"""Whether the kernels for weights in 8 bits are right, by known numbers: see `integrations.bitsandbytes_checks`.

What they should give is worked out here in a few elementwise operations of its own, in float64, which is exact.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad

from . import int8 as own

# Whole blocks and others, several programs, one element.
_SHAPES = ((40, 96), (33, 7), (2, 1))
_BLOCK, _LARGEST = 32, 127


def check_read_int8(device: torch.device, dtype: torch.dtype) -> Iterator[Tensor]:
    """Whether codes are read right, all of a matrix and a slice of columns."""
    for shape in _SHAPES:
        codes, exponents = _known(shape, device)
        for part in (slice(None), slice(0, _BLOCK)):
            kept = codes[:, part], exponents[:, slice(0, math.ceil(codes[:, part].shape[1] / _BLOCK))]
            yield own.read_int8(*kept, dtype).double() == _exact(*kept).to(dtype).double()


def check_add_int8_(device: torch.device, dtype: torch.dtype) -> Iterator[Tensor]:
    """Whether an update arrives, to the nearest or at random, and whether nothing moves where it is skipped."""
    never, always = torch.zeros((), device=device), torch.ones((), device=device)
    for shape in _SHAPES:
        before = _known(shape, device)
        update = torch.linspace(-1, 1, math.prod(shape), dtype=torch.float32, device=device).view(shape).to(dtype)
        expected = 0.75 * _exact(*before) - 0.5 * update.double()
        for seed, nearness in ((None, 0.5), (7, 1.0)):
            codes, exponents = (part.clone() for part in before)
            own.add_int8_(codes, exponents, update, alpha=-0.5, decay=0.75, skip=never, seed=seed)
            # In steps of an element's block. Sums in float32 lose some of their last bits.
            apart = (_exact(codes, exponents) - expected) / torch.exp2(_of_each(exponents, shape) - 127)
            yield apart.abs() <= nearness + 1e-3
            yield apart.mean().abs() <= 2.5 / math.sqrt(apart.numel())  # five times what is usual, at most
            yield _is_smallest(codes, exponents)
            if seed is not None and apart.numel() > 100:
                yield apart.abs().max() > 0.5  # as a third or so of them are
            for decay, factor, skip in ((0.75, -0.5, always), (1.0, 0.0, None)):
                left = codes.clone(), exponents.clone()
                own.add_int8_(*left, update, alpha=factor, decay=decay, skip=skip, seed=seed)
                yield (left[0] == codes).all() & (left[1] == exponents).all()
            update.view(-1)[-1] = math.inf
            own.add_int8_(codes, exponents, update, alpha=-0.5, decay=0.75, seed=seed)
            yield exponents.view(-1)[-1] == 255
            update.view(-1)[-1] = 1.0


def _known(shape: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Codes whose blocks each have a large one, and exponents of usual weights."""
    generator = torch.Generator("cpu").manual_seed(0)
    codes = torch.randint(-_LARGEST, _LARGEST + 1, shape, generator=generator, dtype=torch.int8, device="cpu")
    codes[:, ::_BLOCK] = _LARGEST
    blocks = (shape[0], math.ceil(shape[1] / _BLOCK))
    exponents = torch.randint(116, 123, blocks, generator=generator, dtype=torch.uint8, device="cpu")
    return codes.to(device), exponents.to(device)


def _of_each(exponents: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The exponent of each element, float64."""
    return exponents.double().repeat_interleave(_BLOCK, dim=1)[:, : shape[1]]


def _exact(codes: Tensor, exponents: Tensor) -> Tensor:
    return codes * torch.exp2(_of_each(exponents, tuple(codes.shape)) - 127)


def _is_smallest(codes: Tensor, exponents: Tensor) -> Tensor:
    """Whether a block's codes would be too large for the next smaller exponent."""
    sizes = pad(codes.double().abs(), (0, -codes.shape[1] % _BLOCK))
    by_block: Tensor = sizes.unflatten(1, (-1, _BLOCK))
    return (by_block.amax(dim=-1) > _LARGEST // 2) | (exponents == 1)
