"""Accumulation and clipping under a Trainer, which tells windows and asks for norms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Trainer

from hf_galore.base import GaLoreOptimizer
from tests.helpers import (
    EXACT_ARGS,
    LAYERWISE,
    OPTIM_ARGS,
    PLAIN,
    Counting,
    arguments,
    assert_identical,
    assert_same_but_for_rounding,
    copied,
    logged,
    make_trainer,
    optimizer_of,
    perturbed,
    snapshot,
    tiny_llama,
    train,
)

# Four micro-batches a step, and so few rows (10 batches of 4) that each epoch ends with a window of two.
ACCUMULATION: dict[str, Any] = {"gradient_accumulation_steps": 4, "num_train_epochs": 3, "max_steps": -1}
ROWS = 40


def windowed(name: str, folder: Path, **overrides: Any) -> Trainer:
    values = {**ACCUMULATION, "max_grad_norm": 0.5, **overrides}
    trainer = Trainer(model=tiny_llama(), args=arguments(folder, name, **values), train_dataset=Counting(ROWS))
    trainer.train()
    return trainer


@pytest.mark.parametrize("plain", PLAIN)
@pytest.mark.parametrize("max_grad_norm", [0.0, 0.5])
def test_layerwise_accumulates_and_clips_as_plain_does(plain: str, max_grad_norm: float, tmp_path: Path) -> None:
    """BASELINE: layerwise refuses accumulation, is silently unclipped and logs a norm of 0."""
    projected = f"{OPTIM_ARGS}, projected_backward=true"
    expected = windowed(plain, tmp_path / "plain", optim_args=projected, max_grad_norm=max_grad_norm)
    found = windowed(f"{plain}_layerwise", tmp_path / "layerwise", max_grad_norm=max_grad_norm)
    assert found.state.global_step == expected.state.global_step == 9
    assert_identical(snapshot(found.model), snapshot(expected.model))
    assert logged(found, "grad_norm") == logged(expected, "grad_norm")
    assert min(logged(found, "grad_norm")) > 0.5


@pytest.mark.arithmetic
@pytest.mark.parametrize("plain", PLAIN)
def test_clipping_is_by_the_norm_of_the_gradient_where_it_is_built(plain: str, tmp_path: Path) -> None:
    """Against the Trainer's own clipping, which the plain optimizer leaves as it is.

    With an ε as large as the moments, Adam does not divide a factor of all gradients out again: a norm that is 1e-3 off
    would show.
    """
    overrides: dict[str, Any] = {"max_grad_norm": 0.5, "max_steps": 8}
    if "adamw" in plain:
        overrides["adam_epsilon"] = 1e-3
    expected, nearby = (
        train(model, tmp_path / "plain", plain, **overrides) for model in (tiny_llama(), perturbed(tiny_llama()))
    )
    found = train(tiny_llama(), tmp_path / "layerwise", f"{plain}_layerwise", optim_args=EXACT_ARGS, **overrides)
    assert logged(found, "grad_norm") == pytest.approx(logged(expected, "grad_norm"), rel=1e-3)
    assert min(logged(found, "grad_norm")) > 0.5
    ends = [snapshot(run.model) for run in (found, expected, nearby)]
    assert_same_but_for_rounding(ends[0], ends[1], ends[2], start=snapshot(tiny_llama()))


@pytest.mark.arithmetic
def test_a_fault_of_a_thousandth_is_no_rounding(tmp_path: Path) -> None:
    """Of the comparison above: it would see it."""

    def end(model: nn.Module, **overrides: Any) -> dict[str, torch.Tensor]:
        values: dict[str, Any] = {"max_grad_norm": 0.5, "adam_epsilon": 1e-3, **overrides}
        return snapshot(train(model, tmp_path, "galore_adamw", **values).model)

    start, expected, nearby = snapshot(tiny_llama()), end(tiny_llama()), end(perturbed(tiny_llama()))
    assert_same_but_for_rounding(end(tiny_llama()), expected, nearby, start)
    faults: tuple[dict[str, Any], ...] = (
        {"max_grad_norm": 0.0},
        {"max_grad_norm": 0.5005},
        {"optim_args": OPTIM_ARGS.replace("scale=0.5", "scale=0.5005")},
        {"learning_rate": 1.001e-2},
    )
    for fault in faults:
        with pytest.raises(AssertionError, match="of its way apart"):
            assert_same_but_for_rounding(end(tiny_llama(), **fault), expected, nearby, start)


def test_clipping_changes_the_weights(tmp_path: Path) -> None:
    """Adam forgives a constant factor, and so weights would show little: what clipping reaches is the moments."""
    runs = [windowed("galore_adamw_layerwise", tmp_path / str(norm), max_grad_norm=norm) for norm in (0.0, 1e-6)]
    free, clipped = ({key: value.norm() for key, value in moments(run).items()} for run in runs)
    assert all(clipped[key] < 1e-5 * free[key] for key in free)


def moments(trainer: Trainer) -> dict[int, torch.Tensor]:
    optimizer = optimizer_of(trainer)
    return {i: state["exp_avg"] for i, state in enumerate(optimizer.state.values())}


@pytest.mark.parametrize("name", LAYERWISE)
def test_a_window_holds_no_gradient_of_a_target(name: str, tmp_path: Path) -> None:
    """Between the micro-batches of a Trainer's window: low-rank gradients, and full-rank ones of the rest only."""
    seen: list[set[str]] = []

    class Watching(Trainer):
        def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
            loss: torch.Tensor = super().training_step(model, *args, **kwargs)
            seen.append({name for name, param in model.named_parameters() if type(param.grad) is torch.Tensor})
            optimizer = optimizer_of(self)
            assert isinstance(optimizer, GaLoreOptimizer)
            assert optimizer.hooks is not None
            assert len(optimizer.hooks.held()) == 14
            assert all(min(held.shape) == 16 for held in optimizer.hooks.held())
            return loss

    model = tiny_llama()
    others = {name for name, _ in model.named_parameters() if "attn" not in name and "mlp" not in name}
    args = arguments(tmp_path, name, **{**ACCUMULATION, "num_train_epochs": 1})
    Watching(model=model, args=args, train_dataset=Counting(ROWS)).train()
    assert seen == [others] * 10


@pytest.mark.parametrize(
    ("name", "optim_args"),
    [(name, OPTIM_ARGS) for name in LAYERWISE] + [(name, f"{OPTIM_ARGS}, projected_backward=true") for name in PLAIN],
)
def test_a_resumed_run_is_the_uninterrupted_one(name: str, optim_args: str, tmp_path: Path) -> None:
    """Bit for bit, with windows, clipping and a checkpoint between two refreshes and in the middle of an epoch."""
    saving: dict[str, Any] = {
        "gradient_accumulation_steps": 2,
        "max_steps": 7,
        "max_grad_norm": 0.5,
        "optim_args": optim_args,
        "save_strategy": "steps",
        "save_steps": 5,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 2,
        "weight_decay": 0.1,
    }
    whole = train(tiny_llama(), tmp_path / "whole", name, **saving)
    resumed = make_trainer(tiny_llama(1), tmp_path / "resumed", name, **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"))
    assert_identical(snapshot(resumed.model), snapshot(whole.model))
    assert_identical(copied(optimizer_of(resumed).state_dict()), copied(optimizer_of(whole).state_dict()))
    assert logged(resumed, "grad_norm") == logged(whole, "grad_norm")
