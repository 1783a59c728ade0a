"""Our Triton kernels for Adam on a card: against plain torch, `torch.optim` and bitsandbytes, and on other streams.

With HF_GALORE_CARD=cpu they are skipped, but for TRITON_INTERPRET=1, which has Triton interpret them there.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from bitsandbytes.optim.adamw import AdamW8bit
from torch import Tensor, nn

from hf_galore import kernels
from hf_galore.integrations import bitsandbytes as facade
from hf_galore.integrations import bitsandbytes_calls as calls
from hf_galore.integrations import bitsandbytes_checks as checks
from hf_galore.kernels import where
from hf_galore.lowrank.blockwise import AdamStep, Moments8bit
from tests.support.card import DEVICE, ON_CARD, sized, waiting
from tests.support.own_kernels import (
    FIRST,
    LATER,
    assert_quantised,
    copy_of,
    exact,
    in_float32,
    moments_8bit,
    moments_32bit,
)

CPU = torch.device("cpu")
DTYPES = kernels.DTYPES
INTERPRETED = not ON_CARD and os.environ.get("TRITON_INTERPRET") == "1"
# A low-rank gradient of a 7B model, an odd number of elements, less than a block, one.
COUNTS = (sized(4096 * 1024, 4096), 100_003 if ON_CARD else 1003, 231, 1)
# The interpreter cuts a bfloat16 off.
UNITS = 1.0 if INTERPRETED else 0.5


@pytest.fixture(autouse=True)
def _served(monkeypatch: pytest.MonkeyPatch) -> None:
    if INTERPRETED:
        monkeypatch.setattr(where, "_look", lambda tensor: True)
    elif not kernels.serves(torch.zeros(1, device=DEVICE)):
        pytest.skip(f"no Triton kernels for this {DEVICE.type}")


needs_card = pytest.mark.skipif(not ON_CARD, reason="a CPU has no streams")


def normal(numel: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Of the CPU's generator, so that every device is given the same."""
    return (0.01 * torch.randn(numel, generator=torch.Generator().manual_seed(seed))).to(dtype)


def there(moments: Moments8bit) -> Moments8bit:
    return Moments8bit(*(tensor.to(DEVICE, copy=True) for tensor in moments))


def assert_rounded(found: Tensor, expected: Tensor) -> None:
    """Whether it is the float64 number rounded to the nearest, but for float32's last bits."""
    finfo = torch.finfo(found.dtype)
    limit = (UNITS * finfo.eps + 2e-6) * expected.abs() + 1e-6 + finfo.smallest_normal
    assert ((found.cpu().double() - expected).abs() <= limit).all()


