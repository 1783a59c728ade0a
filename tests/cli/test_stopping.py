"""Ctrl-C and SIGTERM in a training: the step is finished, a checkpoint written, and a run that goes on is whole."""

from __future__ import annotations

import os
import re
import shlex
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import Trainer
from trl import SFTTrainer

from hf_galore.cli.main import main
from hf_galore.recipes.checkpoints import last_checkpoint
from hf_galore.recipes.embedded_model import Embedded
from tests.support import signals
from tests.support.commands import history, options, recipe_on_cpu, short_run, weights
from tests.support.helpers import assert_identical
from tests.support.warm import module, ran, torchrun

STATUS = {signal.SIGINT: 130, signal.SIGTERM: 143, **({signal.SIGHUP: 129} if hasattr(signal, "SIGHUP") else {})}
OPTIM = {
    "optim": "galore_adamw_8bit_layerwise",
    "optim_args": "rank=16, update_proj_gap=2, scale=1",
    "gradient_accumulation_steps": 2,
    "max_steps": 6,
    "learning_rate": 1e-3,
    "save_strategy": "no",
}


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Those of a terminal: a command leaves alone what it was started to ignore."""
    with signals.of_a_terminal():
        yield
        assert {number: signal.getsignal(number) for number in signals.DEFAULTS} == signals.DEFAULTS  # as it found them


@pytest.fixture
def settings(small: Embedded, tmp_path: Path) -> dict[str, Any]:
    return {**short_run(small.model, small.data, tmp_path / "out"), **OPTIM}


def sends(
    monkeypatch: pytest.MonkeyPatch, method: str, step: int, *numbers: int, trainer: type[Trainer] = SFTTrainer
) -> None:
    """Let this process get signals in the middle of a step, when `step` others are done, or of an evaluation."""
    original: Callable[..., Any] = getattr(trainer, method)
    left = list(numbers)

    def sent(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        while left and self.state.global_step == step:
            os.kill(os.getpid(), left.pop(0))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(trainer, method, sent)


def losses(folder: Path) -> list[tuple[int, float]]:
    """All that a run's log has of losses, of training and held-out data."""
    return [(entry["step"], entry[key]) for entry in history(folder) for key in ("loss", "eval_loss") if key in entry]


@pytest.mark.parametrize("number", STATUS, ids=lambda number: number.name)
def test_the_step_is_finished_and_saved(
    number: signal.Signals,
    settings: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    whole = tmp_path / "whole"
    given = options(settings)
    assert main(["sft", *given, "--output_dir", str(whole)]) == 0
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        sends(patch, "training_step", 2, number)
        capfd.readouterr()
        assert main(["sft", *given]) == STATUS[number]
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("hf-galore sft: ")]
    assert said == [
        "hf-galore sft: stopping after this step, with a checkpoint. Ctrl-C once more stops at once.",
        f"hf-galore sft: interrupted; go on from {out / 'checkpoint-3'} with: "
        f"{shlex.join(['hf-galore', 'sft', *given])} --resume_from_checkpoint",
    ]
    assert last_checkpoint(out) == out / "checkpoint-3"
    assert not (out / "model.safetensors").exists()
    assert main(["sft", *given, "--resume_from_checkpoint"]) == 0
    assert_identical(weights(out), weights(whole))
    assert losses(out) == losses(whole)


def test_an_evaluation_is_finished_too(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its result belongs to the run; and no further step is begun."""
    evaluated = {"eval_strategy": "steps", "eval_steps": 2, "save_steps": 2, "save_strategy": "steps"}
    given = options({**settings, **evaluated, "load_best_model_at_end": True})
    assert main(["sft", *given, "--output_dir", str(tmp_path / "whole")]) == 0
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        sends(patch, "prediction_step", 2, signal.SIGTERM)
        assert main(["sft", *given]) == 143
    assert [folder.name for folder in out.glob("checkpoint-*")] == ["checkpoint-2"]
    assert main(["sft", *given, "--resume_from_checkpoint"]) == 0
    assert_identical(weights(out), weights(tmp_path / "whole"))
    assert losses(out) == losses(tmp_path / "whole")


def test_where_only_the_best_is_saved(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Trainer decides after an evaluation whether a step is saved: this one is, whatever it would be worth."""
    best = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "best", "metric_for_best_model": "loss"}
    sends(monkeypatch, "training_step", 3, signal.SIGINT)
    given = options({**settings, **best, "greater_is_better": True})  # so that the first is the best
    assert main(["sft", *given]) == 130
    assert last_checkpoint(tmp_path / "out") == tmp_path / "out" / "checkpoint-4"


