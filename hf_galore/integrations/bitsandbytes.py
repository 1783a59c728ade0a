"""bitsandbytes' kernels, each checked once on each device against plain torch, which takes over where one is wrong.

A kernel that is wrong on some machine trains with wrong numbers in silence: `dequantize_4bit` of bitsandbytes 0.50.2
is on CPUs with AVX-512, for rows whose length is a multiple of 16 but not of 64. (Given one flat row it is right: that
is how it is called here.) So the first use of a kernel on a device and in a dtype puts small known tensors through it,
for a few milliseconds and, on a GPU, one read; where it is wrong, or fails, one warning says so.

The known tensors are seen by no dispatch mode, leave random numbers alone and are made in explicit dtypes; their
arithmetic is elementwise, which autocast leaves alone. Fake and meta tensors have no numbers to check, and always go
to bitsandbytes: a plan counts what a training takes where the kernels are right. (Plain torch takes a few temporaries
of the size of one tensor more.)

Sources: 8-bit Optimizers via Block-wise Quantization (Dettmers et al., 2022, arXiv:2110.02861); NormalFloat4 from QLoRA
(Dettmers et al., 2023, arXiv:2305.14314), section 3; AdamW (arXiv:1711.05101), algorithm 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes

from ..log import logger

# bitsandbytes' kernels quantise moments in blocks of this many elements; it is not configurable there.
MOMENT_BLOCK = 256

# What the kernels compute in besides; anything else is cast.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Quantized(NamedTuple):
    """Codes and the largest magnitude of each block, float32."""

    codes: Tensor
    absmax: Tensor


class Moments8bit(NamedTuple):
    """Adam's moments in 8 bits, with the tables that their codes point into: 256 ascending float32 values each."""

    exp_avg: Tensor  # uint8
    exp_avg_absmax: Tensor
    exp_avg_sq: Tensor
    exp_avg_sq_absmax: Tensor
    signed: Tensor
    unsigned: Tensor


class AdamStep(NamedTuple):
    """What is the same for all elements in one step of W ← (1 − ηλ)W − ηN, N = m̂ / (√v̂ + ε)."""

    step: int
    betas: tuple[float, float]
    eps: float
    lr: float
    weight_decay: float


# ---- what is called in training


def functional() -> Any:
    """`bitsandbytes.functional`, which takes a second to import.

    Raises:
        ImportError: bitsandbytes is not installed.
    """
    from bitsandbytes import functional

    return functional


def quantize_4bit(values: Tensor, block: int) -> Quantized:
    """NormalFloat4 codes of float32 `values`, two to a byte: the first of each two in the upper half.

    Args:
        values: contiguous.
        block: elements that share a scale.

    Returns:
        The codes are one column of bytes, ⌈elements / 2⌉ of them.
    """
    use = _quantize_4bit if _is_right("quantize_4bit", values, values.dtype) else plain_quantize_4bit
    return use(values, block)


