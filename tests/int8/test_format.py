"""MXINT8 against its specification in whole numbers and float64; what has the values has the blocks."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_galore.int8 import BLOCK, Int8Blocks, empty_blocks, read_blocks, to_blocks, write_blocks_

Matrix = npt.NDArray[np.float64]
LARGEST = 127 * 2.0**121


def reference(values: Tensor) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Codes and exponents of a matrix of finite values, one block after the other."""
    matrix = values.double().numpy()
    codes = np.zeros(matrix.shape, dtype=np.int64)
    exponents = np.ones((matrix.shape[0], math.ceil(matrix.shape[1] / 32)), dtype=np.int64)
    for row in range(matrix.shape[0]):
        for block in range(exponents.shape[1]):
            part = slice(32 * block, 32 * block + 32)
            largest = np.abs(matrix[row, part]).max()
            exponent = next(e for e in range(1, 249) if largest <= 127 * 2.0 ** (e - 127) or e == 248)
            exponents[row, block] = exponent
            codes[row, part] = np.clip(np.rint(matrix[row, part] / 2.0 ** (exponent - 127)), -127, 127)
    return codes, exponents


def values_of(codes: npt.NDArray[np.int64], exponents: npt.NDArray[np.int64]) -> Matrix:
    steps = np.repeat(2.0 ** (exponents - 127).astype(np.float64), 32, axis=1)[:, : codes.shape[1]]
    found: Matrix = codes * steps
    return found


