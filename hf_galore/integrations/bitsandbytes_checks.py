"""Whether bitsandbytes' kernels and ours are right on this machine: each is checked once on a device and in a dtype.

A kernel that is wrong on some machine trains with wrong numbers in silence. So the first use of one puts small known
tensors through it, for a few milliseconds and, on a GPU, one read, and compares what comes out with plain torch
(`hf_galore.lowrank.blockwise`); where it is wrong, or fails, one warning says so. A kernel of ours is compiled then,
which takes a second or two the first time on a machine.

The known tensors are seen by no dispatch mode, leave random numbers alone and are made in explicit dtypes; their
arithmetic is elementwise, which autocast leaves alone.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from ..kernels import adam
from ..kernels import blockwise as own
from ..kernels.int8_checks import check_add_int8_, check_read_int8
from ..kernels.where import triton_version
from ..log import logger
from ..lowrank.blockwise import (
    MOMENT_BLOCK,
    AdamStep,
    Moments8bit,
    Quantized,
    nearest_places,
    nf4,
    plain_adam_,
    plain_dequantize_4bit,
    plain_dequantize_8bit,
    plain_quantize_8bit,
    scale_of_each,
)
from ..lowrank.nonfinite import has_numbers
from . import bitsandbytes_calls as calls

Shapes = tuple[tuple[int, int], ...]

# Rows of 16 and 96 are what bitsandbytes 0.50.2 got wrong; the others have odd numbers of elements, less than a block
# and no whole number of them.
_SHAPES: Shapes = ((70, 96), (40, 16), (33, 7), (2, 1), (1, 1))
# That they are flat is nothing new to kernels for Adam, nor to ours. Of ours one is compiled for multiples of 16, and
# one for other numbers.
_FLAT_SHAPES: Shapes = ((70, 96), (33, 7), (1, 1))
_OWN_SHAPES: Shapes = ((70, 16), (33, 7), (2, 1))

# As a fraction of a block's largest magnitude: the CPU's 8-bit quantisation looks codes up by 16 bits of an element, so
# that one 3e-5 from the middle between two may get the farther.
_TIE = 1e-4

# A check puts known tensors through a kernel, and gives where what comes out is right.
Checks = dict[str, Callable[[torch.device, torch.dtype], Iterator[Tensor]]]

# A kernel's name, device and dtype: whether it is right.
_verdicts: dict[tuple[str, torch.device, torch.dtype], bool] = {}
_warned: set[tuple[str, str, torch.dtype]] = set()


def is_right(name: str, used: Tensor, dtype: torch.dtype) -> bool:
    """Whether to use bitsandbytes' kernel where `used` is; checked on first use."""
    return _verdict(name, CHECKS, used, dtype)


def own_is_right(name: str, used: Tensor, dtype: torch.dtype) -> bool:
    """Whether to use a kernel of `hf_galore.kernels`, where they serve; checked on first use."""
    return _verdict(name, OWN_CHECKS, used, dtype)


def _verdict(name: str, checks: Checks, used: Tensor, dtype: torch.dtype) -> bool:
    if not has_numbers(used):
        return True
    key = (name if checks is CHECKS else f"own {name}", used.device, dtype)
    if key not in _verdicts:
        _verdicts[key] = _check(name, checks, used.device, dtype)
    return _verdicts[key]


@torch.no_grad()
def _check(name: str, checks: Checks, device: torch.device, dtype: torch.dtype) -> bool:
    if checks is CHECKS:
        calls.functional()  # where it is not installed, that is what to say
    with _disable_current_modes():
        try:
            right = bool(torch.stack([agreed.all() for agreed in checks[name](device, dtype)]).all())
            problem = "gives wrong results"
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            right, problem = False, f"fails ({type(error).__name__}: {error})"
    ours = checks is OWN_CHECKS
    key = (f"own {name}" if ours else name, device.type, dtype)
    if not right and key not in _warned:
        _warned.add(key)
        logger.warning(
            "The kernel %s of %s %s in %s on this %s: %s is used instead, which is right, but slower.",
            name,
            f"hf_galore (Triton {triton_version()})" if ours else f"bitsandbytes {calls.version()}",
            problem,
            str(dtype).removeprefix("torch."),
            device.type.upper(),
            "bitsandbytes or plain torch" if ours else "plain torch",
        )
    return right