def dequantize_4bit(kept: Quantized, block: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The tensor of `shape` that NormalFloat4 codes stand for, in one of `DTYPES`."""
    use = _dequantize_4bit if _is_right("dequantize_4bit", kept.codes, dtype) else plain_dequantize_4bit
    return use(kept, block, shape, dtype)


def quantize_8bit(values: Tensor, table: Tensor, block: int) -> Quantized:
    """Codes of float32 `values`, in their shape: places in a `table` of 256 ascending values from −1 or 0 to 1.

    Args:
        values: contiguous.
    """
    use = _quantize_8bit if _is_right("quantize_blockwise", values, values.dtype) else plain_quantize_8bit
    return use(values, table, block)


def dequantize_8bit(kept: Quantized, table: Tensor, block: int, dtype: torch.dtype) -> Tensor:
    """What 8-bit codes stand for, in their shape and in one of `DTYPES`."""
    use = _dequantize_8bit if _is_right("dequantize_blockwise", kept.codes, dtype) else plain_dequantize_8bit
    return use(kept, table, block, dtype)


def adam_8bit_(weight: Tensor, gradient: Tensor, moments: Moments8bit, now: AdamStep) -> None:
    """One step of AdamW in place, with moments in 8 bits.

    Args:
        weight: contiguous, in one of `DTYPES`.
        gradient: contiguous, in the same.
    """
    right = _is_right("optimizer_update_8bit_blockwise", weight, weight.dtype)
    (_adam_8bit_ if right else plain_adam_8bit_)(weight, gradient, moments, now)


def adam_32bit_(weight: Tensor, gradient: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, now: AdamStep) -> None:
    """One step of AdamW in place, with float32 moments; else as `adam_8bit_`."""
    right = _is_right("optimizer_update_32bit", weight, weight.dtype)
    (_adam_32bit_ if right else plain_adam_)(weight, gradient, exp_avg, exp_avg_sq, now)


# ---- by bitsandbytes


def _quantize_4bit(values: Tensor, block: int) -> Quantized:
    codes, state = functional().quantize_4bit(values, blocksize=block, quant_type="nf4")
    return Quantized(codes, state.absmax)


def _dequantize_4bit(kept: Quantized, block: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    # Flat: what it makes of rows is wrong on some CPUs, and of 2 × 1 a 1 × 2. And even, as the codes of an odd number
    # of elements are too: an odd number goes a way that compiles, for each shape anew.
    flat = (2 * kept.codes.numel(),)
    library = functional()
    state = library.QuantState(
        absmax=kept.absmax, shape=torch.Size(flat), blocksize=block, quant_type="nf4", dtype=dtype
    )
    values: Tensor = library.dequantize_4bit(kept.codes, state)  # on a CPU it is 1 × elements
    return values.view(-1)[: math.prod(shape)].view(tuple(shape))


def _quantize_8bit(values: Tensor, table: Tensor, block: int) -> Quantized:
    codes, state = functional().quantize_blockwise(values, code=table, blocksize=block)
    return Quantized(codes, state.absmax)


def _dequantize_8bit(kept: Quantized, table: Tensor, block: int, dtype: torch.dtype) -> Tensor:
    library = functional()
    state = library.QuantState(absmax=kept.absmax, code=table, blocksize=block, dtype=dtype)
    values: Tensor = library.dequantize_blockwise(kept.codes, state)
    return values


def _adam_8bit_(weight: Tensor, gradient: Tensor, moments: Moments8bit, now: AdamStep) -> None:
    functional().optimizer_update_8bit_blockwise(
        optimizer_name="adam",
        g=gradient,
        p=weight,
        state1=moments.exp_avg,
        state2=moments.exp_avg_sq,
        beta1=now.betas[0],
        beta2=now.betas[1],
        beta3=0.0,
        alpha=0.0,
        eps=now.eps,
        step=now.step,
        lr=now.lr,
        qmap1=moments.signed,
        qmap2=moments.unsigned,
        absmax1=moments.exp_avg_absmax,
        absmax2=moments.exp_avg_sq_absmax,
        weight_decay=now.weight_decay,
        # By keyword: positions moved between releases, and a stray value here freezes parameters.
        gnorm_scale=1.0,
        skip_zeros=False,
    )


def _adam_32bit_(weight: Tensor, gradient: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, now: AdamStep) -> None:
    functional().optimizer_update_32bit(
        optimizer_name="adam",
        g=gradient,
        p=weight,
        state1=exp_avg,
        beta1=now.betas[0],
        eps=now.eps,
        step=now.step,
        lr=now.lr,
        state2=exp_avg_sq,
        beta2=now.betas[1],
        weight_decay=now.weight_decay,
        gnorm_scale=1.0,
        unorm_vec=None,
        max_unorm=0.0,
        skip_zeros=False,
    )


# ---- by plain torch

# Quantiles of a normal distribution, as bitsandbytes has them: a checkpoint's codes mean the same to both.
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


@torch.no_grad()
def plain_quantize_8bit(values: Tensor, table: Tensor, block: int) -> Quantized:
    """`quantize_8bit`: of each element, over its block's largest magnitude, the nearest of the table."""
    places, absmax = _nearest(values, table, block)
    return Quantized(places.to(torch.uint8).view(values.shape), absmax)


@torch.no_grad()
def plain_dequantize_8bit(kept: Quantized, table: Tensor, block: int, dtype: torch.dtype) -> Tensor:
    """`dequantize_8bit`, in float32 and then rounded."""
    return _values_at(kept.codes, kept.absmax, table, block).to(dtype)


@torch.no_grad()
def plain_quantize_4bit(values: Tensor, block: int) -> Quantized:
    """`quantize_4bit`; the half byte after an odd number of elements stands for 0, as bitsandbytes' does."""
    places, absmax = _nearest(values, _nf4(values.device), block)
    if places.numel() % 2:
        places = torch.nn.functional.pad(places, (0, 1), value=NF4.index(0.0))
    halves = places.to(torch.uint8)
    return Quantized((halves[::2] << 4 | halves[1::2]).unsqueeze(1), absmax)


@torch.no_grad()
def plain_dequantize_4bit(kept: Quantized, block: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """`dequantize_4bit`, in float32 and then rounded."""
    codes = kept.codes.view(-1)
    places = torch.stack([codes >> 4, codes & 15], dim=1).view(-1)[: math.prod(shape)]
    return _values_at(places, kept.absmax, _nf4(codes.device), block).to(dtype).view(tuple(shape))


@torch.no_grad()
def plain_adam_(weight: Tensor, gradient: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, now: AdamStep) -> None:
    """`adam_32bit_`: in float32 whatever the weight's dtype, which decay and update are rounded to once, together."""
    gradient, updated = gradient.float(), weight.float()
    beta1, beta2 = now.betas
    exp_avg.mul_(beta1).add_(gradient, alpha=1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    denominator = (exp_avg_sq.sqrt() / math.sqrt(1 - beta2**now.step)).add_(now.eps)
    updated.mul_(1 - now.lr * now.weight_decay)
    updated.addcdiv_(exp_avg, denominator, value=-now.lr / (1 - beta1**now.step))
    weight.copy_(updated)


@torch.no_grad()
def plain_adam_8bit_(weight: Tensor, gradient: Tensor, moments: Moments8bit, now: AdamStep) -> None:
    """`adam_8bit_`: `plain_adam_` between reading the codes and writing them anew."""
    kept = (
        (moments.exp_avg, moments.exp_avg_absmax, moments.signed),
        (moments.exp_avg_sq, moments.exp_avg_sq_absmax, moments.unsigned),
    )
    exp_avg, exp_avg_sq = (_values_at(codes, absmax, table, MOMENT_BLOCK) for codes, absmax, table in kept)
    plain_adam_(weight, gradient, exp_avg, exp_avg_sq, now)
    for values, (codes, absmax, table) in zip((exp_avg, exp_avg_sq), kept, strict=True):
        new = plain_quantize_8bit(values, table, MOMENT_BLOCK)
        codes.copy_(new.codes)
        absmax.copy_(new.absmax)


def _nf4(device: torch.device) -> Tensor:
    return torch.tensor(NF4, dtype=torch.float32, device=device)


def _nearest(values: Tensor, table: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Of each element the place in the table, flat, and of each block the largest magnitude."""
    flat = values.reshape(-1).float()
    blocks = torch.nn.functional.pad(flat, (0, -flat.numel() % block)).view(-1, block)
    absmax = blocks.abs().amax(dim=1)
    scaled = blocks / torch.where(absmax > 0, absmax, 1.0).unsqueeze(1)  # a block of zeros stays one
    places = torch.bucketize(scaled, (table[1:] + table[:-1]) / 2, out_int32=True)
    return places.view(-1)[: flat.numel()], absmax


def _values_at(places: Tensor, absmax: Tensor, table: Tensor, block: int) -> Tensor:
    """What places in the table stand for, in their shape, float32."""
    return table[places.int()] * _of_each(absmax, block, places.numel()).view(places.shape)


def _of_each(absmax: Tensor, block: int, numel: int) -> Tensor:
    """The scale of each element, flat."""
    return absmax.float().unsqueeze(1).expand(-1, block).reshape(-1)[:numel]


# ---- the checks

# Rows of 16 and 96 are what bitsandbytes 0.50.2 got wrong; the others have odd numbers of elements, less than a block
# and no whole number of them.
_SHAPES = ((70, 96), (40, 16), (33, 7), (2, 1), (1, 1))

# As a fraction of a block's largest magnitude: the CPU's 8-bit quantisation looks codes up by 16 bits of an element, so
# that one 3e-5 from the middle between two may get the farther.
_TIE = 1e-4

# A kernel's name, device and dtype: whether it is right.
_verdicts: dict[tuple[str, torch.device, torch.dtype], bool] = {}
_warned: set[tuple[str, str, torch.dtype]] = set()


def _is_right(name: str, used: Tensor, dtype: torch.dtype) -> bool:
    """Whether to use bitsandbytes' kernel where `used` is; checked on first use."""
    if used.device.type == "meta" or isinstance(used, FakeTensor):
        return True
    key = (name, used.device, dtype)
    if key not in _verdicts:
        _verdicts[key] = _check(name, used.device, dtype)
    return _verdicts[key]


@torch.no_grad()
def _check(name: str, device: torch.device, dtype: torch.dtype) -> bool:
    functional()  # where it is not installed, that is what to say
    with _disable_current_modes():
        try:
            right = bool(torch.stack([agreed.all() for agreed in _CHECKS[name](device, dtype)]).all())
            problem = "gives wrong results"
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            right, problem = False, f"fails ({type(error).__name__}: {error})"
    if not right and (name, device.type, dtype) not in _warned:
        _warned.add((name, device.type, dtype))
        import bitsandbytes

        logger.warning(
            "The kernel %s of bitsandbytes %s %s in %s on this %s: plain torch is used instead, which is right, but "
            "slower.",
            name,
            bitsandbytes.__version__,
            problem,
            str(dtype).removeprefix("torch."),
            device.type.upper(),
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
    nearest, expected = _nearest(values, table, block)
    yield _close(absmax, expected, 1e-4 * expected)
    flat, of_each = values.reshape(-1), _of_each(expected, block, values.numel())
    best = (table[nearest] * of_each - flat).abs()
    found = (table[places.reshape(-1).int()] * of_each - flat).abs()
    yield found <= best + _TIE * of_each


def _check_quantize_4bit(device: torch.device, dtype: torch.dtype) -> Iterator[Tensor]:
    known = _Known(device)
    for shape in _SHAPES:
        values = known.normal(*shape)
        codes, absmax = _quantize_4bit(values, 64)
        places = torch.stack([codes >> 4, codes & 15], dim=-1).view(-1)[: values.numel()]
        yield from _codes_are_near(places, absmax, values, _nf4(device), 64)


def _check_dequantize_4bit(device: torch.device, dtype: torch.dtype) -> Iterator[Tensor]:
    known = _Known(device)
    for shape in _SHAPES:
        numel = math.prod(shape)
        kept = Quantized(known.codes(math.ceil(numel / 2), 1), known.scales(numel, 64))
        yield _close(_dequantize_4bit(kept, 64, shape, dtype), plain_dequantize_4bit(kept, 64, shape, dtype))


def _check_quantize_8bit(device: torch.device, dtype: torch.dtype) -> Iterator[Tensor]:
    known = _Known(device)
    for table in _tables(device):
        for shape in _SHAPES:
            values = known.normal(*shape)
            if table[0] == 0:
                values = values.abs()
            codes, absmax = _quantize_8bit(values, table, 256)
            yield from _codes_are_near(codes, absmax, values, table, 256)


def _check_dequantize_8bit(device: torch.device, dtype: torch.dtype) -> Iterator[Tensor]:
    known = _Known(device)
    for table in _tables(device):
        for shape in _SHAPES:
            kept = Quantized(known.codes(*shape), known.scales(math.prod(shape), 256))
            yield _close(_dequantize_8bit(kept, table, 256, dtype), plain_dequantize_8bit(kept, table, 256, dtype))


# A first step and a later one, from a weight of zeros and moving against the learning rate, as N is got for a low-rank
# gradient; and one with decay, of a weight so large that an update does not hide it. ε is a tenth of √v̂.
_STEPS = (
    (0.0, AdamStep(step=1, betas=(0.9, 0.999), eps=1e-3, lr=-1.0, weight_decay=0.0)),
    (0.0, AdamStep(step=7, betas=(0.9, 0.999), eps=1e-3, lr=-1.0, weight_decay=0.0)),
    (64.0, AdamStep(step=7, betas=(0.9, 0.999), eps=1e-3, lr=0.25, weight_decay=0.5)),
)


def _adam_cases(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor, AdamStep]]:
    """Weight, gradient, both moments in float32 and what to do with them."""
    known = _Known(device)
    for size, now in _STEPS:
        for shape in _SHAPES[::2]:  # that they are flat is nothing new to these kernels
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


def _check_adam_8bit(device: torch.device, dtype: torch.dtype) -> Iterator[Tensor]:
    _, signed, unsigned = _tables(device)
    for weight, gradient, exp_avg, exp_avg_sq, now in _adam_cases(device, dtype):
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
        _adam_8bit_(weight, gradient, Moments8bit(*first, *second, signed, unsigned), now)
        yield _weight_is_near(weight, before, expected, now)
        for kept, values, table in ((first, exact_first, signed), (second, exact_second, unsigned)):
            yield from _codes_are_near(kept.codes, kept.absmax, values, table, MOMENT_BLOCK)


def _check_adam_32bit(device: torch.device, dtype: torch.dtype) -> Iterator[Tensor]:
    for weight, gradient, exp_avg, exp_avg_sq, now in _adam_cases(device, dtype):
        expected, before = weight.float().clone(), weight.clone()
        exact_first, exact_second = exp_avg.clone(), exp_avg_sq.clone()
        plain_adam_(expected, gradient, exact_first, exact_second, now)
        _adam_32bit_(weight, gradient, exp_avg, exp_avg_sq, now)
        yield _weight_is_near(weight, before, expected, now)
        yield _close(exp_avg, exact_first, 1e-7)  # of two terms that may cancel, each about 0.01
        yield _close(exp_avg_sq, exact_second, 1e-5 * exact_second)


_CHECKS: dict[str, Callable[[torch.device, torch.dtype], Iterator[Tensor]]] = {
    "quantize_4bit": _check_quantize_4bit,
    "dequantize_4bit": _check_dequantize_4bit,
    "quantize_blockwise": _check_quantize_8bit,
    "dequantize_blockwise": _check_dequantize_8bit,
    "optimizer_update_8bit_blockwise": _check_adam_8bit,
    "optimizer_update_32bit": _check_adam_32bit,
}
