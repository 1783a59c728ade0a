"""What the tests of commands share: options for a machine like this one, and how a mistake is said."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hf_galore.cli.main import main

ON_CPU: Mapping[str, Any] = {"use_cpu": "true", "bf16": "false", "report_to": "none", "disable_tqdm": "true"}


def options(values: Mapping[str, Any]) -> list[str]:
    """`--key value ...`, of lists several values."""
    items: list[str] = []
    for key, value in values.items():
        items.append(f"--{key}")
        items.extend(map(str, value) if isinstance(value, (list, tuple)) else [str(value)])
    return items


def said_of_mistake(command: str, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a command says of a mistake, with exit status 2."""
    capsys.readouterr()
    assert main([command, *arguments]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith(f"hf-galore {command}: ")]
    assert len(lines) == 1
    return lines[0]


def weights(folder: Path) -> dict[str, Tensor]:
    """Of the model that was saved in a folder."""
    return dict(sorted(load_file(folder / "model.safetensors").items()))


def write_checkpoint(folder: Path, state: Mapping[str, Any] | None = None) -> Path:
    """The least that is a whole checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
        torch.save({}, folder / name)
    save_file({}, folder / "model.safetensors")
    (folder / "trainer_state.json").write_text(json.dumps(state or {}), encoding="utf-8")
    return folder


def history(folder: Path) -> list[dict[str, Any]]:
    """The log of the run in a folder, without what differs from one run to the next of the same: times, memory."""
    entries = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    varying = ("second", "runtime", "memory", "total_flos")
    return [
        {key: value for key, value in entry.items() if not any(word in key for word in varying)}
        for entry in entries
        if "train_runtime" not in entry
    ]
