"""docs/examples/accelerate_loop.py: does what a plain loop does, and goes on where it was interrupted."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import get_scheduler

from hf_galore import make_optimizer
from tests.support.examples import all_apart, example, forget_accelerate
from tests.support.helpers import (
    assert_identical,
    assert_same_but_for_rounding,
    hooks_on,
    perturbed,
    snapshot,
)

loop = example("accelerate_loop")

# Bases unquantised: a code that rounding tips over is a difference of its own size.
ARGS = "rank=8, update_proj_gap=3, scale=1, proj_bits=16"
NAMES = ("galore_adamw", "galore_adamw_layerwise", "galore_adamw_8bit_layerwise")


@pytest.fixture(autouse=True)
def _first_accelerator(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    forget_accelerate()
    yield
    forget_accelerate()


def ended(folder: Path, name: str = "run", model: Any = None, **options: Any) -> dict[str, Tensor]:
    """The weights that the example ends with."""
    model = loop.tiny_model() if model is None else model
    loop.train(model, loop.counting_rows(), folder / name, **{"optim_args": ARGS, **options})
    assert hooks_on(model) == 0
    forget_accelerate()
    return snapshot(model)


def plain_loop(optim: str, max_norm: float | None, steps: int = 8) -> dict[str, Tensor]:
    """The same without accelerate."""
    model = loop.tiny_model().train()
    optimizer = make_optimizer(
        model, optim=optim, optim_args=ARGS, lr=1e-3, weight_decay=0.01, hold_gradients=max_norm is not None
    )
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=2, num_training_steps=steps)
    for _, batch in zip(range(steps), DataLoader(loop.counting_rows(), batch_size=4), strict=False):
        model(**batch).loss.backward()
        if max_norm is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return snapshot(model)


@pytest.mark.parametrize("max_norm", [None, 0.5])
@pytest.mark.parametrize("optim", NAMES)
def test_the_loop_is_a_plain_one(optim: str, max_norm: float | None, tmp_path: Path) -> None:
    found = ended(tmp_path, optim=optim, accumulate=1, max_norm=max_norm)
    assert_identical(found, plain_loop(optim, max_norm))


def test_clipping_clips(tmp_path: Path) -> None:
    """What the test before compares twice is not twice the same."""
    clipped, free = plain_loop("galore_adamw", 0.5), plain_loop("galore_adamw", None)
    assert any(not torch.equal(weight, free[name]) for name, weight in clipped.items())


@pytest.mark.parametrize("max_norm", [None, 0.5])
@pytest.mark.parametrize("optim", ["galore_adamw", "galore_adamw_layerwise"])
def test_accumulated_micro_batches_are_one_batch(optim: str, max_norm: float | None, tmp_path: Path) -> None:
    """Random bases: those of a gradient would be the first micro-batch's."""
    options = {"optim": optim, "max_norm": max_norm, "optim_args": f"{ARGS}, refresh=random"}
    expected = ended(tmp_path, "one", batch_size=8, accumulate=1, **options)
    nearby = ended(tmp_path, "near", perturbed(loop.tiny_model()), batch_size=8, accumulate=1, **options)
    found = ended(tmp_path, "four", batch_size=2, accumulate=4, **options)
    assert_same_but_for_rounding(found, expected, nearby, snapshot(loop.tiny_model()))


@pytest.mark.parametrize("max_norm", [None, 0.5])
@pytest.mark.parametrize("optim", NAMES)
def test_a_resumed_run_is_the_uninterrupted_one(optim: str, max_norm: float | None, tmp_path: Path) -> None:
    """Interrupted between two refreshes of each matrix; bases in 4 bits, as by default."""
    options = {"optim": optim, "max_norm": max_norm, "optim_args": "rank=8, update_proj_gap=3, scale=1"}
    expected = ended(tmp_path, "whole", **options)
    stopped = ended(tmp_path, "parts", stop_at=5, **options)
    assert any(not torch.equal(weight, expected[name]) for name, weight in stopped.items())
    assert_identical(ended(tmp_path, "parts", **options), expected)


@pytest.mark.parametrize("max_norm", [None, 0.5])
def test_bfloat16_autocast(max_norm: float | None, tmp_path: Path) -> None:
    """Layerwise is no further from plain than autocast is from float32; the weights stay float32."""
    options: dict[str, Any] = {"accumulate": 1, "max_norm": max_norm}
    exact = ended(tmp_path, "exact", optim="galore_adamw", **options)
    plain = ended(tmp_path, "plain", optim="galore_adamw", precision="bf16", **options)
    found = ended(tmp_path, "found", optim="galore_adamw_layerwise", precision="bf16", **options)
    start = snapshot(loop.tiny_model())
    assert {weight.dtype for weight in found.values()} == {torch.float32}
    assert all_apart(found, plain, start) < all_apart(plain, exact, start) < 0.1


def test_what_a_real_model_has_too_is_taken(tmp_path: Path) -> None:
    """Frozen parts, and a tied head."""
    model = loop.tiny_model()
    model.lm_head.weight = model.model.embed_tokens.weight
    model.model.layers[0].requires_grad_(False)
    start = snapshot(model)
    moved = {name for name, weight in ended(tmp_path, model=model).items() if not torch.equal(weight, start[name])}
    assert moved == {name for name, param in model.named_parameters() if param.requires_grad}
