"""Run by test_ddp.py under torchrun: trains the tiny model by each name, and process 0 saves its weights.

A single process trains it from perturbed weights too. A run that is resumed ends as the whole one, to the bit.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.support.helpers import (
    LAYERWISE,
    NAMES,
    OPTIM_ARGS,
    assert_identical,
    make_trainer,
    perturbed,
    snapshot,
    tiny_llama,
    train,
)

GLOBAL_BATCH = 4


def tied_llama() -> nn.Module:
    model: nn.Module = tiny_llama(tie_word_embeddings=True)
    return model


def runs() -> dict[str, tuple[str, Callable[[], nn.Module], dict[str, Any]]]:
    """The optimizer's name, the model and training arguments of each run."""
    found: dict[str, tuple[str, Callable[[], nn.Module], dict[str, Any]]] = {}
    for name in NAMES:
        found[name] = name, tiny_llama, {"max_grad_norm": 0.5}
    for name in LAYERWISE:
        found[f"{name}, at once"] = name, tied_llama, {"max_grad_norm": 0.0}
        found[f"{name}, accumulated"] = name, tied_llama, {"max_grad_norm": 0.5, "gradient_accumulation_steps": 2}
    all_matrices = ["attn", "mlp", "embed_tokens", "lm_head"]
    for make in (tiny_llama, tied_llama):
        words = f"{LAYERWISE[0]}, all matrices of {make.__name__}"
        found[words] = LAYERWISE[0], make, {"max_grad_norm": 0.5, "optim_target_modules": all_matrices}
    return found


# Runs that are resumed from their fourth of eight steps, between refreshes and in the middle of an epoch.
RESUMED = ("galore_adamw_8bit_layerwise, at once", "galore_adamw_8bit_layerwise, accumulated", "galore_adamw")


def main(output: Path, processes: int) -> None:
    weights: dict[str, dict[str, dict[str, Tensor]]] = {"start": {"tied": snapshot(tied_llama())}}
    weights["start"]["untied"] = snapshot(tiny_llama())
    for words, (name, make, options) in runs().items():
        overrides: dict[str, Any] = {
            "per_device_train_batch_size": GLOBAL_BATCH // processes,
            "optim_args": OPTIM_ARGS,
            **options,
        }
        if "adamw" in name:
            overrides["adam_epsilon"] = 1e-3  # as in test_windows
        folder = output / words
        if words in RESUMED:
            overrides.update(save_strategy="steps", save_steps=4)
        trainer = train(model := make(), folder, name, **overrides)
        assert trainer.args.world_size == processes
        weights[words] = {"whole": snapshot(model)}
        if processes == 1:
            train(model := perturbed(make()), output, name, **{**overrides, "save_strategy": "no"})
            weights[words]["nearby"] = snapshot(model)
        if words in RESUMED:
            trainer = make_trainer(model := make(), folder, name, **overrides)
            trainer.train(resume_from_checkpoint=str(folder / "checkpoint-4"))
            assert_identical(snapshot(model), weights[words]["whole"])
    if trainer.args.process_index == 0:
        torch.save(weights, output / "weights.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
