"""Accumulation and clipping under a Trainer, which tells windows and asks for norms."""

from __future__ import annotations

import itertools
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_galore.optim.optimizer import GaLoreOptimizer
from tests.support.helpers import (
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

# As they are, and in 8 bits between the micro-batches of a window: those of the MLP, as the others are small.
BITS = ["", ", gradient_bits=8"]

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
@pytest.mark.parametrize("bits", BITS)
def test_layerwise_accumulates_and_clips_as_plain_does(
    plain: str, max_grad_norm: float, bits: str, tmp_path: Path
) -> None:
    """BASELINE: layerwise refuses accumulation, is silently unclipped and logs a norm of 0."""
    optim_args = OPTIM_ARGS + bits
    projected = f"{optim_args}, projected_backward=true"
    expected = windowed(plain, tmp_path / "plain", optim_args=projected, max_grad_norm=max_grad_norm)
    found = windowed(f"{plain}_layerwise", tmp_path / "layerwise", max_grad_norm=max_grad_norm, optim_args=optim_args)
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
            assert all(min(held.shape) == 16 + 8 for held in optimizer.hooks.held())  # the rank and norm probes
            return loss

    model = tiny_llama()
    others = {name for name, _ in model.named_parameters() if "attn" not in name and "mlp" not in name}
    args = arguments(tmp_path, name, **{**ACCUMULATION, "num_train_epochs": 1})
    Watching(model=model, args=args, train_dataset=Counting(ROWS)).train()
    assert seen == [others] * 10


@pytest.mark.parametrize(
    ("name", "optim_args"),
    [(name, OPTIM_ARGS + bits) for name in LAYERWISE for bits in BITS]
    + [(name, f"{OPTIM_ARGS}, projected_backward=true{bits}") for name in PLAIN for bits in BITS],
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


# ---- callbacks and trainers that handle gradients


class Skipping(TrainerCallback):
    """Looks at gradients before the optimizer's step, and drops or rescales those of the second step."""

    def __init__(self, how: str) -> None:
        self.how = how
        self.norms: list[float] = []

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model = kwargs["model"]
        gradients = [param.grad for param in model.parameters() if param.grad is not None]
        self.norms.append(float(torch.stack([gradient.norm() for gradient in gradients]).norm()))
        if state.global_step != 1:
            return
        if self.how == "model":
            model.zero_grad()
        elif self.how == "none":
            for param in model.parameters():
                param.grad = None
        elif self.how == "scale":
            for gradient in gradients:
                gradient.mul_(0)


@pytest.mark.parametrize("how", ["model", "none", "scale"])
@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
@pytest.mark.parametrize(
    ("name", "bits"), [("adamw_torch", ""), *((name, "") for name in PLAIN), *itertools.product(LAYERWISE, BITS)]
)
def test_a_step_that_a_callback_drops_moves_nothing(
    name: str, bits: str, max_grad_norm: float, how: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It moved weights by two whole Adam steps. With β₁ = 0 a step with gradients of zero moves nothing either."""
    overrides: dict[str, Any] = {"max_grad_norm": max_grad_norm, "weight_decay": 0.0, "optim_args": OPTIM_ARGS + bits}
    if "adafactor" not in name:
        overrides["adam_beta1"] = 0.0
    if name == "adamw_torch":
        overrides |= {"optim_args": None, "optim_target_modules": None}
    ends, norms = [], []
    for steps in (1, 2):
        trainer = make_trainer(tiny_llama(), tmp_path / str(steps), name, max_steps=steps, **overrides)
        callback = Skipping(how)
        trainer.add_callback(callback)
        with caplog.at_level(logging.INFO, logger="hf_galore"):
            trainer.train()
        ends.append(snapshot(trainer.model))
        norms.append(callback.norms)
    assert_identical(ends[1], ends[0])
    assert norms[1][0] == norms[0][0] > 0.5
    assert len(norms[1]) == 2
    said = [record.getMessage() for record in caplog.records if "callback Skipping is" in record.getMessage()]
    assert len(said) == (2 if name in LAYERWISE and max_grad_norm == 0 else 0)


@pytest.mark.parametrize("name", LAYERWISE)
def test_a_callback_that_does_not_look_in_before_the_step_changes_nothing(name: str, tmp_path: Path) -> None:
    class Harmless(TrainerCallback):
        def on_step_end(
            self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
        ) -> None:
            pass

    trainer = make_trainer(tiny_llama(), tmp_path, name, max_steps=2)
    trainer.add_callback(Harmless())
    trainer.train()
    optimizer = optimizer_of(trainer)
    assert isinstance(optimizer, GaLoreOptimizer)
    assert optimizer.hooks is not None
    assert not optimizer.hooks.hold_gradients


@pytest.mark.parametrize("plain", PLAIN)
# What is used at once is in no bits at all.
@pytest.mark.parametrize(("max_grad_norm", "bits"), [(0.0, ""), *((1.0, bits) for bits in BITS)])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_is_the_same_for_all_names(
    plain: str, max_grad_norm: float, bad: float, bits: str, tmp_path: Path
) -> None:
    """Clipped, all of it is skipped; else the weights whose gradients are not finite. Plain is layerwise, as always."""

    class Spiking(Trainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            hook = None
            if self.state.global_step == 1:
                layer = self.model.model.layers[1].mlp
                hook = layer.down_proj.weight
                layer.register_forward_hook(self._spoil)
            loss = super().compute_loss(model, inputs, *args, **kwargs)
            if hook is not None:
                self.model.model.layers[1].mlp._forward_hooks.clear()
            return loss

        def _spoil(self, module: nn.Module, args: Any, output: torch.Tensor) -> None:
            if output.requires_grad:
                output.register_hook(lambda gradient: gradient.index_fill(1, torch.tensor([3]), bad))

    runs = []
    # Clipping scales what there is: the same thing, if both are to end in the same bits.
    args = f"{OPTIM_ARGS}, projected_backward=true{bits}" if max_grad_norm else EXACT_ARGS
    for name in (plain, f"{plain}_layerwise"):
        overrides: dict[str, Any] = {"max_steps": 4, "max_grad_norm": max_grad_norm, "optim_args": args}
        trainer = make_trainer(tiny_llama(), tmp_path / name, name, Spiking, **overrides)
        trainer.train()
        optimizer = optimizer_of(trainer)
        assert isinstance(optimizer, GaLoreOptimizer)
        counts = {name: int(optimizer.state[param]["step"]) for name, param in trainer.model.named_parameters()}
        runs.append((snapshot(trainer.model), counts, optimizer.skipped_updates()))
    assert_identical(runs[0][0], runs[1][0])
    assert runs[0][1:] == runs[1][1:]
    counts = runs[0][1]
    if max_grad_norm:
        assert set(counts.values()) == {3}
    else:
        assert counts["model.layers.1.mlp.down_proj.weight"] == 3
        assert counts["lm_head.weight"] == counts["model.norm.weight"] == 4
