"""Our kernels for weights in 8 bits on a card: against plain torch there, and in a training's steps.

With HF_GALORE_CARD=cpu they are skipped, but for TRITON_INTERPRET=1, which has Triton interpret them there.
"""

from __future__ import annotations

import gc
import math
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_galore import kernels
from hf_galore.int8 import (
    BLOCK,
    Int8Blocks,
    Int8Weight,
    add_int8_,
    empty_blocks,
    int8_linear,
    is_int8,
    read_blocks,
    times_weight,
    to_blocks,
)
from hf_galore.int8.format import write_blocks_
from hf_galore.kernels import int8 as own
from hf_galore.kernels import where
from hf_galore.optim import GaLoreAdamW8bit
from tests.support.card import DEVICE, ON_CARD, SMALL, SMALL_RANK, llama, options_of, sized, tokens, wait, waiting
from tests.support.own_int8 import copy_of, in_8_bits, noise_of, plain_read, step_of

DTYPES = kernels.DTYPES
INTERPRETED = not ON_CARD and os.environ.get("TRITON_INTERPRET") == "1"
# Matrices of a 7B model, rows that are no whole number of blocks, and of 16 bytes; one element.
SHAPES = (*sized(((4096, 4096), (4096, 11008)), ((64, 96),)), (1001, 333) if ON_CARD else (11, 333), (33, 7), (1, 1))
SEED = 2**62 + 12345

Serve = Callable[[Tensor], bool]
look: Serve = where._look


@pytest.fixture(autouse=True)
def _served(monkeypatch: pytest.MonkeyPatch) -> None:
    if INTERPRETED:
        monkeypatch.setattr(where, "_look", lambda tensor: True)
        monkeypatch.setattr(own, "_ROWS", 1024)  # the interpreter takes as long for a program of few blocks
    elif not kernels.serves(torch.zeros(1, device=DEVICE)):
        pytest.skip(f"no Triton kernels for this {DEVICE.type}")


