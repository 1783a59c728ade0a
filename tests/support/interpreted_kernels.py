"""Tests of our kernels in Triton's interpreter, on CPU tensors: `tests/kernels/test_interpreted.py` runs this file.

Triton decides once, when it is imported, whether it interprets, so this needs a process of its own. The interpreter
cuts a bfloat16 off where a card rounds it to the nearest; `tests/kernels/test_compiled.py` looks at that.
"""

from __future__ import annotations

import math
import os
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_galore import kernels
from hf_galore.integrations import bitsandbytes as facade
from hf_galore.integrations import bitsandbytes_calls as calls
from hf_galore.integrations import bitsandbytes_checks as checks
from hf_galore.kernels import adam, blockwise, where
from hf_galore.lowrank import blockwise as plain
from hf_galore.lowrank.blockwise import MOMENT_BLOCK, AdamStep, Quantized
from hf_galore.lowrank.quantize import _equal_steps, dequantize_basis, quantize_basis
from tests.support.own_kernels import (
    COUNTS,
    FIRST,
    LATER,
    assert_quantised,
    copy_of,
    exact,
    in_float32,
    moments_8bit,
    moments_32bit,
)

assert os.environ.get("TRITON_INTERPRET") == "1"

CPU = torch.device("cpu")
DTYPES = kernels.DTYPES
STEPS = pytest.mark.parametrize("now", [FIRST, LATER], ids=["first", "later"])
SHAPES = ((70, 9), (33, 7), (2, 1), (1, 2), (1, 1), (257, 1), (0, 3))


def gradient_of(numel: int, dtype: torch.dtype) -> Tensor:
    return (0.01 * torch.randn(numel)).to(dtype)


def norm_of(gradient: Tensor) -> Tensor:
    norm: Tensor = gradient.float().norm()
    return norm


def assert_rounded(found: Tensor, expected: Tensor, smallest: float = 1e-30) -> None:
    """Whether it is the float64 number in the dtype found, but for its last bit and float32's last few."""
    relative = max(2 * torch.finfo(torch.float32).eps, torch.finfo(found.dtype).eps)
    limit = relative * expected.abs() + max(smallest, torch.finfo(found.dtype).smallest_normal)
    assert ((found.double() - expected).abs() <= limit).all()


# ---- moments in 8 bits


@STEPS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("numel", COUNTS)
def test_a_direction_with_8_bit_moments_is_that_of_float64(numel: int, dtype: torch.dtype, now: AdamStep) -> None:
    gradient, moments = gradient_of(numel, dtype), moments_8bit((numel,), zero=now.step == 1)
    expected = exact(gradient, *in_float32(moments), now)
    found = kernels.adam_8bit_direction(gradient, moments, now, norm_of(gradient))
    assert (found.dtype, found.shape) == (dtype, gradient.shape)
    assert_rounded(found, expected.direction, smallest=1e-6)
    assert_quantised(moments.exp_avg, moments.exp_avg_absmax, expected.exp_avg, moments.signed)
    assert_quantised(moments.exp_avg_sq, moments.exp_avg_sq_absmax, expected.exp_avg_sq, moments.unsigned)


@STEPS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight_dtype", DTYPES)
def test_a_weight_with_8_bit_moments_moves_as_in_float64(
    weight_dtype: torch.dtype, dtype: torch.dtype, now: AdamStep
) -> None:
    weight, gradient = torch.randn(7, 39).to(weight_dtype), gradient_of(273, dtype).view(7, 39)
    moments = moments_8bit((7, 39))
    expected = exact(gradient, *in_float32(moments), now)
    before = weight.clone()
    kernels.adam_8bit_(weight, gradient, moments, now, norm_of(gradient))
    moved = expected.weight(before, now)
    # Where decay and update nearly cancel, the last bits of either.
    assert_rounded(weight, moved, smallest=1e-6)
    assert not torch.equal(weight, before)
    assert_quantised(moments.exp_avg, moments.exp_avg_absmax, expected.exp_avg, moments.signed)
    assert_quantised(moments.exp_avg_sq, moments.exp_avg_sq_absmax, expected.exp_avg_sq, moments.unsigned)