class _Known:
    """Normal numbers and codes, the same each time and on each device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._generator = torch.Generator("cpu").manual_seed(0)

    def normal(self, *shape: int) -> Tensor:
        numbers = torch.randn(shape, generator=self._generator, dtype=torch.float32, device="cpu")
        return numbers.to(self._device)

    def codes(self, *shape: int) -> Tensor:
        numbers = torch.randint(256, shape, generator=self._generator, dtype=torch.uint8, device="cpu")
        return numbers.to(self._device)

    def scales(self, numel: int, block: int) -> Tensor:
        return self.normal(math.ceil(numel / block)).abs() + 0.1


def _tables(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Like those of bases, and of first and second moments: equal steps, and finer ones near 0."""
    even = torch.linspace(-1, 1, 256, dtype=torch.float32, device=device)
    return even, even**3, torch.linspace(0, 1, 256, dtype=torch.float32, device=device) ** 3


def _close(found: Tensor, expected: Tensor, tolerance: Tensor | float = 0.0) -> Tensor:
    """Elementwise: apart by no more than what an exact and a truncating cast to the dtype found differ by."""
    limits = torch.finfo(found.dtype)
    exact = expected.float()
    rounding = exact.abs() * max(limits.eps, 1e-6) + limits.smallest_normal * limits.eps
    return (found.float() - exact).abs() <= rounding + tolerance


def _codes_are_near(places: Tensor, absmax: Tensor, values: Tensor, table: Tensor, block: int) -> Iterator[Tensor]:
    """Whether scales are right, and codes stand for no value that is farther than the nearest, but for ties."""
    nearest, expected = nearest_places(values, table, block)
    yield _close(absmax, expected, 1e-4 * expected)
    flat, of_each = values.reshape(-1), scale_of_each(expected, block, values.numel())
    best = (table[nearest] * of_each - flat).abs()
    found = (table[places.reshape(-1).int()] * of_each - flat).abs()
    yield found <= best + _TIE * of_each


def _check_quantize_4bit(of: Any, shapes: Shapes, device: torch.device, dtype: torch.dtype) -> Iterator[Tensor]:
    known = _Known(device)
    for shape in shapes:
        values = known.normal(*shape)
        codes, absmax = of.quantize_4bit(values, 64)
        places = torch.stack([codes >> 4, codes & 15], dim=-1).view(-1)[: values.numel()]
        yield from _codes_are_near(places, absmax, values, nf4(device), 64)


def _check_dequantize_4bit(of: Any, shapes: Shapes, device: torch.device, dtype: torch.dtype) -> Iterator[Tensor]:
    known = _Known(device)
    for shape in shapes:
        numel = math.prod(shape)
        kept = Quantized(known.codes(math.ceil(numel / 2), 1), known.scales(numel, 64))
        yield _close(of.dequantize_4bit(kept, 64, shape, dtype), plain_dequantize_4bit(kept, 64, shape, dtype))


def _check_quantize_8bit(of: Any, shapes: Shapes, device: torch.device, dtype: torch.dtype) -> Iterator[Tensor]:
    known = _Known(device)
    for table in _tables(device):
        for shape in shapes:
            values = known.normal(*shape)
            if table[0] == 0:
                values = values.abs()
            codes, absmax = of.quantize_8bit(values, table, 256)
            yield from _codes_are_near(codes, absmax, values, table, 256)


