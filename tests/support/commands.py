"""What the tests of commands share: recipes, running a command, what it says and leaves, Trainers with a record."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from hf_galore.cli.main import main
from hf_galore.recipes.run_record import RecordedTrainer
from tests.support.helpers import make_trainer, tiny_llama

ON_CPU: Mapping[str, Any] = {"use_cpu": "true", "bf16": "false", "report_to": "none", "disable_tqdm": "true"}


def short_run(model: Path, data: Path, output_dir: Path) -> dict[str, Any]:
    """What a run of `hf-galore sft` is told that takes four steps and two checkpoints."""
    return {
        **ON_CPU,
        "model_name_or_path": model,
        "dataset_name": data,
        "max_length": 32,
        "optim": "galore_adamw",
        "optim_target_modules": ["attn", "mlp"],
        "optim_args": "rank=8",
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "activation_checkpointing": "false",
        "logging_steps": 1,
        "save_steps": 2,
        "output_dir": output_dir,
    }


def options(values: Mapping[str, Any]) -> list[str]:
    """`--key value ...`, of lists several values."""
    items: list[str] = []
    for key, value in values.items():
        items.append(f"--{key}")
        items.extend(map(str, value) if isinstance(value, (list, tuple)) else [str(value)])
    return items


def write_recipe(folder: Path, settings: Mapping[str, Any], name: str = "recipe.yaml") -> str:
    """Write a recipe, and return its path as a command takes it."""
    path = folder / name
    path.write_text(yaml.safe_dump(dict(settings)), encoding="utf-8")
    return str(path)


def recipe_on_cpu(folder: Path, **settings: Any) -> str:
    """Write a recipe for any machine, whose `output_dir` is `out` in the folder, and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    anywhere = {"bf16": False, "use_cpu": True, "report_to": "none"}
    return write_recipe(folder, {**anywhere, "output_dir": str(folder / "out"), **settings})


def command_line(*arguments: str) -> list[str]:
    """`hf-galore ...`, for a process of its own."""
    return [sys.executable, "-m", "hf_galore.cli.main", *arguments]


def printed_json(arguments: Sequence[str], status: int = 0) -> Any:
    """Run a command that ends with that status, and return the one JSON object that it prints."""
    stdout = io.StringIO()
    with contextlib.redirect_stdout(stdout):
        assert main(list(arguments)) == status
    return json.loads(stdout.getvalue(), parse_constant=lambda text: pytest.fail(f"{text} is not JSON"))


def said_of_mistake(command: str, arguments: Sequence[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command that ends with status 2, and return the one line that it says of the mistake."""
    capsys.readouterr()
    assert main([command, *arguments]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith(f"hf-galore {command}: ")]
    assert len(lines) == 1
    return lines[0]


def recorded_trainer(folder: Path, optim: str, model: Any = None, **overrides: Any) -> RecordedTrainer:
    """The Trainer of recipes, of a tiny model; `overrides` are training arguments."""
    trainer = make_trainer(tiny_llama() if model is None else model, folder, optim, RecordedTrainer, **overrides)
    assert isinstance(trainer, RecordedTrainer)
    return trainer


def weights(folder: Path) -> dict[str, Tensor]:
    """The weights of the model that was saved in a folder."""
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
