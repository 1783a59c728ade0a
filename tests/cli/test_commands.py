"""`hf-galore`: recipes and their mistakes, overrides, a run that is killed and resumed, the quickstart."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from trl import SFTTrainer

from hf_galore.cli.main import COMMANDS, main
from hf_galore.recipes.checkpoints import flaw
from hf_galore.recipes.embedded_model import CACHE_VARIABLE, Embedded
from tests.support.commands import command_line, said_of_mistake, weights, write_recipe
from tests.support.helpers import assert_identical


@pytest.fixture
def settings(small: Embedded, tmp_path: Path) -> dict[str, Any]:
    """A recipe that trains for six steps."""
    return {
        "model_name_or_path": str(small.model),
        "dataset_name": str(small.data),
        "max_length": 64,
        "assistant_only_loss": True,
        "optim": "galore_adamw_8bit_layerwise",
        "optim_target_modules": ["attn", "mlp"],
        "optim_args": "rank=16, update_proj_gap=4, scale=1",
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-3,
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "activation_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "save_steps": 2,
        "report_to": "none",
        "disable_tqdm": True,
        "output_dir": str(tmp_path / "out"),
    }


# ---- mistakes: one line, exit status 2, nothing written

MISTAKES: dict[str, tuple[dict[str, Any], list[str], list[str]]] = {
    "unknown key": ({"optim_arg": "rank=8"}, [], ["there is no option 'optim_arg'", "Did you mean 'optim_args'?"]),
    "unknown option": ({}, ["--optim-arg", "rank=8"], ["no option --optim-arg", "--optim_args"]),
    "word for a number": (
        {"per_device_train_batch_size": "many"},
        [],
        ["per_device_train_batch_size", "integer", "many"],
    ),
    "list for a number": ({"max_steps": [6]}, [], ["max_steps has to be an integer, but is [6]"]),
    "number for names": ({"optim_target_modules": 3}, [], ["optim_target_modules", "list of strings", "3"]),
    "a bare no": ({"save_strategy": False}, [], ["save_strategy", "write 'no'"]),
    "unknown optim": ({"optim": "galore_adamw_9bit"}, [], ["galore_adamw_9bit", "galore_adamw_8bit"]),
    "misspelt optim_args": ({"optim_args": "rnak=8"}, [], ["no argument 'rnak'", "Did you mean 'rank'?"]),
    "no such target": (
        {"optim_target_modules": ["atn", "mlp"]},
        [],
        ["'atn' matches no trainable", "Did you mean 'self_attn'"],
    ),
    "rank above every side": ({"optim_args": "rank=4096"}, [], ["rank 4096", "Give a rank of at most"]),
    "no model": (
        {"model_name_or_path": "nowhere/nothing"},
        [],
        ["model_name_or_path nowhere/nothing cannot be loaded"],
    ),
    "no data": ({"dataset_name": "nowhere/nothing"}, [], ["dataset_name nowhere/nothing cannot be loaded"]),
    "no such split": ({"dataset_train_split": "trian"}, [], ["no split 'trian'", "train, test", "dataset_train_split"]),
    "no checkpoint": ({}, ["--resume_from_checkpoint"], ["no complete checkpoint in"]),
    "no such tracker": ({"report_to": "tensorbord"}, [], ["report_to: tensorbord is not supported, only"]),
    "fp16": ({"fp16": True}, [], ["fp16"]),
}


@pytest.mark.parametrize(("changes", "options", "words"), MISTAKES.values(), ids=list(MISTAKES))
def test_a_mistake_is_one_line_and_leaves_nothing(
    changes: dict[str, Any],
    options: list[str],
    words: list[str],
    settings: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = write_recipe(tmp_path, {**settings, **changes})
    line = said_of_mistake("sft", ["--config", path, *options], capsys)
    assert [word for word in words if word not in line] == []
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("- a\n- b\n", "has to hold 'key: value' lines"),
        ("a: [1\n", "is not valid YAML"),
        ("max_steps: 1\nmax_steps: 2\n", "line 2: 'max_steps' is given twice"),
    ],
)
def test_a_file_that_is_no_recipe(text: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    assert main(["sft", "--config", str(path)]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["sft", "--config", "missing.yaml"], "there is no such file, and no such recipe comes with hf_galore"),
        (["sft", "--config", "llama2_7b_oast2.yaml"], "Did you mean 'llama2_7b_oasst2.yaml'?"),
        (["sft"], "give a recipe"),
        (["trian"], "there is no command 'trian', only quickstart, sft, "),
        (["quickstart", "--max_step", "3"], "--max_steps"),
    ],
)
def test_bad_command_lines(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert words in capsys.readouterr().err


def test_an_output_folder_that_is_a_file(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "taken").write_text("mine")
    path = write_recipe(tmp_path, {**settings, "output_dir": str(tmp_path / "taken" / "out")})
    assert main(["sft", "--config", path]) == 2
    assert "taken is a file" in capsys.readouterr().err
    assert (tmp_path / "taken").read_text() == "mine"


def test_data_without_a_column_to_train_on(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "train.jsonl").write_text('{"question": "a", "answer": "b"}\n' * 4)
    path = write_recipe(tmp_path, {**settings, "dataset_name": str(data)})
    assert main(["sft", "--config", path]) == 2
    assert "has the columns question, answer. It needs 'messages'" in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert f"hf-galore {command}" in shown
    own = {"compare": "--sweep", "recipes": "--copy", "chat": "--system", "doctor": "--model", "completion": "fish"}
    assert own.get(command, "--optim_target_modules") in shown


# ---- killed, and resumed


def test_a_killed_run_goes_on_where_it_was(settings: dict[str, Any], tmp_path: Path) -> None:
    """SIGKILL in the middle, the same command with --resume_from_checkpoint: the weights of a run left alone, bit for
    bit."""
    alone = write_recipe(tmp_path, {**settings, "output_dir": str(tmp_path / "alone")}, "alone.yaml")
    assert main(["sft", "--config", alone]) == 0

    path = write_recipe(tmp_path, {**settings, "save_total_limit": None})
    process = subprocess.Popen(
        command_line("sft", "--config", path), env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL
    )
    wait_for_checkpoint(tmp_path / "out" / "checkpoint-2", process)
    process.send_signal(signal.SIGKILL)
    process.wait()

    assert main(["sft", "--config", path, "--resume_from_checkpoint"]) == 0
    assert_identical(weights(tmp_path / "out"), weights(tmp_path / "alone"))


def wait_for_checkpoint(folder: Path, process: subprocess.Popen[bytes], seconds: float = 240) -> None:
    """Until it is whole: its last file may be there and be empty for a moment, longer on a busy machine."""
    deadline = time.monotonic() + seconds
    while flaw(folder) is not None:
        assert process.poll() in (None, 0), "the run ended before its first checkpoint"
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_killed_while_the_last_file_of_a_checkpoint_was_written(
    settings: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    path, out = write_recipe(tmp_path, settings), tmp_path / "out"
    assert main(["sft", "--config", path]) == 0
    expected = weights(out)
    latest = out / "checkpoint-6" / "trainer_state.json"
    latest.write_text("")
    line = said_of_mistake("sft", ["--config", path, "--resume_from_checkpoint", str(latest.parent)], capsys)
    assert f"{latest.parent} is no checkpoint that training can go on from: {latest.name} is cut off" in line

    assert main(["sft", "--config", path, "--resume_from_checkpoint"]) == 0
    said = [message for message in caplog.messages if "is left out" in message]
    assert len(said) == 1
    assert said[0].startswith(f"{latest.parent} is left out")
    assert latest.name in said[0]
    assert_identical(weights(out), expected)
    assert flaw(latest.parent) is None  # written again


def test_ctrl_c_says_how_to_go_on(
    settings: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    original = SFTTrainer.training_step

    def interrupted(self: SFTTrainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 3:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    monkeypatch.setattr(SFTTrainer, "training_step", interrupted)
    path = write_recipe(tmp_path, settings)
    assert main(["sft", "--config", path]) == 130
    said = capsys.readouterr().err.splitlines()[-1]
    assert "checkpoint-2" in said
    assert said.endswith(f"hf-galore sft --config {path} --resume_from_checkpoint")


# ---- the quickstart


def test_quickstart_from_an_empty_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "120")
    out = tmp_path / "out"
    options = ["--max_steps", "30", "--logging_steps", "5", "--output_dir", str(out)]
    assert main(["quickstart", *options]) == 0
    shown = capsys.readouterr().out
    for words in ("training loss", "held-out loss", "AdamW's would be", "30 steps", "Who are you?"):
        assert words in shown
    first, last = (float(word) for word in loss_line(shown))
    assert last < first - 0.5
    assert (out / "model.safetensors").is_file()


def loss_line(shown: str) -> tuple[str, str]:
    line = next(line for line in shown.splitlines() if "training loss" in line)
    words = line.replace(",", "").split()
    return words[words.index("first") - 1], words[words.index("last") - 1]