def _check_dequantize_8bit(of: Any, shapes: Shapes, device: torch.device, dtype: torch.dtype) -> Iterator[Tensor]:
    known = _Known(device)
    for table in _tables(device):
        for shape in shapes:
            kept = Quantized(known.codes(*shape), known.scales(math.prod(shape), 256))
            yield _close(of.dequantize_8bit(kept, table, 256, dtype), plain_dequantize_8bit(kept, table, 256, dtype))


# A first step and a later one, from a weight of zeros and moving against the learning rate, as N is got for a low-rank
# gradient; and one with decay, of a weight so large that an update does not hide it. ε is a tenth of √v̂.
_STEPS = (
    (0.0, AdamStep(step=1, betas=(0.9, 0.999), eps=1e-3, lr=-1.0, weight_decay=0.0)),
    (0.0, AdamStep(step=7, betas=(0.9, 0.999), eps=1e-3, lr=-1.0, weight_decay=0.0)),
    (64.0, AdamStep(step=7, betas=(0.9, 0.999), eps=1e-3, lr=0.25, weight_decay=0.5)),
)


def _adam_cases(
    shapes: Shapes, device: torch.device, dtype: torch.dtype, only_direction: bool
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor, AdamStep]]:
    """Weight, gradient, both moments in float32 and what to do with them."""
    known = _Known(device)
    for size, now in _STEPS[: 2 if only_direction else 3]:
        for shape in shapes:
            weight, gradient = (size * known.normal(*shape)).to(dtype), (0.01 * known.normal(*shape)).to(dtype)
            exp_avg, exp_avg_sq = 0.01 * known.normal(*shape), 1e-4 * (known.normal(*shape).abs() + 0.1)
            past = float(now.step > 1)
            # As large as they are after so many steps.
            yield weight, gradient, past * exp_avg, past * (1 - 0.999**now.step) * exp_avg_sq, now


def _weight_is_near(found: Tensor, before: Tensor, expected: Tensor, now: AdamStep) -> Tensor:
    """Whether a weight is where it should be, in float32 `expected`.

    bitsandbytes decays after the update on a GPU, and before it on a CPU, and rounds after each on a GPU.
    """
    moved = (expected - before.float() * (1 - now.lr * now.weight_decay)).abs()
    rounding = torch.finfo(found.dtype).eps * before.float().abs()
    return _close(found, expected, (1e-3 + abs(now.lr * now.weight_decay)) * moved + rounding)


# Moves a weight and moments, in 8 or 32 bits.
_Adam8bit = Callable[[Tensor, Tensor, Moments8bit, AdamStep], None]
_Adam32bit = Callable[[Tensor, Tensor, Tensor, Tensor, AdamStep], None]


def _check_adam_8bit(
    use: _Adam8bit,
    tables: Callable[[torch.device], tuple[Tensor, Tensor]],
    shapes: Shapes,
    device: torch.device,
    dtype: torch.dtype,
    *,
    only_direction: bool = False,
) -> Iterator[Tensor]:
    signed, unsigned = tables(device)
    for weight, gradient, exp_avg, exp_avg_sq, now in _adam_cases(shapes, device, dtype, only_direction):
        first, second = (
            plain_quantize_8bit(values, table, MOMENT_BLOCK)
            for values, table in ((exp_avg, signed), (exp_avg_sq, unsigned))
        )
        exact_first, exact_second = (
            plain_dequantize_8bit(kept, table, MOMENT_BLOCK, torch.float32)
            for kept, table in ((first, signed), (second, unsigned))
        )
        expected, before = weight.float().clone(), weight.clone()
        plain_adam_(expected, gradient, exact_first, exact_second, now)
        use(weight, gradient, Moments8bit(*first, *second, signed, unsigned), now)
        yield _weight_is_near(weight, before, expected, now)
        for kept, values, table in ((first, exact_first, signed), (second, exact_second, unsigned)):
            yield from _codes_are_near(kept.codes, kept.absmax, values, table, MOMENT_BLOCK)


