"""Low-rank gradients in 8 bits on a card: as on a CPU, without waiting, and near those of whole numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hf_galore.lowrank.float8 import Dither, Float8, add_float8_, from_float8, to_float8
from hf_galore.optim import GaLoreAdamW8bit
from tests.support.card import DEVICE, SMALL_RANK, llama, options_of, sized, targets, tokens, waiting

SHAPES = [(1000, 37), (64, 256), sized((11008, 1024), (88, 64))]
DTYPES = [torch.float32, torch.bfloat16]


def values(shape: tuple[int, int], dtype: torch.dtype, seed: int = 0) -> Tensor:
    made = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return (made * torch.logspace(-3, 3, shape[1])).to(dtype)


def read(kept: Float8) -> Tensor:
    return from_float8(kept, torch.float32).cpu()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_codes_are_those_of_a_cpu(shape: tuple[int, int], dtype: torch.dtype) -> None:
    there = values(shape, dtype)
    here, on_card = to_float8(there), to_float8(there.to(DEVICE))
    torch.testing.assert_close(on_card.scales.cpu(), here.scales, rtol=1e-6, atol=0)
    # A division may round otherwise and tip a code over, by one step: an eighth of a number's power of 2, and of the
    # smallest 2^-9. What is of bfloat16 is halfway between two codes more often than what is of float32.
    apart = (read(on_card) - read(here)).abs()
    step = here.scales.repeat_interleave(256)[: there.numel()].view(shape) * 2**-9
    assert (apart <= torch.maximum(read(here).abs() / 7, step) * (1 + 1e-5)).all()
    assert (apart > 1e-5 * read(here).abs()).float().mean() < 1e-3


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sum_is_within_a_step_and_waits_for_nothing(shape: tuple[int, int], dtype: torch.dtype) -> None:
    start, more = values(shape, dtype).to(DEVICE), values(shape, dtype, seed=1).to(DEVICE)
    kept = to_float8(start)
    exact = read(kept) + more.float().cpu()
    with waiting("error"):
        add_float8_(kept, more, 1, Dither(3).next(start.device))
        from_float8(kept, dtype)
    lowest = kept.scales.amax().item() * 2**-9
    assert ((read(kept) - exact).abs() <= exact.abs() / 8 * (1 + 1e-5) + lowest).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(bad: float) -> None:
    spoilt = values((64, 256), torch.bfloat16)
    spoilt[3, 5] = bad
    found = from_float8(to_float8(spoilt.to(DEVICE)), torch.bfloat16).cpu()
    assert not found[3].isfinite().any()
    assert found[[0, 1, 2, 4]].isfinite().all()


def test_an_accumulation_is_near_that_of_whole_numbers() -> None:
    def window(bits: int) -> list[Tensor]:
        model = llama(2, torch.bfloat16)
        options = options_of(model, sized(256, SMALL_RANK), gradient_bits=bits)
        optimizer = GaLoreAdamW8bit(
            model.parameters(), param_options=options, module=model, layerwise=True, hold_gradients=True
        )
        for part in range(8):
            ids = tokens(model, 4, 32, seed=part)
            (model(input_ids=ids, labels=ids).loss / 8).backward()
        held = [weight.grad.low_rank.float() for weight in targets(model)]  # type: ignore[union-attr]
        optimizer.step()
        optimizer.close()
        return held

    for found, expected in zip(window(8), window(16), strict=True):
        if found.numel() >= 4096:
            assert 0.01 < (found - expected).norm() / expected.norm() < 0.1