@pytest.mark.parametrize("dtype", DTYPES)
def test_steps_with_8_bit_moments_are_those_of_bitsandbytes(dtype: torch.dtype) -> None:
    """Its kernel for CPUs looks codes up by 16 bits of a moment, so that near 0 codes differ by more than one."""
    ours, theirs = moments_8bit((1030,), zero=True), moments_8bit((1030,), zero=True)
    start = torch.randn(1030).to(dtype)
    weights = start.clone(), start.clone()
    for step in range(1, 4):
        gradient, now = gradient_of(1030, dtype), LATER._replace(step=step, lr=1e-2)
        kernels.adam_8bit_(weights[0], gradient, ours, now, norm_of(gradient))
        calls.adam_8bit_(weights[1], gradient, theirs, now)
    first, others = in_float32(ours)[0], in_float32(theirs)[0]
    scale = plain.scale_of_each(ours.exp_avg_absmax, MOMENT_BLOCK, 1030)
    assert ((first - others).abs() <= 0.02 * scale).all()  # a step of the table is 0.014 of it
    torch.testing.assert_close(ours.exp_avg_absmax, theirs.exp_avg_absmax, rtol=1e-2, atol=0)
    apart = (weights[0].double() - weights[1].double()).abs().max()
    assert apart <= 3 * 1e-2 * 0.05 + 4 * 3 * torch.finfo(dtype).eps


def test_codes_are_exactly_the_nearest_of_the_table() -> None:
    """All middles between two values and what lies next to them, without rounding on the way: m = G, its largest 1."""
    signed, unsigned = calls.dynamic_tables()
    values = [torch.linspace(-1, 1, 501), torch.logspace(-9, 0, 300), -torch.logspace(-9, 0, 300)]
    for table in (signed, unsigned.sqrt(), -unsigned.sqrt()):
        middles = (table[1:] + table[:-1]) / 2
        values += [middles, table, *(torch.nextafter(middles, torch.full_like(middles, to)) for to in (-2.0, 2.0))]
    flat = torch.cat(values).clamp(-1, 1)
    blocks = torch.nn.functional.pad(flat, (0, -flat.numel() % 255)).view(-1, 255)
    gradient = torch.cat([blocks, torch.ones(len(blocks), 1)], dim=1)  # in each block one element is 1
    moments = moments_8bit(tuple(gradient.shape), zero=True)
    now = AdamStep(step=1, betas=(0.0, 0.0), eps=1e-8, lr=0.0, weight_decay=0.0)
    kernels.adam_8bit_direction(gradient, moments, now, norm_of(gradient))
    assert torch.equal(moments.exp_avg, plain.plain_quantize_8bit(gradient, signed, MOMENT_BLOCK).codes)
    assert torch.equal(moments.exp_avg_sq, plain.plain_quantize_8bit(gradient.square(), unsigned, MOMENT_BLOCK).codes)
    for codes in (moments.exp_avg, moments.exp_avg_sq):
        assert len(codes.unique()) >= 255


def test_blocks_of_zeros_stay_zero_and_tiny_ones_finite() -> None:
    gradient = torch.zeros(3, 256)
    gradient[1] = 1e-20 * torch.randn(256)  # its square is no normal number
    gradient[2] = torch.randn(256)
    moments = moments_8bit((3, 256), zero=True)
    found = kernels.adam_8bit_direction(gradient, moments, FIRST, norm_of(gradient))
    assert torch.equal(found[0], torch.zeros(256))
    assert found.isfinite().all()
    first, second = in_float32(moments)
    assert torch.equal(first[0], torch.zeros(256))
    assert torch.equal(second[0], torch.zeros(256))
    assert moments.exp_avg_absmax[0] == moments.exp_avg_sq_absmax[0] == 0
    torch.testing.assert_close(first[1:], 0.1 * gradient[1:], rtol=0.2, atol=0.02 * 3e-21)


# ---- moments in 32 bits


