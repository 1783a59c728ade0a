"""Low-rank gradients in 8 bits: how near they are, what sums of many come to, and what is not finite."""

from __future__ import annotations

import functools
import itertools
import math

import pytest
import torch
from torch import Tensor

from hf_galore.lowrank import rounding
from hf_galore.lowrank.float8 import BLOCK, Dither, Float8, Thresholds, add_float8_, from_float8, to_float8

SHAPES = [(12, 40), (1,), (3, 256), (64, 65), (0, 8)]
SMALLEST = 2.0**-9 / 448  # the lowest code, beside its block's largest element


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def read(kept: Float8) -> Tensor:
    return from_float8(kept, torch.float32)


def thresholds(seed: int = 0) -> Thresholds:
    return Dither(seed).next(torch.device("cpu"))


def largest_of_block(values: Tensor) -> Tensor:
    """For each element, the largest magnitude of its block."""
    blocks = values.reshape(-1).abs().split(BLOCK)
    return torch.cat([block.amax().expand(len(block)) for block in blocks]).view(values.shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_each_element_is_within_a_sixteenth(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    # Sizes over six powers of ten, as rows of several singular directions have.
    values = (random(1, *shape) * torch.logspace(-3, 3, shape[-1])).to(dtype)
    kept = to_float8(values)
    assert (kept.codes.shape, kept.codes.dtype) == (values.shape, torch.float8_e4m3fn)
    assert (kept.scales.shape, kept.scales.dtype) == ((math.ceil(values.numel() / BLOCK),), torch.float32)
    if not values.numel():
        return
    found = from_float8(kept, dtype)
    assert (found.shape, found.dtype) == (values.shape, dtype)
    allowed = values.abs() / 16 + SMALLEST / 2 * largest_of_block(values)
    rounding_of_dtype = torch.finfo(dtype).eps * values.abs() + 1e-6 * values.abs()  # and of the float32 between
    assert ((found - values).abs() <= allowed + rounding_of_dtype).all()


def test_a_transposed_tensor_is_read_in_its_own_order() -> None:
    values = random(1, 40, 30).mT
    torch.testing.assert_close(read(to_float8(values)), values, rtol=1 / 16 + 1e-6, atol=1e-4)


def test_zeros_are_zeros() -> None:
    values = random(1, 4, BLOCK)
    values[1:3] = 0
    assert torch.equal(read(to_float8(values)) == 0, values == 0)


@pytest.mark.parametrize("size", [1e-30, 1e-10, 1e30])
def test_any_size(size: float) -> None:
    values = random(1, 40, 30) * size
    exact = values.double()
    assert ((read(to_float8(values)).double() - exact).norm() / exact.norm()) < 0.04


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("added", [False, True])
def test_what_is_not_finite_stays_so(bad: float, added: bool) -> None:
    """Codes have no infinity: the scale of the block says it."""
    values = random(1, 4, BLOCK)
    values[2, 3] = bad
    kept = to_float8(torch.zeros(4, BLOCK) if added else values)
    if added:
        add_float8_(kept, values, 1, thresholds())
    assert kept.scales.isfinite().tolist() == [True, True, False, True]
    finite = read(kept).isfinite()
    assert not finite[2].any()
    assert finite[[0, 1, 3]].all()
    add_float8_(kept, values.nan_to_num(0, 0, 0), 1, thresholds())
    assert not read(kept)[2].isfinite().any()


def test_a_sum_is_rounded_to_one_of_its_neighbours_and_is_right_on_average() -> None:
    start, more = random(1, 8, BLOCK), random(2, 8, BLOCK) * torch.logspace(-4, 0, BLOCK)
    exact = read(to_float8(start)) - 0.5 * more
    total, times = torch.zeros_like(exact), 400
    for seed in range(times):
        kept = to_float8(start)
        add_float8_(kept, more, -0.5, thresholds(seed))
        found = read(kept)
        step = (exact.abs() / 8).maximum(SMALLEST * largest_of_block(exact)) * (1 + 1e-5)
        assert ((found - exact).abs() <= step).all()
        total += found
    # The mean of 400 is off by a 40th of a step at most in standard deviation: of 2,048 none reaches 5 of these.
    assert ((total / times - exact).abs() <= 5 / 40 * step).all()


def test_what_is_below_the_lowest_code_is_right_on_average() -> None:
    values = torch.full((64, BLOCK), 0.3 * SMALLEST)
    values[:, 0] = 1
    total, times = torch.zeros_like(values), 100
    for seed in range(times):
        kept = to_float8(torch.zeros_like(values))
        add_float8_(kept, values, 1, thresholds(seed))
        total += read(kept)
    # 1.6 million draws that are 1 for 0.3 of them.
    assert float(total[:, 1:].mean() / times / SMALLEST) == pytest.approx(0.3, abs=0.005)


@pytest.mark.parametrize("times", [16, 64, 256])
def test_many_small_ones_do_not_vanish(times: int) -> None:
    """One large element in the first micro-batch, and then of all the same: a step of the sum is more than twice that.

    Rounded to the nearest it is lost, each time anew. With thresholds at random the error is 0.17 for 64.
    """
    each = random(1, 16, BLOCK)
    first = each.clone()
    first[:, 0] = 1e4
    held, nearest = to_float8(first), to_float8(first)
    dither = Dither(7)
    for _ in range(times - 1):
        add_float8_(held, each, 1, dither.next(each.device))
        nearest = to_float8(read(nearest) + each)

    def apart(kept: Float8) -> tuple[float, float]:
        found, exact = read(kept)[:, 1:], times * each[:, 1:]
        return abs(float((found * exact).sum() / exact.square().sum()) - 1), float(
            (found - exact).norm() / exact.norm()
        )

    bias, error = apart(held)
    assert bias < 0.01
    assert error < 0.06
    if times >= 64:
        assert apart(nearest)[0] > 0.3


def test_thresholds_are_those_of_the_seed_and_move_from_sum_to_sum() -> None:
    shape = torch.Size((4, BLOCK))

    def of_sums(dither: Dither) -> list[Tensor]:
        return [dither.next(torch.device("cpu"))(shape) for _ in range(5)]

    first = Dither(1)
    found = of_sums(first)
    for a, b in itertools.combinations([*found, *of_sums(Dither(2))], 2):
        assert (a - b).abs().mean() > 0.05
    for value, same in zip(found, of_sums(Dither(1)), strict=True):
        assert torch.equal(value, same)
        assert 0 <= value.min() < value.max() < 1
        assert abs(float(value.mean()) - 0.5) < 0.05
    # An element's own thresholds are spread evenly.
    ordered = torch.stack(found).sort(dim=0).values
    assert float((ordered[1:] - ordered[:-1]).min()) > 0.1
    copy = first.copy()
    assert torch.equal(copy.next(torch.device("cpu"))(shape), first.next(torch.device("cpu"))(shape))


def test_parts_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large tensors are taken in parts, whose blocks are those of the whole."""
    values, more = random(1, 50, 77), random(2, 50, 77)
    whole = to_float8(values)
    monkeypatch.setattr(rounding, "CHUNK_ELEMENTS", 4 * BLOCK)
    in_parts = to_float8(values)
    for found, expected in zip(in_parts, whole, strict=True):
        assert torch.equal(found.float(), expected.float())
    assert torch.equal(read(in_parts), read(whole))
    exact = read(whole) + more
    add_float8_(in_parts, more, 1, thresholds())
    assert ((read(in_parts) - exact).abs() <= exact.abs() / 8 + 1e-4).all()


def test_no_temporary_is_larger_than_a_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else holding in 8 bits would take, for a moment, more than it saves."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor) and result.dtype == torch.float32 and not result._is_view():
                self.elements = max(self.elements, result.numel())
            return result

    monkeypatch.setattr(rounding, "CHUNK_ELEMENTS", 4 * BLOCK)
    values = random(1, 64, BLOCK).bfloat16()
    kept = to_float8(values)
    for call in (
        functools.partial(to_float8, values),
        functools.partial(from_float8, kept, torch.bfloat16),
        functools.partial(add_float8_, kept, values, 1, thresholds()),
    ):
        with Largest() as largest:
            call()
        assert 0 < largest.elements <= 4 * BLOCK
