"""Tests of our kernels for weights in 8 bits in Triton's interpreter: `tests/kernels/test_int8.py` runs this file.

What is read and written is exact in bfloat16, so that it does not matter that the interpreter cuts one off.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_galore import kernels
from hf_galore.int8 import Int8Blocks, Int8Weight, add_int8_, empty_blocks, products, read_blocks, to_blocks
from hf_galore.int8.format import BLOCK, LARGEST, write_blocks_
from hf_galore.integrations import bitsandbytes_checks as checks
from hf_galore.kernels import int8 as own
from hf_galore.kernels import where
from hf_galore.optim import GaLoreAdamW
from tests.support.own_int8 import SHAPES, copy_of, in_8_bits, noise_of, plain_read, step_of, weights

assert os.environ.get("TRITON_INTERPRET") == "1"

SEED = 2**62 + 12345


@pytest.fixture(autouse=True)
def _one_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program of many blocks: the interpreter takes as long for one of few."""
    monkeypatch.setattr(own, "_ROWS", 1024)


@pytest.fixture
def _several_programs(monkeypatch: pytest.MonkeyPatch, _one_program: None) -> None:
    monkeypatch.setattr(own, "_ROWS", 32)


def added(blocks: Int8Blocks, update: Tensor, **how: Any) -> Int8Blocks:
    """What the kernel makes of them."""
    new = copy_of(blocks)
    own.add_int8_(*new, update, **{"alpha": -0.5, "decay": 1.0, "seed": SEED, **how})
    return new


def assert_same(found: Int8Blocks, expected: Int8Blocks) -> None:
    assert torch.equal(found.codes, expected.codes)
    assert torch.equal(found.exponents, expected.exponents)


# ---- reading


