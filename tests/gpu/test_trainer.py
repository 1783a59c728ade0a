"""The Trainer on a card: all six names, resumed runs, accumulation, TRL's fused loss."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.card import DEVICE, ON_CARD, sized
from tests.support.helpers import (
    EXACT_ARGS,
    NAMES,
    assert_identical,
    assert_same_but_for_rounding,
    logged,
    make_trainer,
    optimizer_of,
    perturbed,
    snapshot,
    tiny_llama,
    train,
)

ON_DEVICE: dict[str, Any] = {"use_cpu": not ON_CARD}


@pytest.fixture
def _deterministic() -> Iterator[None]:
    """As the Trainer's `full_determinism` asks for."""
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"]
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("optim", NAMES)
def test_every_name_learns(optim: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_steps": 50, "bf16": True, "optim_args": "rank=16, update_proj_gap=10, scale=0.5"}
    trainer = train(tiny_llama(), tmp_path, optim, **ON_DEVICE, **options)
    losses = logged(trainer, "loss")
    assert losses[-1] < losses[0] / 2, losses
    figures = [value for entry in trainer.state.log_history for value in entry.values() if isinstance(value, float)]
    assert all(math.isfinite(value) for value in figures)
    assert all(param.device.type == DEVICE.type for param in trainer.model.parameters())
    # The layerwise ones' gradients are known, too.
    assert all(norm > 0 for norm in logged(trainer, "grad_norm"))
    energies = logged(trainer, "galore/captured_energy_min")
    assert energies
    assert all(0 < energy <= 1 for energy in energies)


@pytest.mark.usefixtures("_deterministic")
@pytest.mark.parametrize("optim", ["galore_adamw", "galore_adamw_8bit_layerwise", "galore_adafactor_layerwise"])
def test_a_resumed_run_is_the_same_bit_for_bit(optim: str, tmp_path: Path) -> None:
    options = {**ON_DEVICE, "max_steps": 8, "save_steps": 4, "save_strategy": "steps"}
    whole = train(tiny_llama(), tmp_path / "whole", optim, **options)
    torch.manual_seed(7)  # what a new process has is another
    resumed = tiny_llama(seed=1)
    trainer = make_trainer(resumed, tmp_path / "resumed", optim, **options)
    trainer.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert trainer.state.global_step == 8
    assert_identical(snapshot(resumed), snapshot(whole.model))
    assert_identical(optimizer_of(trainer).state_dict(), optimizer_of(whole).state_dict())


@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_accumulation_is_a_larger_batch(clip: float, tmp_path: Path) -> None:
    """Where every micro-batch gives the same basis: rows are alike in the first step, and no other refreshes."""

    def end(model: Any, rows: int) -> dict[str, torch.Tensor]:
        options = {
            **ON_DEVICE,
            "max_steps": 1,
            "per_device_train_batch_size": rows,
            "gradient_accumulation_steps": 4 // rows,
            "max_grad_norm": clip,
            "optim_args": EXACT_ARGS + ", refresh=svd",
        }
        return snapshot(train(model, tmp_path, "galore_adamw", **options).model)

    start = snapshot(tiny_llama().to(DEVICE))
    expected = end(tiny_llama(), 4)
    nearby = end(perturbed(tiny_llama()), 4)
    assert_same_but_for_rounding(end(tiny_llama(), 1), expected, nearby, start, times=10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("modules", [["attn", "mlp"], ["attn", "mlp", "lm_head"]], ids=["full-rank", "target"])
def test_the_fused_head_trains_as_trls_own(modules: list[str], dtype: torch.dtype, tmp_path: Path) -> None:
    """TRL's kernels give the loss; its backward pass is TRL's without hooks and ours with them. An odd vocabulary."""
    planning = pytest.importorskip("tests.support.planning", reason="needs trl and datasets")
    vocabulary = sized(4999, 131)

    def losses(optim: str) -> list[float]:
        make = planning.sft(
            tmp_path,
            optim,
            model=lambda: tiny_llama(vocab_size=vocabulary).to(dtype),
            loss_type="chunked_nll",
            logging_steps=1,
            learning_rate=1e-2,
            max_steps=6,
            optim_target_modules=modules,
            optim_args="rank=16, update_proj_gap=3, scale=0.5, proj_bits=16",
            **ON_DEVICE,
        )
        trainer = make()
        trainer.train()
        return logged(trainer, "loss")

    expected, found = losses("galore_adamw"), losses("galore_adamw_layerwise")
    assert expected[-1] < expected[0]
    torch.testing.assert_close(found, expected, rtol=2e-2 if dtype == torch.bfloat16 else 1e-3, atol=1e-3)