def _check_adam_32bit(
    use: _Adam32bit, shapes: Shapes, device: torch.device, dtype: torch.dtype, *, only_direction: bool = False
) -> Iterator[Tensor]:
    for weight, gradient, exp_avg, exp_avg_sq, now in _adam_cases(shapes, device, dtype, only_direction):
        expected, before = weight.float().clone(), weight.clone()
        exact_first, exact_second = exp_avg.clone(), exp_avg_sq.clone()
        plain_adam_(expected, gradient, exact_first, exact_second, now)
        use(weight, gradient, exp_avg, exp_avg_sq, now)
        yield _weight_is_near(weight, before, expected, now)
        yield _close(exp_avg, exact_first, 1e-7)  # of two terms that may cancel, each about 0.01
        yield _close(exp_avg_sq, exact_second, 1e-5 * exact_second)


def _cubic(device: torch.device) -> tuple[Tensor, Tensor]:
    return _tables(device)[1:]


CHECKS: Checks = {
    "quantize_4bit": functools.partial(_check_quantize_4bit, calls, _SHAPES),
    "dequantize_4bit": functools.partial(_check_dequantize_4bit, calls, _SHAPES),
    "quantize_blockwise": functools.partial(_check_quantize_8bit, calls, _SHAPES),
    "dequantize_blockwise": functools.partial(_check_dequantize_8bit, calls, _SHAPES),
    "optimizer_update_8bit_blockwise": functools.partial(_check_adam_8bit, calls.adam_8bit_, _cubic, _FLAT_SHAPES),
    "optimizer_update_32bit": functools.partial(_check_adam_32bit, calls.adam_32bit_, _FLAT_SHAPES),
}


# ---- ours


def _dynamic(device: torch.device) -> tuple[Tensor, Tensor]:
    signed, unsigned = calls.dynamic_tables()  # our kernel knows their form
    return signed.to(device), unsigned.to(device)


def _own_adam_8bit_(weight: Tensor, gradient: Tensor, moments: Moments8bit, now: AdamStep) -> None:
    adam.adam_8bit_(weight, gradient, moments, now, gradient.float().norm())


def _own_adam_8bit_direction(weight: Tensor, gradient: Tensor, moments: Moments8bit, now: AdamStep) -> None:
    weight.copy_(adam.adam_8bit_direction(gradient, moments, now, gradient.float().norm()))


def _own_adam_32bit_(weight: Tensor, gradient: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, now: AdamStep) -> None:
    adam.adam_32bit_(weight, gradient, exp_avg, exp_avg_sq, now, gradient.float().norm())


def _own_adam_32bit_direction(
    weight: Tensor, gradient: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, now: AdamStep
) -> None:
    weight.copy_(adam.adam_32bit_direction(gradient, exp_avg, exp_avg_sq, now, gradient.float().norm()))


OWN_CHECKS: Checks = {
    "quantize_4bit": functools.partial(_check_quantize_4bit, own, _OWN_SHAPES),
    "dequantize_4bit": functools.partial(_check_dequantize_4bit, own, _OWN_SHAPES),
    "quantize_8bit": functools.partial(_check_quantize_8bit, own, _OWN_SHAPES),
    "dequantize_8bit": functools.partial(_check_dequantize_8bit, own, _OWN_SHAPES),
    "adam_8bit_": functools.partial(_check_adam_8bit, _own_adam_8bit_, _dynamic, _OWN_SHAPES),
    "adam_8bit_direction": functools.partial(
        _check_adam_8bit, _own_adam_8bit_direction, _dynamic, _OWN_SHAPES, only_direction=True
    ),
    "adam_32bit_": functools.partial(_check_adam_32bit, _own_adam_32bit_, _OWN_SHAPES),
    "adam_32bit_direction": functools.partial(
        _check_adam_32bit, _own_adam_32bit_direction, _OWN_SHAPES, only_direction=True
    ),
    "read_int8": check_read_int8,
    "add_int8_": check_add_int8_,
}