@pytest.mark.usefixtures("_several_programs")
@pytest.mark.parametrize("dtype", kernels.DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_are_those_of_plain_torch(shape: tuple[int, int], dtype: torch.dtype) -> None:
    blocks = weights(shape)
    found = kernels.read_int8(*blocks, dtype)
    assert (found.shape, found.dtype, found.is_contiguous()) == (shape, dtype, True)
    assert torch.equal(found, plain_read(blocks, dtype))


@pytest.mark.parametrize("dtype", kernels.DTYPES)
def test_blocks_of_zeros_the_smallest_the_largest_and_what_is_not_finite(dtype: torch.dtype) -> None:
    values = torch.randn(3, 6 * BLOCK)
    values[:, :32] = 0
    values[:, 32:64] *= 1e-37  # no normal numbers among them
    values[:, 64:96] *= 1e37
    values[1, 100], values[1, 140], values[2, 170] = math.inf, -math.inf, math.nan
    blocks = to_blocks(values)
    expected = plain_read(blocks, dtype)
    assert not torch.equal(expected.isfinite(), torch.ones_like(values, dtype=torch.bool))
    assert torch.equal(kernels.read_int8(*blocks, dtype).nan_to_num(7.0), expected.nan_to_num(7.0))
    # Exponents that no other numbers have, all codes.
    codes = torch.arange(-128, 128).to(torch.int8).expand(256, 256).contiguous()
    every = Int8Blocks(codes, torch.arange(256).to(torch.uint8)[:, None].expand(256, 8).contiguous())
    assert torch.equal(kernels.read_int8(*every, dtype).nan_to_num(7.0), plain_read(every, dtype).nan_to_num(7.0))


def test_columns_and_rows_of_a_matrix() -> None:
    blocks = weights((40, 303))
    whole = plain_read(blocks, torch.float32)
    for rows, first, last in ((slice(0, 40), 0, 2), (slice(3, 17), 1, 4), (slice(39, 40), 8, 10), (slice(0, 0), 0, 1)):
        columns = slice(first * BLOCK, last * BLOCK)
        part = Int8Blocks(blocks.codes[rows, columns], blocks.exponents[rows, first:last])
        found = read_blocks(part, torch.float32)
        assert found.is_contiguous()
        assert torch.equal(found, whole[rows, columns])


def test_other_shapes_than_a_matrix() -> None:
    blocks = weights((6, 70))
    stack = Int8Blocks(blocks.codes.view(2, 3, 70), blocks.exponents.view(2, 3, 3))
    assert torch.equal(kernels.read_int8(*stack, torch.float32), plain_read(stack, torch.float32))
    row = Int8Blocks(blocks.codes[1], blocks.exponents[1])
    assert torch.equal(kernels.read_int8(*row, torch.float32), plain_read(row, torch.float32))


# ---- updating


@pytest.mark.usefixtures("_several_programs")
@pytest.mark.parametrize("seed", [None, SEED], ids=["nearest", "random"])
@pytest.mark.parametrize("shape", SHAPES)
def test_what_8_bits_have_is_not_rounded(shape: tuple[int, int], seed: int | None) -> None:
    blocks, wanted = weights(shape), weights(shape, seed=1)
    values, zeros = plain_read(wanted, torch.float32), torch.zeros(shape)
    # Both have few bits and are of similar size, so that the difference is exact.
    assert_same(added(blocks, 2 * (plain_read(blocks, torch.float32) - values), seed=seed), wanted)
    assert_same(added(blocks, zeros, seed=seed), blocks)
    # Half of it all: the same codes, and exponents that are one less.
    assert_same(added(blocks, zeros, decay=0.5, seed=seed), Int8Blocks(blocks.codes, blocks.exponents - 1))
    # Nothing of it: blocks of zeros have the smallest exponent. From there it comes back.
    assert_same(added(blocks, zeros, decay=0.0, seed=seed), empty_blocks(shape))
    assert_same(added(empty_blocks(shape), values, alpha=1.0, seed=seed), wanted)


@pytest.mark.parametrize("shape", SHAPES)
def test_to_the_nearest_as_plain_torch(shape: tuple[int, int]) -> None:
    blocks, update = weights(shape), 1e-2 * torch.randn(shape)
    expected = empty_blocks(shape)
    write_blocks_(expected, plain_read(blocks, torch.float32).add_(update, alpha=-0.5))
    assert_same(added(blocks, update, seed=None), expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_rounded_at_random_to_one_of_the_two_beside(shape: tuple[int, int]) -> None:
    blocks, update = weights(shape), 1e-2 * torch.randn(shape)
    exact = 0.75 * plain_read(blocks, torch.float64) - 0.5 * update.double()
    found = added(blocks, update, decay=0.75)
    assert ((plain_read(found, torch.float64) - exact).abs() < (1 + 1e-4) * step_of(to_blocks(exact.float()))).all()
    assert_same(to_blocks(plain_read(found, torch.float32)), found)  # exponents are the smallest that fit


def test_rounding_is_right_on_average() -> None:
    shape, rounds = (64, 320), 24
    blocks, update = weights(shape), 1e-2 * torch.randn(shape, generator=torch.Generator().manual_seed(3))
    exact = plain_read(blocks, torch.float64) - 0.5 * update.double()
    found = [plain_read(added(blocks, update, seed=seed), torch.float64) for seed in range(rounds)]
    errors = (torch.stack(found) - exact) / step_of(to_blocks(exact.float()))
    # A number that is rounded up with probability f has a variance of f(1 − f), a quarter at most. Neither all of them
    # together nor an element, a row or a column is off.
    for mean in (errors.mean(), errors.mean(dim=0), errors.mean(dim=(0, 1)), errors.mean(dim=(0, 2))):
        assert (mean.abs() < 6 * 0.5 / math.sqrt(errors.numel() / mean.numel())).all()
    for fraction in (0.01, 0.3, 0.97):
        largest = Int8Blocks(torch.full(shape, LARGEST, dtype=torch.int8), torch.full((64, 10), 127).byte())
        codes = added(largest, torch.full(shape, -fraction), alpha=1.0).codes.double()
        assert set(codes.unique().tolist()) == {126.0, 127.0}
        sigma = math.sqrt(fraction * (1 - fraction) / codes.numel())
        assert abs((LARGEST - codes).mean().item() - fraction) < 5 * sigma


def test_random_numbers_are_those_of_a_seed_and_a_place() -> None:
    shape = (64, 320)
    half = Int8Blocks(torch.full(shape, 100, dtype=torch.int8), torch.full((64, 10), 127).byte())
    update = torch.full(shape, 0.5)
    first, again, other = (added(half, update, alpha=1.0, seed=seed) for seed in (SEED, SEED, SEED + 1))
    assert_same(first, again)
    ups = (first.codes == 101).double()
    # As coins: with another seed, of other rows, of other columns, of a seed that differs in its upper half.
    upper = added(half, update, alpha=1.0, seed=SEED - 2**40)
    for others in ((other.codes == 101).double(), (upper.codes == 101).double(), ups.roll(1, 0), ups.roll(1, 1)):
        assert abs((ups == others).double().mean().item() - 0.5) < 5 * 0.5 / math.sqrt(ups.numel())
    assert len(first.codes.unique(dim=0)) == 64
    assert len(first.codes.unique(dim=1)[0]) == 320


@pytest.mark.parametrize("seed", [0, SEED])
def test_random_numbers_are_philox_own(seed: int) -> None:
    """Whatever release of Triton it is: a run that resumes on another goes on with the same."""
    blocks = Int8Blocks(torch.zeros(5, 70, dtype=torch.int8), torch.full((5, 3), 127).byte())
    blocks.codes[:, ::BLOCK] = LARGEST
    fraction = torch.linspace(0, 1, 350).view(5, 70)
    fraction[:, ::BLOCK] = 0
    found = added(blocks, fraction, alpha=1.0, seed=seed, first_row=3)
    expected = blocks.codes + (noise_of(seed, range(3, 8), 70) < fraction)
    assert torch.equal(found.codes, expected.to(torch.int8))


@pytest.mark.usefixtures("_several_programs")
@pytest.mark.parametrize("size", [7, 32, 50])
def test_how_a_matrix_is_divided_does_not_matter(size: int) -> None:
    blocks, update = weights((50, 70)), 1e-2 * torch.randn(50, 70)
    whole, parts = added(blocks, update), copy_of(blocks)
    for start in range(0, 50, size):
        rows = slice(start, start + size)
        own.add_int8_(
            parts.codes[rows], parts.exponents[rows], update[rows], alpha=-0.5, decay=1.0, seed=SEED, first_row=start
        )
    assert_same(parts, whole)


@pytest.mark.parametrize("seed", [None, SEED])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int32])
def test_what_is_skipped_stays_as_it_is(dtype: torch.dtype, seed: int | None) -> None:
    blocks, update = weights((33, 70)), torch.randn(33, 70)
    expected = added(blocks, update, decay=0.9, seed=seed)
    assert_same(added(blocks, update, decay=0.9, seed=seed, skip=torch.zeros((), dtype=dtype)), expected)
    update[3, 3] = math.nan
    assert_same(added(blocks, update, decay=0.9, seed=seed, skip=torch.ones((), dtype=dtype)), blocks)