@STEPS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("numel", [1, 2, 231, 1030])
def test_a_direction_with_32_bit_moments_is_that_of_float64(numel: int, dtype: torch.dtype, now: AdamStep) -> None:
    gradient, (first, second) = gradient_of(numel, dtype), moments_32bit((numel,), zero=now.step == 1)
    expected = exact(gradient, first, second, now)
    found = kernels.adam_32bit_direction(gradient, first, second, now, norm_of(gradient))
    assert (found.dtype, found.shape) == (dtype, gradient.shape)
    assert_rounded(found, expected.direction, smallest=1e-6)
    torch.testing.assert_close(first, expected.exp_avg.float(), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(second, expected.exp_avg_sq.float(), rtol=1e-6, atol=1e-12)


@STEPS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight_dtype", DTYPES)
def test_a_weight_with_32_bit_moments_moves_as_in_float64(
    weight_dtype: torch.dtype, dtype: torch.dtype, now: AdamStep
) -> None:
    weight, gradient = torch.randn(7, 39).to(weight_dtype), gradient_of(273, dtype).view(7, 39)
    first, second = moments_32bit((7, 39))
    expected = exact(gradient, first, second, now)
    before = weight.clone()
    kernels.adam_32bit_(weight, gradient, first, second, now, norm_of(gradient))
    assert_rounded(weight, expected.weight(before, now), smallest=1e-6)
    torch.testing.assert_close(first, expected.exp_avg.float(), rtol=1e-6, atol=1e-9)


def test_32_bit_moments_are_those_of_torch() -> None:
    start = torch.randn(231)
    weights = start.clone(), start.clone()
    ours, theirs = moments_32bit((231,), zero=True), moments_32bit((231,), zero=True)
    for step in range(1, 6):
        gradient, now = gradient_of(231, torch.float32), FIRST._replace(step=step, weight_decay=0.1)
        kernels.adam_32bit_(weights[0], gradient, *ours, now, norm_of(gradient))
        plain.plain_adam_(weights[1], gradient, *theirs, now)
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-6, atol=1e-7)


# ---- skips


@pytest.mark.parametrize("norm", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("precision", [torch.float32, torch.float64])
def test_nothing_moves_where_the_norm_is_not_finite(norm: float, precision: torch.dtype) -> None:
    gradient = gradient_of(300, torch.bfloat16)
    gradient[7] = norm
    found = torch.tensor(norm, dtype=precision)
    moments, in_32 = moments_8bit((300,)), moments_32bit((300,))
    before, before_32 = copy_of(moments), [moment.clone() for moment in in_32]
    weight = torch.randn(300).to(torch.bfloat16)
    start = weight.clone()
    for direction in (
        kernels.adam_8bit_direction(gradient, moments, LATER._replace(eps=0.0), found),
        kernels.adam_32bit_direction(gradient, *in_32, LATER._replace(eps=0.0), found),
    ):
        assert torch.equal(direction, torch.zeros_like(gradient))
    kernels.adam_8bit_(weight, gradient, moments, LATER, found)
    kernels.adam_32bit_(weight, gradient, *in_32, LATER, found)
    assert torch.equal(weight, start)
    assert all(map(torch.equal, moments, before))
    assert all(map(torch.equal, in_32, before_32))


@pytest.mark.parametrize("precision", [torch.float32, torch.float64, torch.bfloat16])
def test_a_norm_may_have_any_precision(precision: torch.dtype) -> None:
    gradient, moments = gradient_of(300, torch.float32), moments_8bit((300,))
    expected = exact(gradient, *in_float32(moments), LATER)
    found = kernels.adam_8bit_direction(gradient, moments, LATER, norm_of(gradient).to(precision))
    assert_rounded(found, expected.direction, smallest=1e-6)


# ---- 4 and 8 bits


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_4_bits_are_those_of_plain_torch(shape: tuple[int, int], dtype: torch.dtype) -> None:
    values = torch.randn(shape).to(dtype)
    if values.numel() > 64:
        values.view(-1)[:64] = 0
    found, expected = kernels.quantize_4bit(values, 64), plain.plain_quantize_4bit(values, 64)
    assert found.codes.shape == expected.codes.shape
    assert torch.equal(found.codes, expected.codes)
    assert torch.equal(found.absmax, expected.absmax)
    for scales in DTYPES:
        kept = Quantized(expected.codes, expected.absmax.to(scales))
        result = kernels.dequantize_4bit(kept, 64, shape, dtype)
        assert (result.shape, result.dtype) == (shape, dtype)
        assert_rounded(result, plain.plain_dequantize_4bit(kept, 64, shape, torch.float32).double())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["basis", "exp_avg", "exp_avg_sq"])