needs_card = pytest.mark.skipif(not ON_CARD, reason="a CPU has no streams")


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Made where the kernels are."""
    return torch.randn(shape, generator=torch.Generator(DEVICE).manual_seed(seed), device=DEVICE)


def weights(shape: tuple[int, ...], seed: int = 0) -> Int8Blocks:
    """Of usual sizes, that differ by rows."""
    return to_blocks(0.02 * torch.linspace(0.5, 2, shape[0], device=DEVICE)[:, None] * normal(*shape, seed=seed))


def added(blocks: Int8Blocks, update: Tensor, **how: Any) -> Int8Blocks:
    new = copy_of(blocks)
    kernels.add_int8_(*new, update, **{"alpha": -0.5, "decay": 1.0, "seed": SEED, **how})
    return new


def assert_same(found: Int8Blocks, expected: Int8Blocks) -> None:
    assert torch.equal(found.codes, expected.codes)
    assert torch.equal(found.exponents, expected.exponents)


# ---- reading


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_are_those_of_plain_torch(shape: tuple[int, int], dtype: torch.dtype) -> None:
    blocks = weights(shape)
    expected = plain_read(blocks, dtype)
    assert torch.equal(read_blocks(blocks, dtype), expected)
    for part in (slice(0, BLOCK), slice(BLOCK, 3 * BLOCK), slice(BLOCK, None)):
        kept = Int8Blocks(
            blocks.codes[:, part],
            blocks.exponents[:, part.start // BLOCK : None if part.stop is None else part.stop // BLOCK],
        )
        found = read_blocks(kept, dtype)
        assert found.is_contiguous()
        assert torch.equal(found, expected[:, part])


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_code_with_every_exponent(dtype: torch.dtype) -> None:
    codes = torch.arange(-128, 128, device=DEVICE).to(torch.int8).expand(256, 256).contiguous()
    exponents = torch.arange(256, device=DEVICE).to(torch.uint8)[:, None].expand(256, 8).contiguous()
    every = Int8Blocks(codes, exponents)
    assert torch.equal(read_blocks(every, dtype).nan_to_num(7.0), plain_read(every, dtype).nan_to_num(7.0))


def test_a_product_is_that_of_plain_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = weights(SHAPES[0])
    x, delta = normal(64, SHAPES[0][1]).bfloat16(), normal(64, SHAPES[0][0], seed=1).bfloat16()
    found = int8_linear(x, blocks, None), times_weight(delta, blocks)
    monkeypatch.setattr(where, "_look", lambda tensor: False)
    expected = int8_linear(x, blocks, None), times_weight(delta, blocks)
    assert all(map(torch.equal, found, expected))


# ---- updating


@pytest.mark.parametrize("seed", [None, SEED], ids=["nearest", "random"])
@pytest.mark.parametrize("shape", SHAPES)
def test_what_8_bits_have_is_not_rounded(shape: tuple[int, int], seed: int | None) -> None:
    blocks, wanted = weights(shape), weights(shape, seed=1)
    values, zeros = plain_read(wanted, torch.float32), torch.zeros(shape, device=DEVICE)
    assert_same(added(blocks, 2 * (plain_read(blocks, torch.float32) - values), seed=seed), wanted)
    assert_same(added(blocks, zeros, seed=seed), blocks)
    assert_same(added(blocks, zeros, decay=0.5, seed=seed), Int8Blocks(blocks.codes, blocks.exponents - 1))
    assert_same(added(blocks, zeros, decay=0.0, seed=seed), empty_blocks(shape, DEVICE))
    assert_same(added(empty_blocks(shape, DEVICE), values, alpha=1.0, seed=seed), wanted)


@pytest.mark.parametrize("dtype", DTYPES)
def test_to_the_nearest_as_plain_torch(dtype: torch.dtype) -> None:
    blocks, update = weights(SHAPES[0]), (1e-3 * normal(*SHAPES[0], seed=1)).to(dtype)
    expected = empty_blocks(SHAPES[0], DEVICE)
    write_blocks_(expected, plain_read(blocks, torch.float32).mul_(0.99).add_(update.float(), alpha=-0.5))
    found = added(blocks, update, decay=0.99, seed=None)
    # A product and a sum may be rounded once or twice, which decides where two codes are equally near.
    apart = (plain_read(found, torch.float32) - plain_read(expected, torch.float32)).abs() / step_of(expected)
    assert apart.max() <= 2
    assert (apart > 0).double().mean() < 1e-3


@pytest.mark.parametrize("dtype", DTYPES)
def test_at_random_to_one_of_the_two_beside_and_right_on_average(dtype: torch.dtype) -> None:
    shape, rounds = sized((1024, 1024), (32, 96)), sized(64, 6)
    blocks, update = weights(shape), (1e-3 * normal(*shape, seed=1)).to(dtype)
    exact = 0.99 * plain_read(blocks, torch.float64) - 0.5 * update.double()
    steps = step_of(to_blocks(exact.float()))
    total = torch.zeros_like(exact)
    for seed in range(rounds):
        found = added(blocks, update, decay=0.99, seed=seed)
        errors = (plain_read(found, torch.float64) - exact) / steps
        assert errors.abs().max() < 1 + 1e-3
        assert errors.abs().max() > 0.5
        assert_same(to_blocks(plain_read(found, torch.float32)), found)
        total += errors
    mean = total / rounds
    for part in (mean.mean(), mean.mean(dim=0), mean.mean(dim=1)):
        assert part.abs().max() < 6 * 0.5 / math.sqrt(rounds * mean.numel() / part.numel()) + 1e-5
    assert mean.abs().max() < 7 * 0.5 / math.sqrt(rounds)


def test_random_numbers_are_philox_own() -> None:
    blocks = Int8Blocks(torch.zeros(5, 70, dtype=torch.int8), torch.full((5, 3), 127).byte())
    blocks.codes[:, ::BLOCK] = 127
    fraction = torch.linspace(0, 1, 350).view(5, 70)
    fraction[:, ::BLOCK] = 0
    expected = (blocks.codes + (noise_of(SEED, range(3, 8), 70) < fraction)).to(torch.int8)
    there = Int8Blocks(*(part.to(DEVICE) for part in blocks))
    found = added(there, fraction.to(DEVICE), alpha=1.0, first_row=3)
    assert torch.equal(found.codes.cpu(), expected)


def test_how_a_matrix_is_divided_does_not_matter() -> None:
    shape = SHAPES[0]
    blocks, update = weights(shape), (1e-3 * normal(*shape, seed=1)).bfloat16()
    whole = added(blocks, update, decay=0.99, skip=torch.zeros((), device=DEVICE))
    weight = Int8Weight(*copy_of(blocks))
    generator = torch.Generator(DEVICE).manual_seed(SEED)
    skip = torch.zeros((), device=DEVICE)
    add_int8_(weight, update.__getitem__, alpha=-0.5, decay=0.99, skip=skip, generator=generator)
    assert_same(weight.blocks, whole)
    assert_same(added(blocks, update.mT.contiguous().mT, decay=0.99), whole)
    assert not torch.equal(added(blocks, update, decay=0.99, seed=SEED + 1).codes, whole.codes)


@pytest.mark.parametrize("seed", [None, SEED], ids=["nearest", "random"])
def test_what_is_skipped_stays_and_what_is_not_finite_is_so_alone(seed: int | None) -> None:
    shape = SHAPES[0]
    blocks, update = weights(shape), 1e-3 * normal(*shape, seed=1)
    expected = added(blocks, update, seed=seed)
    update[1, 40] = math.nan
    update[2, 50] = math.inf
    assert_same(added(blocks, update, seed=seed, skip=torch.ones((), device=DEVICE)), blocks)
    for row in (1, 2):
        expected.exponents[row, 1], expected.codes[row, 32:64] = 255, 0  # NaN, all of it
    assert_same(added(blocks, update, seed=seed), expected)


# ---- streams, graphs


@needs_card
def test_a_step_on_another_stream_waits_for_what_comes_before() -> None:
    blocks, update = weights((4096, 1024)), 1e-3 * normal(4096, 1024, seed=1)
    expected = added(blocks, update)
    late, new, stream = torch.zeros_like(update), copy_of(blocks), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # a tenth of a second
        late.copy_(update)
        kernels.add_int8_(*new, late, alpha=-0.5, decay=1.0, seed=SEED)
        late.zero_()
        values = kernels.read_int8(*new, torch.float32)
    stream.synchronize()
    assert_same(new, expected)
    assert torch.equal(values, plain_read(expected, torch.float32))


@needs_card
def test_they_can_be_captured_in_a_graph() -> None:
    blocks, update = weights((256, 1024)), 1e-3 * normal(256, 1024, seed=1)
    expected = added(blocks, update)  # compiles
    new = copy_of(blocks)
    kernels.read_int8(*new, torch.bfloat16)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kernels.add_int8_(*new, update, alpha=-0.5, decay=1.0, seed=SEED)
        values = kernels.read_int8(*new, torch.bfloat16)
    graph.replay()
    torch.cuda.synchronize()
    assert_same(new, expected)
    assert torch.equal(values, plain_read(expected, torch.bfloat16))


# ---- a training


def trained(layerwise: bool, steps: int, seed: int = 0, mode: str = "default") -> tuple[list[float], dict[str, Tensor]]:
    """Losses and weights of a small Llama whose layers are kept in 8 bits; all of its steps have the same tokens."""
    width: dict[str, Any] = sized({"hidden_size": 512, "intermediate_size": 1376}, {})
    model = in_8_bits(llama(2, **{**SMALL, **width}))
    assert sum(map(is_int8, model.parameters())) == 14
    torch.manual_seed(seed)  # that of the rounding too
    optimizer = GaLoreAdamW8bit(
        model.parameters(),
        lr=1e-3,
        weight_decay=0.1,
        param_options=options_of(model, sized(128, SMALL_RANK), update_proj_gap=10**6, stagger=False, scale=2.0),
        module=model,
        layerwise=layerwise,
    )
    ids, losses = tokens(model, 4, sized(64, 16)), []
    for step in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        wait()
        with waiting(mode if step > 1 else "default"):  # the first compiles, and refreshes
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.detach())
    optimizer.close()
    found = {name: weight.dequantized() for name, weight in model.named_parameters() if isinstance(weight, Int8Weight)}
    return [loss.item() for loss in losses], found


@pytest.mark.parametrize("layerwise", [False, True], ids=["plain", "layerwise"])
def test_a_training_is_that_of_plain_torch_but_for_random_numbers(
    layerwise: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = sized(12, 3)
    ours, weights_of_ours = trained(layerwise, steps, mode="error")
    again, weights_again = trained(layerwise, steps)
    monkeypatch.setattr(where, "_look", lambda tensor: look(tensor) and tensor.dtype != torch.int8)
    plain, weights_of_plain = trained(layerwise, steps)
    other, weights_of_other = trained(layerwise, steps, seed=1)
    assert ours[0] == pytest.approx(plain[0], rel=1e-3)
    assert ours[-1] < ours[0]
    assert abs(ours[-1] - plain[-1]) < 4 * abs(other[-1] - plain[-1]) + 0.02 * (plain[0] - plain[-1])
    for name, weight in weights_of_plain.items():
        apart, usual = ((found[name] - weight).float().norm() for found in (weights_of_ours, weights_of_other))
        assert apart < 1.5 * usual + 1e-6
    # Fused attention adds with atomics: the same but for that.
    assert again == pytest.approx(ours, rel=1e-2)
    for name, weight in weights_of_ours.items():
        assert (weights_again[name] - weight).float().norm() < 0.5 * weight.float().norm()


@needs_card
def test_an_update_takes_no_memory_but_that_of_its_tiles() -> None:
    shape = (4096, 11008)
    weight = Int8Weight(*weights(shape))
    left, right = normal(4096, 64).bfloat16(), normal(64, 11008, seed=1).bfloat16()
    generator = torch.Generator(DEVICE).manual_seed(0)

    def update(rows: slice) -> Tensor:
        return left[rows] @ right

    def step() -> None:
        add_int8_(weight, update, alpha=-1e-3, decay=0.99, skip=None, generator=generator)

    step()  # compiles, and makes cuBLAS' workspace
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    # One tile's rows of U while the next one's are computed.
    assert torch.cuda.max_memory_allocated() - before <= 2 * 2 * 2**22 + 2**20