@pytest.mark.parametrize("seed", [None, SEED])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_block_that_is_not_finite_is_so_alone_and_stays_so(bad: float, seed: int | None) -> None:
    blocks, update = weights((3, 96)), 1e-2 * torch.randn(3, 96)
    expected = added(blocks, update, seed=seed)
    update[1, 40] = bad
    found = added(blocks, update, seed=seed)
    expected.exponents[1, 1], expected.codes[1, 32:64] = 255, 0  # NaN, all of it
    assert_same(found, expected)
    assert plain_read(found, torch.float32)[1, 32:64].isnan().all()
    assert_same(added(found, torch.zeros(3, 96), seed=seed), found)


@pytest.mark.parametrize("seed", [None, SEED])
def test_the_largest_and_the_smallest_floats(seed: int | None) -> None:
    top, tiny = torch.finfo(torch.float32).max, torch.finfo(torch.float32).tiny
    values = torch.zeros(6, 32)
    values[0, :2], values[1, :2], values[2, 0] = top, -top, 127.4 * 2.0**121
    values[3, 0], values[4, 1] = tiny, 0.51 * tiny
    values[5, 0] = 64 * 2.0**121
    found = added(empty_blocks((6, 32)), values, alpha=1.0, seed=seed)
    expected = empty_blocks((6, 32))
    write_blocks_(expected, values.clone())
    assert found.exponents[:, 0].tolist() == expected.exponents[:, 0].tolist() == [248, 248, 248, 1, 1, 248]
    assert plain_read(found, torch.float32).isfinite().all()
    apart = (found.codes.int() - expected.codes.int()).abs()
    assert apart.max() <= (0 if seed is None else 1)


@pytest.mark.parametrize("dtype", kernels.DTYPES)
def test_an_update_may_have_any_dtype_and_strides(dtype: torch.dtype) -> None:
    blocks, update = weights((33, 70)), (1e-2 * torch.randn(33, 70)).to(dtype)
    expected = added(blocks, update.float())
    assert_same(added(blocks, update), expected)
    assert_same(added(blocks, update.mT.contiguous().mT), expected)
    wide = torch.zeros(33, 80, dtype=dtype)
    wide[:, 5:75] = update
    assert_same(added(blocks, wide[:, 5:75]), expected)
    row = update[:1]
    assert_same(added(blocks, row.expand(33, 70)), added(blocks, row.repeat(33, 1)))


# ---- as a weight has it