def test_an_epoch_that_a_stop_ends_is_no_epoch(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_epoch = {"eval_strategy": "epoch", "save_strategy": "epoch"}
    evaluations: list[int] = []
    monkeypatch.setattr(SFTTrainer, "evaluate", lambda self, *args, **kwargs: evaluations.append(1))
    sends(monkeypatch, "training_step", 1, signal.SIGTERM)
    assert main(["sft", *options({**settings, **by_epoch})]) == 143
    assert evaluations == []
    assert last_checkpoint(tmp_path / "out") == tmp_path / "out" / "checkpoint-2"


def test_once_more_stops_at_once(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    sends(monkeypatch, "training_step", 2, signal.SIGINT, signal.SIGINT)
    assert main(["sft", *options(settings)]) == 130
    assert last_checkpoint(tmp_path / "out") is None
    assert "holds no checkpoint yet, so run the same command again" in capfd.readouterr().err


def test_a_terminal_and_a_watcher_ask_once_each(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sends(monkeypatch, "training_step", 2, signal.SIGINT, signal.SIGTERM)
    assert main(["sft", *options(settings)]) == 130
    assert last_checkpoint(tmp_path / "out") == tmp_path / "out" / "checkpoint-3"


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has no SIGHUP")
def test_a_closed_terminal_and_its_shell_say_the_same(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shell passes on what the terminal has told all of its programs: nobody insists."""
    sends(monkeypatch, "training_step", 2, signal.SIGHUP, signal.SIGHUP)
    assert main(["sft", *options(settings)]) == 129
    assert last_checkpoint(tmp_path / "out") == tmp_path / "out" / "checkpoint-3"


def test_in_its_last_step_a_run_ends_as_ever(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sends(monkeypatch, "training_step", 5, signal.SIGTERM)
    assert main(["sft", *options(settings)]) == 0
    assert weights(tmp_path / "out")
    assert last_checkpoint(tmp_path / "out") is None


def test_what_was_trained_is_saved_first(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Where no checkpoint is written, all of the training would be lost."""
    sends(monkeypatch, "_save", 6, signal.SIGINT)
    assert main(["sft", *options(settings)]) == 0
    assert weights(tmp_path / "out")
    assert "the training has ended, and its model is saved first. Ctrl-C once more" in capfd.readouterr().err


def test_asked_twice_nothing_is_saved(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sends(monkeypatch, "_save", 6, signal.SIGINT, signal.SIGINT)
    assert main(["sft", *options(settings)]) == 130
    assert not (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize("number", STATUS, ids=lambda number: number.name)
def test_before_training_there_is_no_step_to_finish(
    number: signal.Signals,
    settings: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    sends_when_made: list[int] = []

    def made(self: SFTTrainer, *args: Any, **kwargs: Any) -> None:
        os.kill(os.getpid(), number)
        sends_when_made.append(1)  # never reached

    monkeypatch.setattr(SFTTrainer, "__init__", made)
    assert main(["sft", *options(settings)]) == STATUS[number]
    assert sends_when_made == []
    assert re.search("hf-galore sft: interrupted; .* holds no checkpoint yet", capfd.readouterr().err)


@pytest.mark.parametrize(("step", "kept"), [(1, "checkpoint-2"), (2, "trainer_state.json")], ids=("amid", "at its end"))
def test_of_several_runs_no_further_is_begun(
    step: int,
    kept: str,
    small: Embedded,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """And the line that says how to go on is right where the first of them is finished, or the last has not begun."""
    texts = tmp_path / "texts.csv"
    texts.write_text("text,label\n" + "good food,1\nbad food,0\n" * 8)
    own = {"model_name_or_path": small.model, "train_file": texts, "validation_file": texts, "eval_strategy": "epoch"}
    unlike = ("dataset_name", "activation_checkpointing", "save_steps", "output_dir")
    short = {key: value for key, value in short_run(small.model, small.data, tmp_path).items() if key not in unlike}
    recipes = [
        recipe_on_cpu(tmp_path / name, **{key: str(value) if isinstance(value, Path) else value for key, value in run})
        for name in ("first", "second")
        for run in [({**short, **own, "max_steps": 3, "save_strategy": "no", "disable_tqdm": True}).items()]
    ]
    with monkeypatch.context() as patch:
        sends(patch, "training_step", step, signal.SIGTERM, trainer=Trainer)
        assert main(["glue", "--config", *recipes]) == 143
    assert (tmp_path / "first" / "out" / kept).exists()
    assert not (tmp_path / "second").joinpath("out").exists()
    said = capfd.readouterr().err.splitlines()[-1]
    assert said.endswith(f"with: hf-galore glue --config {' '.join(recipes)} --resume_from_checkpoint")
    assert main(["glue", "--config", *recipes, "--resume_from_checkpoint"]) == 0
    assert all((tmp_path / name / "out" / "trainer_state.json").exists() for name in ("first", "second"))


def test_several_processes_stop_after_the_same_step(settings: dict[str, Any], tmp_path: Path) -> None:
    """One of two is asked; a checkpoint is the work of both, and neither waits for the other for ever."""
    given = options({**settings, "optim": "galore_adamw", "gradient_accumulation_steps": 1})
    environment = {"OMP_NUM_THREADS": "1", "STATUS_FOLDER": str(tmp_path)}
    ended = ran(torchrun, 2, None, module, "tests.support.stopped_run", "sft", *given, environment=environment)
    statuses = [(tmp_path / f"status-{rank}").read_text() for rank in (0, 1)]
    assert statuses == ["143", "143"], ended.stderr
    assert last_checkpoint(tmp_path / "out") == tmp_path / "out" / "checkpoint-3"
