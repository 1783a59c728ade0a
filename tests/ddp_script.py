"""Run by test_ddp.py under torchrun: trains the tiny model by each plain name, and process 0 saves its weights."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from tests.helpers import OPTIM_ARGS, PLAIN, snapshot, tiny_llama, train

GLOBAL_BATCH = 4


def main(output: Path, processes: int) -> None:
    weights = {}
    for name in PLAIN:
        model = tiny_llama()
        batch_size = GLOBAL_BATCH // processes
        overrides: dict[str, Any] = {
            "per_device_train_batch_size": batch_size,
            "optim_args": OPTIM_ARGS,
            "max_grad_norm": 0.5,
        }
        trainer = train(model, output, name, **overrides)
        assert trainer.args.world_size == processes
        weights[name] = snapshot(model)
    if trainer.args.process_index == 0:
        torch.save(weights, output / "weights.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