@pytest.fixture(autouse=True)
def _serving(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels serve on this CPU; those for weights in 8 bits are known to be right."""
    monkeypatch.setattr(where, "_look", lambda tensor: True)
    known = {
        (f"own {name}", torch.device("cpu"), dtype): True
        for name in ("read_int8", "add_int8_")
        for dtype in kernels.DTYPES
    }
    monkeypatch.setattr(checks, "_verdicts", known)
    monkeypatch.setattr(checks, "_warned", set())


@pytest.mark.parametrize("tile", [700, 2**22])
def test_a_weight_is_updated_tile_by_tile(tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "TILE_ELEMENTS", tile)
    blocks, update = weights((33, 70)), (1e-2 * torch.randn(33, 70)).bfloat16()
    weight = Int8Weight(*copy_of(blocks))
    version = weight._version
    generator = torch.Generator().manual_seed(SEED)
    add_int8_(weight, update.__getitem__, alpha=-0.5, decay=0.9, skip=torch.zeros(()), generator=generator)
    assert weight._version > version
    assert_same(weight.blocks, added(blocks, update, decay=0.9))
    add_int8_(weight, update.__getitem__, alpha=-0.5, decay=0.9)
    assert_same(weight.blocks, added(added(blocks, update, decay=0.9), update, decay=0.9, seed=None))


def trained(seed: int, serve: Callable[[Tensor], bool], monkeypatch: pytest.MonkeyPatch) -> tuple[list[float], Tensor]:
    """Losses of a small network with weights in 8 bits, and one of them."""
    monkeypatch.setattr(where, "_look", serve)
    torch.manual_seed(0)
    model = in_8_bits(nn.Sequential(nn.Linear(64, 48, bias=False), nn.Tanh(), nn.Linear(48, 64, bias=False)))
    x = torch.randn(32, 64)
    groups = [
        {"params": list(model.parameters()), "rank": 8, "update_proj_gap": 4, "scale": 1.0, "rounding_seed": seed}
    ]
    optimizer = GaLoreAdamW(groups, lr=5e-3, weight_decay=0.01)
    losses = []
    for _ in range(6):
        loss = (model(x) - x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    *_, weight = model.parameters()
    assert isinstance(weight, Int8Weight)
    return losses, weight.dequantized()


def test_a_training_is_that_of_plain_torch_but_for_random_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    used = []

    def launch(name: str, *args: Any, **constants: Any) -> None:
        used.append(name)
        where.launch(name, *args, **constants)

    monkeypatch.setattr(own, "launch", launch)
    ours, weight = trained(0, lambda tensor: True, monkeypatch)
    assert set(used) == {"read_int8", "add_int8"}
    used.clear()
    plain, expected = trained(0, lambda tensor: False, monkeypatch)
    assert used == []
    other, apart = trained(1, lambda tensor: False, monkeypatch)
    assert ours[0] == plain[0]  # nothing is rounded before
    assert ours[-1] < 0.9 * ours[0]
    assert abs(ours[-1] - plain[-1]) < 4 * abs(other[-1] - plain[-1]) + 1e-3
    assert (weight - expected).norm() < 2 * (apart - expected).norm()


# ---- the checks on first use


@pytest.mark.parametrize("dtype", kernels.DTYPES)
@pytest.mark.parametrize("name", ["read_int8", "add_int8_"])
def test_right_kernels_pass_their_check(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "_verdicts", {})
    assert checks.own_is_right(name, torch.zeros(1), dtype)


# What a launch is given, and what is wrong with it.
def _times(position: int, factor: float) -> Callable[[list[Any], dict[str, Any]], None]:
    def change(args: list[Any], how: dict[str, Any]) -> None:
        args[position] = args[position] * factor

    return change


def _never_random(args: list[Any], how: dict[str, Any]) -> None:
    how["is_random"] = False


def _never_skipped(args: list[Any], how: dict[str, Any]) -> None:
    how["has_skip"] = False


def _other_exponents(args: list[Any], how: dict[str, Any]) -> None:
    args[2] = args[2].roll(1, 0)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("add_int8_", _times(11, 1.1)),
        ("add_int8_", _times(12, 1.02)),
        ("add_int8_", _times(11, -1)),
        ("add_int8_", _never_random),
        ("add_int8_", _never_skipped),
        ("read_int8", _other_exponents),
    ],
    ids=["alpha", "decay", "sign", "never random", "never skipped", "exponents"],
)
def test_what_they_may_get_wrong_is_seen(
    name: str,
    change: Callable[[list[Any], dict[str, Any]], None],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(checks, "_verdicts", {})

    def launch(kernel: str, programs: int, *args: Any, **how: Any) -> None:
        given = list(args)
        change(given, how)
        where.launch(kernel, programs, *given, **how)

    monkeypatch.setattr(own, "launch", launch)
    assert not checks.own_is_right(name, torch.zeros(1), torch.bfloat16)
    assert "gives wrong results" in caplog.text
