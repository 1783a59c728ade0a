"""Run by test_ddp.py under torchrun: trains the tiny model by each plain name, and process 0 saves its weights.

A single process trains it from perturbed weights too.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.support.helpers import OPTIM_ARGS, PLAIN, perturbed, snapshot, tiny_llama, train

GLOBAL_BATCH = 4


def main(output: Path, processes: int) -> None:
    models: dict[str, Callable[[], nn.Module]] = {"whole": tiny_llama}
    if processes == 1:
        models["nearby"] = lambda: perturbed(tiny_llama())
    weights: dict[str, dict[str, dict[str, Tensor]]] = {}
    for name in PLAIN:
        overrides: dict[str, Any] = {
            "per_device_train_batch_size": GLOBAL_BATCH // processes,
            "optim_args": OPTIM_ARGS,
            "max_grad_norm": 0.5,
        }
        if "adamw" in name:
            overrides["adam_epsilon"] = 1e-3  # as in test_windows
        weights[name] = {}
        for key, make in models.items():
            trainer = train(model := make(), output, name, **overrides)
            assert trainer.args.world_size == processes
            weights[name][key] = snapshot(model)
    if trainer.args.process_index == 0:
        torch.save(weights, output / "weights.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