def matrix(rows: int, columns: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Normal values whose rows differ a thousandfold in size."""
    generator = torch.Generator().manual_seed(seed)
    sizes = 10.0 ** torch.linspace(-3, 0, rows).unsqueeze(1)
    return (torch.randn(rows, columns, generator=generator) * sizes).to(dtype)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def assert_same_blocks(found: Int8Blocks, expected: Int8Blocks) -> None:
    assert torch.equal(found.codes, expected.codes)
    assert torch.equal(found.exponents, expected.exponents)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("columns", [1, 31, 32, 33, 64, 100])
def test_the_nearest_of_the_specification(columns: int, dtype: torch.dtype) -> None:
    values = matrix(7, columns, dtype)
    codes, exponents = reference(values)
    blocks = to_blocks(values)
    assert np.array_equal(blocks.codes.numpy(), codes)
    assert np.array_equal(blocks.exponents.numpy(), exponents)
    assert np.array_equal(read_blocks(blocks, torch.float64).numpy(), values_of(codes, exponents))


def test_scales_of_the_specification_are_six_more() -> None:
    """Its elements are code · 2^-6, from −2 to 2, and its largest power of 2 in a block that of the largest element."""
    values = torch.zeros(1, 32)
    values[0, :3] = torch.tensor([1.0, -1.984375, 0.015625])
    blocks = to_blocks(values)
    assert blocks.codes[0, :3].tolist() == [64, -127, 1]
    assert blocks.exponents.tolist() == [[127 - 6]]


@pytest.mark.parametrize("at_random", [False, True], ids=["nearest", "random"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_values_say_the_blocks(dtype: torch.dtype, at_random: bool) -> None:
    """Also where rounding has taken the largest of a block down to what the next smaller power of 2 has."""
    step = 2.0**-10
    values = matrix(64, 80)
    values[:, 0] = 63.6 * step
    values[:, 1:32] = values[:, 1:32].clamp(-20 * step, 20 * step)
    blocks = to_blocks(values, seeded() if at_random else None)
    read = read_blocks(blocks, dtype)
    assert read.dtype == dtype
    assert torch.equal(read.double(), read_blocks(blocks, torch.float64))  # exact
    for again in (None, seeded(7)):
        assert_same_blocks(to_blocks(read, again), blocks)
    if at_random:
        down = blocks.codes[:, 0] == 126
        assert 0 < down.sum() < len(down)  # both happened
        assert (blocks.exponents[down, 0] == 127 - 11).all()


finite = st.floats(allow_nan=False, allow_infinity=False, width=32)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(finite, min_size=1, max_size=70), st.booleans())
def test_any_values(values: list[float], at_random: bool) -> None:
    """Finite, the nearest or one of the two beside, canonical, and bfloat16 has them."""
    given_values = torch.tensor([values])
    blocks = to_blocks(given_values, seeded() if at_random else None)
    read = read_blocks(blocks, torch.float32)
    assert read.isfinite().all()
    assert torch.equal(read.bfloat16().float(), read)
    assert_same_blocks(to_blocks(read.bfloat16()), blocks)
    codes, exponents = reference(given_values)
    if not at_random:
        assert np.array_equal(blocks.codes.numpy(), codes)
        assert np.array_equal(blocks.exponents.numpy(), exponents)
    else:
        steps = np.repeat(2.0 ** (exponents - 127), 32, axis=1)[:, : len(values)]
        limited = given_values.double().clamp(-LARGEST, LARGEST).numpy()
        assert (np.abs(read.double().numpy() - limited) < steps).all()


def test_the_mean_is_right() -> None:
    """To 5 standard errors, of elements whose codes lie anywhere between two, and of one that is the block's largest.

    What all elements are off together, in standard errors, is small too: no direction is preferred.
    """
    draws, columns = 4000, 32
    step = 2.0**-12
    parts = torch.linspace(-100, 100, columns, dtype=torch.float64) * 1.0137
    parts[0] = 63.75  # 63 and half the step, or 64
    parts[1:] = parts[1:].clamp(-63, 63)
    values = (parts * step).float()
    read = read_blocks(to_blocks(values.expand(draws, columns).clone(), seeded(3)), torch.float64)
    fraction = (values.double() / step) % 1
    errors = step * (fraction * (1 - fraction) / draws).sqrt()
    off = (read.mean(0) - values.double()) / errors.clamp_min(step * 1e-9)
    assert off.abs().max() < 5
    assert abs(off.sum()) / columns**0.5 < 5


def test_what_has_a_code_keeps_it() -> None:
    """No draw moves it: of sums with random numbers one in 500,000 would be rounded up to the next code."""
    codes = torch.arange(-127, 128, dtype=torch.float32).repeat(32 * 500)
    values = (codes * 2.0**-9).view(-1, 32)
    values[:, 0] = 127 * 2.0**-9
    before = to_blocks(values)
    generator = seeded(1)
    for _ in range(5):
        assert_same_blocks(to_blocks(values, generator), before)


def test_a_small_update_arrives_on_average() -> None:
    """A millionth of a step in each of 4 million elements: about four codes move, and all in its direction."""
    moved = 0
    generator = seeded(2)
    for _ in range(4):
        values = torch.full((2**15, 32), 20.0 + 1e-5)
        values[:, 0] = 127.0
        found = to_blocks(values, generator).codes[:, 1:]
        assert ((found == 20) | (found == 21)).all()
        moved += int((found == 21).sum())
    expected = 4 * 2**15 * 31 * (torch.tensor(20.0 + 1e-5).item() - 20)
    assert abs(moved - expected) < 5 * expected**0.5


def test_extremes() -> None:
    tiny, top = 2.0**-126, torch.finfo(torch.float32).max
    values = torch.zeros(8, 32)
    values[1, :2] = torch.tensor([1e-45, -1e-39])  # below half the least
    values[2, :3] = torch.tensor([tiny, 0.51 * tiny, -0.49 * tiny])
    values[3, :2] = torch.tensor([top, -1.0])
    values[4, :2] = torch.tensor([-top, LARGEST])
    values[5, 0] = 127.4 * 2.0**121
    values[6, 0] = 64 * 2.0**121
    values[7, 0] = -0.0
    for generator in (None, seeded()):
        read = read_blocks(to_blocks(values, generator), torch.float64)
        assert (read[[0, 7]] == 0).all()
        assert read[2, 0] == tiny
        assert read[3, 0] == read[5, 0] == read[4, 1] == LARGEST
        assert read[4, 0] == -LARGEST
        assert read[6, 0] == 2.0**127
        if generator is None:
            assert (read[1] == 0).all()
            assert [*read[2, 1:3], read[3, 1]] == [tiny, 0, 0]
    assert to_blocks(values).exponents[:, 0].tolist() == [1, 1, 1, 248, 248, 248, 248, 1]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 5, 31, 39])
@pytest.mark.parametrize("at_random", [False, True], ids=["nearest", "random"])
def test_a_block_that_is_not_finite_is_nan(bad: float, place: int, at_random: bool) -> None:
    """As the specification's scale of 255 says; the others are what they would be. It stays so."""
    values = matrix(3, 40)
    expected = read_blocks(to_blocks(values), torch.float32)
    values[1, place] = bad
    blocks = to_blocks(values, seeded() if at_random else None)
    read = read_blocks(blocks, torch.float32)
    block = slice(0, 32) if place < 32 else slice(32, 40)
    assert read[1, block].isnan().all()
    assert blocks.exponents[1, place // 32] == 255
    read[1, block] = expected[1, block]
    assert read.isfinite().all()
    if not at_random:
        assert torch.equal(read, expected)
    again = to_blocks(read_blocks(blocks, torch.bfloat16))
    assert_same_blocks(again, blocks)


def test_rows_end_anywhere() -> None:
    """What fills up the last block of a row is in no code, and changes none."""
    values = matrix(5, 37)
    whole = to_blocks(torch.nn.functional.pad(values, (0, 27)))
    ragged = to_blocks(values)
    assert ragged.codes.shape == (5, 37)
    assert ragged.exponents.shape == (5, 2)
    assert torch.equal(ragged.codes, whole.codes[:, :37])
    assert torch.equal(ragged.exponents, whole.exponents)
    read = read_blocks(ragged, torch.float32)
    assert read.is_contiguous()
    assert torch.equal(read, read_blocks(whole, torch.float32)[:, :37])


def test_written_in_place_into_parts() -> None:
    """Of rows and of blocks: what tiles do."""
    values = matrix(6, 96)
    blocks = empty_blocks((6, 96))
    assert (read_blocks(blocks, torch.float32) == 0).all()
    write_blocks_(Int8Blocks(blocks.codes[:4], blocks.exponents[:4]), values[:4].clone())
    write_blocks_(Int8Blocks(blocks.codes[4:, 32:], blocks.exponents[4:, 1:]), values[4:, 32:].clone())
    expected = to_blocks(values)
    assert torch.equal(blocks.codes[:4], expected.codes[:4])
    assert torch.equal(blocks.codes[4:, 32:], expected.codes[4:, 32:])
    assert (blocks.codes[4:, :32] == 0).all()


def test_the_size_of_a_weight() -> None:
    blocks = empty_blocks((64, 4 * BLOCK))
    assert 8 * (blocks.codes.nbytes + blocks.exponents.nbytes) == 8.25 * blocks.codes.numel()


@pytest.mark.parametrize("seed", range(3))
def test_how_far_from_normal_values(seed: int) -> None:
    """At 8.25 bits an element: a root mean square of 0.8 % of theirs, and not the 0.17 % of a bfloat16."""
    values = torch.randn(64, 1024, generator=seeded(seed))
    error = read_blocks(to_blocks(values), torch.float32) - values
    assert 0.007 < error.norm() / values.norm() < 0.009