@pytest.mark.parametrize("name", checks.OWN_CHECKS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_each_kernel_is_found_right(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "_verdicts", {})
    assert facade.fused(name, torch.zeros(1, device=DEVICE), dtype)


@pytest.mark.parametrize("now", [FIRST, LATER], ids=["first", "later"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("numel", COUNTS)
def test_directions_are_those_of_float64(numel: int, dtype: torch.dtype, now: AdamStep) -> None:
    gradient, zero = normal(numel, dtype), now.step == 1
    on_card, norm = gradient.to(DEVICE), gradient.float().norm().to(DEVICE)
    kept = moments_8bit((numel,), zero=zero)
    expected, moments = exact(gradient, *in_float32(kept), now), there(kept)
    found = kernels.adam_8bit_direction(on_card, moments, now, norm)
    assert found.dtype == dtype
    assert_rounded(found, expected.direction)
    assert_quantised(moments.exp_avg, moments.exp_avg_absmax, expected.exp_avg, kept.signed)
    assert_quantised(moments.exp_avg_sq, moments.exp_avg_sq_absmax, expected.exp_avg_sq, kept.unsigned)
    first, second = moments_32bit((numel,), zero=zero)
    expected = exact(gradient, first, second, now)
    in_32 = first.to(DEVICE, copy=True), second.to(DEVICE, copy=True)
    assert_rounded(kernels.adam_32bit_direction(on_card, *in_32, now, norm), expected.direction)
    torch.testing.assert_close(in_32[0].cpu(), expected.exp_avg.float(), rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(in_32[1].cpu(), expected.exp_avg_sq.float(), rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight_dtype", DTYPES)
def test_weights_move_as_in_float64_with_one_rounding(weight_dtype: torch.dtype, dtype: torch.dtype) -> None:
    numel = sized(1_000_003, 1003)
    gradient, before = normal(numel, dtype), (100 * normal(numel, seed=1)).to(weight_dtype)
    on_card, norm, kept = gradient.to(DEVICE), gradient.float().norm().to(DEVICE), moments_8bit((numel,))
    weight = before.to(DEVICE, copy=True)
    kernels.adam_8bit_(weight, on_card, there(kept), LATER, norm)
    assert_rounded(weight, exact(gradient, *in_float32(kept), LATER).weight(before, LATER))
    weight, in_32 = before.to(DEVICE, copy=True), moments_32bit((numel,))
    kernels.adam_32bit_(weight, on_card, in_32[0].to(DEVICE, copy=True), in_32[1].to(DEVICE, copy=True), LATER, norm)
    assert_rounded(weight, exact(gradient, *in_32, LATER).weight(before, LATER))


def test_32_bits_are_torchs_fused_adamw() -> None:
    start = 100 * normal(33333)
    weight, theirs = start.to(DEVICE, copy=True), nn.Parameter(start.to(DEVICE, copy=True))
    optimizer = torch.optim.AdamW([theirs], lr=1e-2, weight_decay=0.1, fused=True)
    moments = [torch.zeros(33333, device=DEVICE) for _ in range(2)]
    for step in range(1, 11):
        gradient = normal(33333, seed=step).to(DEVICE)
        theirs.grad = gradient
        optimizer.step()
        now = AdamStep(step, (0.9, 0.999), 1e-8, 1e-2, 0.1)
        kernels.adam_32bit_(weight, gradient, moments[0], moments[1], now, gradient.norm())
    way = (theirs.detach().cpu() - start).norm()
    assert (weight - theirs.detach()).norm().cpu() <= 1e-6 * way + 1e-6 * start.norm()


@pytest.mark.parametrize("dtype", DTYPES)
def test_8_bits_are_bitsandbytes_own(dtype: torch.dtype) -> None:
    numel, steps = sized(2**20, 2**13), 10
    start = (100 * normal(numel)).to(dtype)
    weight, theirs = start.to(DEVICE, copy=True), nn.Parameter(start.to(DEVICE, copy=True))
    optimizer = AdamW8bit([theirs], lr=1e-2, weight_decay=0.0)
    moments = there(moments_8bit((numel,), zero=True))
    for step in range(1, steps + 1):
        gradient = normal(numel, dtype, seed=step).to(DEVICE)
        theirs.grad = gradient
        optimizer.step()
        now = AdamStep(step, (0.9, 0.999), 1e-8, 1e-2, 0.0)
        kernels.adam_8bit_(weight, gradient, moments, now, gradient.float().norm())
        if ON_CARD:
            state = optimizer.state[theirs]
            apart = (moments.exp_avg.int() - state["state1"].view(-1).int()).abs()
            assert apart.max() <= 1
            assert apart.float().mean() <= 1e-3
            # Each step from the same moments: where the next gradient cancels one, a code becomes many of the smallest.
            moments.exp_avg.copy_(state["state1"].view(-1))
            moments.exp_avg_sq.copy_(state["state2"].view(-1))
    expected = theirs.detach().float()
    way = (expected - start.float().to(DEVICE)).norm()
    # To the nearest errors cancel; cut off they add up.
    rounding = steps ** (1.0 if INTERPRETED else 0.5) * torch.finfo(dtype).eps * expected.norm()
    # The CPU's kernel of bitsandbytes looks codes up by 16 bits of a moment.
    assert (weight.float() - expected).norm() <= sized(1e-4, 3e-2) * way + rounding


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nothing_moves_where_the_norm_is_not_finite(bad: float) -> None:
    gradient = normal(20_000, torch.bfloat16).to(DEVICE)
    gradient[33] = bad
    norm, moments = gradient.float().norm(), there(moments_8bit((20_000,)))
    in_32 = [moment.to(DEVICE) for moment in moments_32bit((20_000,))]
    weight = normal(20_000, torch.bfloat16, seed=1).to(DEVICE)
    before = (weight.clone(), *copy_of(moments), *(moment.clone() for moment in in_32))
    for found in (
        kernels.adam_8bit_direction(gradient, moments, LATER, norm),
        kernels.adam_32bit_direction(gradient, in_32[0], in_32[1], LATER, norm),
    ):
        assert torch.equal(found, torch.zeros_like(gradient))
    kernels.adam_8bit_(weight, gradient, moments, LATER, norm)
    kernels.adam_32bit_(weight, gradient, in_32[0], in_32[1], LATER, norm)
    assert all(map(torch.equal, (weight, *moments, *in_32), before))


# ---- streams, graphs, waits


def ours(gradient: Tensor, moments: Moments8bit) -> Tensor:
    return kernels.adam_8bit_direction(gradient, moments, LATER, gradient.float().norm())


def bitsandbytes(gradient: Tensor, moments: Moments8bit) -> Tensor:
    direction = torch.zeros_like(gradient)
    calls.adam_8bit_(direction, gradient, moments, LATER._replace(lr=-1.0, weight_decay=0.0))
    return direction


def through_4_bits(of: Any) -> Callable[[Tensor, Moments8bit], Tensor]:
    def both(values: Tensor, moments: Moments8bit) -> Tensor:
        return of.dequantize_4bit(of.quantize_4bit(values, 64), 64, values.shape, torch.float32)  # type: ignore[no-any-return]

    return both


def through_8_bits(of: Any) -> Callable[[Tensor, Moments8bit], Tensor]:
    def both(values: Tensor, moments: Moments8bit) -> Tensor:
        kept = of.quantize_8bit(values, moments.signed, 256)
        return of.dequantize_8bit(kept, moments.signed, 256, torch.float32)  # type: ignore[no-any-return]

    return both


STEPS: dict[str, Callable[[Tensor, Moments8bit], Tensor]] = {
    "ours": ours,
    "bitsandbytes": bitsandbytes,
    "ours, 4 bits": through_4_bits(kernels),
    "bitsandbytes, 4 bits": through_4_bits(calls),
    "ours, 8 bits": through_8_bits(kernels),
    "bitsandbytes, 8 bits": through_8_bits(calls),
}


@needs_card
@pytest.mark.parametrize("name", STEPS)
def test_a_step_on_another_stream_waits_for_what_comes_before(name: str) -> None:
    """A slow kernel first: one that runs on the default stream all the same would read zeros."""
    gradient, kept = normal(2**20).to(DEVICE), there(moments_8bit((2**20,)))
    expected_moments, moments = copy_of(kept), copy_of(kept)
    expected = STEPS[name](gradient, expected_moments)
    late, stream = torch.zeros_like(gradient), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # a tenth of a second
        late.copy_(gradient)
        found = STEPS[name](late, moments)
        late.zero_()  # nor may it read late
        result = found.clone()
    stream.synchronize()
    assert torch.equal(result, expected)
    assert all(map(torch.equal, moments, expected_moments))


@needs_card
def test_ours_can_be_captured_in_a_graph() -> None:
    gradient, moments = normal(2**16).to(DEVICE), there(moments_8bit((2**16,)))
    others, norm = copy_of(moments), gradient.norm()
    kernels.adam_8bit_direction(gradient, copy_of(moments), LATER, norm)  # compiled before
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = kernels.adam_8bit_direction(gradient, moments, LATER, norm)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(found, kernels.adam_8bit_direction(gradient, others, LATER, norm))
    assert all(map(torch.equal, moments, others))


def test_the_host_waits_for_none_of_ours() -> None:
    gradient, moments = normal(20_000).to(DEVICE), there(moments_8bit((20_000,)))
    for mode in ("default", "error"):  # the first compiles
        with waiting(mode):
            for name in ("ours", "ours, 4 bits", "ours, 8 bits"):
                STEPS[name](gradient, moments)