def test_8_bits_are_those_of_plain_torch(kind: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    table = dict(zip(("basis", "exp_avg", "exp_avg_sq"), (_equal_steps(CPU), *calls.dynamic_tables()), strict=True))[
        kind
    ]
    values = torch.randn(shape).to(dtype)
    if kind == "exp_avg_sq":
        values = values.square()
    if values.numel() > 256:
        values.view(-1)[:256] = 0
    found, expected = kernels.quantize_8bit(values, table, 256), plain.plain_quantize_8bit(values, table, 256)
    assert found.codes.shape == shape
    assert torch.equal(found.codes, expected.codes)
    assert torch.equal(found.absmax, expected.absmax)
    for scales in (torch.float32, torch.bfloat16):
        kept = Quantized(expected.codes, expected.absmax.to(scales))
        result = kernels.dequantize_8bit(kept, table, 256, dtype)
        assert (result.shape, result.dtype) == (shape, dtype)
        assert_rounded(result, plain.plain_dequantize_8bit(kept, table, 256, torch.float32).double())


def test_values_that_are_not_contiguous_are_read_in_their_order() -> None:
    values, gradient = torch.randn(30, 20).mT, gradient_of(600, torch.float32).view(30, 20).mT
    assert torch.equal(kernels.quantize_4bit(values, 64).codes, kernels.quantize_4bit(values.contiguous(), 64).codes)
    table = _equal_steps(CPU)
    found = kernels.quantize_8bit(values, table, 256)
    assert torch.equal(found.codes, kernels.quantize_8bit(values.contiguous(), table, 256).codes)
    moments, others = moments_8bit((20, 30)), moments_8bit((20, 30))
    direction = kernels.adam_8bit_direction(gradient, moments, LATER, norm_of(gradient))
    assert direction.is_contiguous()
    assert torch.equal(direction, kernels.adam_8bit_direction(gradient.contiguous(), others, LATER, norm_of(gradient)))


# ---- the checks on first use, and the choice


@pytest.fixture(autouse=True)
def _serving(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels serve on this CPU, and none has been checked."""
    monkeypatch.setattr(where, "_look", lambda tensor: True)
    monkeypatch.setattr(checks, "_verdicts", {})
    monkeypatch.setattr(checks, "_warned", set())


@pytest.mark.parametrize("name", checks.OWN_CHECKS)
def test_right_kernels_pass_their_check(name: str, caplog: pytest.LogCaptureFixture) -> None:
    assert checks.own_is_right(name, torch.zeros(1), torch.bfloat16 if "adam" in name else torch.float32)
    assert not caplog.records


NUMBERS = ("beta1", "new1", "beta2", "new2", "eps", "correction1", "correction2", "decay", "lr")
FAULTS = [
    (name, number)
    for name in checks.OWN_CHECKS
    if "adam" in name
    for number in NUMBERS
    if name.endswith("direction") != (number in ("decay", "lr"))
]


@pytest.mark.parametrize(("name", "number"), FAULTS)
def test_what_adam_may_get_wrong_is_seen(
    number: str, name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    original = adam._numbers

    def wrong(now: AdamStep) -> tuple[float, ...]:
        numbers = list(original(now))
        numbers[NUMBERS.index(number)] *= 1.3
        return tuple(numbers)

    monkeypatch.setattr(adam, "_numbers", wrong)
    assert not checks.own_is_right(name, torch.zeros(1), torch.bfloat16)
    assert "gives wrong results" in caplog.text


@pytest.mark.parametrize("bits", [8, 4])
def test_a_basis_comes_back_by_them(bits: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    used = []
    original = where.launch

    def launch(name: str, *args: Any, **constants: Any) -> None:
        used.append(name)
        original(name, *args, **constants)

    monkeypatch.setattr(blockwise, "launch", launch)
    basis = torch.linalg.qr(torch.randn(96, 16))[0]
    kept = quantize_basis(basis, bits, torch.bfloat16)
    found = dequantize_basis(kept, basis.shape, bits, torch.float32)
    assert (found - basis).norm() / basis.norm() < (0.01 if bits == 8 else 0.15)
    assert used[-1] == f"dequantize_{bits}bit"
    assert f"quantize_{bits}bit" in used
    assert facade.fused(f"dequantize_{bits}bit", kept.codes, torch.float32)
