"""Going on with a run: a finished one stays as it is, and other settings than it began with are said or refused."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_galore.cli.main import main
from hf_galore.recipes.embedded_model import Embedded
from hf_galore.recipes.resuming import check_settings, optim_of
from hf_galore.recipes.run_record import RUN_FILE, RunFacts
from tests.support.commands import history, options, said_of_mistake, short_run, weights
from tests.support.helpers import assert_identical

RESUMED = ["--resume_from_checkpoint"]


@pytest.fixture(scope="module")
def finished(small: Embedded, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """What a run of four steps was told, and its folder; not to be changed."""
    folder = tmp_path_factory.mktemp("finished") / "out"
    settings = short_run(small.model, small.data, folder)
    assert main(["sft", *options(settings)]) == 0
    return settings, folder


@pytest.fixture
def run(finished: tuple[dict[str, Any], Path], tmp_path: Path) -> tuple[dict[str, Any], Path]:
    """The same, to be changed."""
    out = tmp_path / "out"
    shutil.copytree(finished[1], out)
    return {**finished[0], "output_dir": out}, out


def test_a_finished_run_trains_no_more(run: tuple[dict[str, Any], Path], capsys: pytest.CaptureFixture[str]) -> None:
    settings, out = run
    before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    capsys.readouterr()
    for changes in ({}, {"max_steps": 3}):
        assert main(["sft", *options({**settings, **changes}), *RESUMED]) == 0
        assert capsys.readouterr().out == (
            f"hf-galore sft: the run in {out} is finished, at step 4: nothing is left to do. To train it longer, give "
            "more max_steps.\n"
        )
        assert {file: file.read_bytes() for file in out.rglob("*") if file.is_file()} == before
    assert main(["sft", *options({**settings, "max_steps": 5}), *RESUMED]) == 0
    assert [entry["step"] for entry in history(out) if "loss" in entry] == [1, 2, 3, 4, 5]


def test_a_run_of_epochs_that_is_finished(run: tuple[dict[str, Any], Path], capsys: pytest.CaptureFixture[str]) -> None:
    """How many steps they have is known from the checkpoint."""
    settings, out = run
    state = out / "checkpoint-4" / "trainer_state.json"
    state.write_text(json.dumps({**json.loads(state.read_text()), "num_train_epochs": 2}))
    settings = {**settings, "max_steps": -1, "num_train_epochs": 2}
    assert main(["sft", *options(settings), *RESUMED]) == 0
    assert (
        "finished, at step 4: nothing is left to do. To train it longer, give more num_train" in capsys.readouterr().out
    )


def test_a_run_that_was_killed_before_its_model_was_saved_is_saved_and_not_trained(
    run: tuple[dict[str, Any], Path],
) -> None:
    settings, out = run
    expected, log = weights(out), history(out)
    facts = RunFacts.read(out)
    assert facts is not None
    (out / RUN_FILE).write_text(json.dumps({**vars(facts), "finished": False, "optimizer_bytes": None}))
    (out / "model.safetensors").unlink()
    (out / "trainer_state.json").unlink()
    torch.manual_seed(1)
    assert main(["sft", *options(settings), *RESUMED]) == 0
    assert_identical(weights(out), expected)
    steps = [entry for entry in log if "train_runtime" not in entry and "train_loss" not in entry]
    assert [entry for entry in history(out) if "loss" in entry] == [entry for entry in steps if "loss" in entry]
    after = RunFacts.read(out)
    assert after is not None
    assert after.finished


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"optim_args": "rank=16"}, "rank 8 → 16"),
        ({"optim_args": "rank=8, scale=1, stagger=false"}, "scale 0.25 → 1.0, stagger true → false"),
        ({"optim": "galore_adamw_8bit"}, "optim galore_adamw → galore_adamw_8bit"),
        ({"optim": "adamw_torch", "optim_target_modules": [], "optim_args": ""}, "optim galore_adamw → adamw_torch"),
        ({"optim_target_modules": ["q_proj", "attn"]}, 'optim_target_modules ["attn", "mlp"] → ["attn", "q_proj"]'),
    ],
)
def test_another_optimizer_is_refused_before_the_model_is_loaded(
    changes: dict[str, Any],
    told: str,
    run: tuple[dict[str, Any], Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings, out = run
    given = {key: value for key, value in {**settings, "max_steps": 6, **changes}.items() if value not in ("", [])}
    monkeypatch.setattr("hf_galore.recipes.sft.load_trainer", lambda *args: pytest.fail("the model was loaded"))
    assert said_of_mistake("sft", [*options(given), *RESUMED], capsys) == (
        f"hf-galore sft: {out / 'checkpoint-4'} was written with other settings of the optimizer: {told}. Give the "
        "run's own again, or begin anew: another --output_dir, without --resume_from_checkpoint."
    )


@pytest.mark.parametrize(
    ("was", "now", "said"),
    [
        ({}, {"num_train_epochs": 3.0}, ""),  # max_steps says how long it is
        (
            {"max_steps": -1},
            {"max_steps": -1, "num_train_epochs": 5.0},
            "num_train_epochs 3.0 → 5.0: The learning rate",
        ),
        ({"lr_scheduler_type": "constant"}, {"lr_scheduler_type": "constant", "max_steps": 9}, ""),
        (
            {},
            {"lr_scheduler_type": "cosine"},
            "lr_scheduler_type linear → cosine: The learning rate goes on by the new",
        ),
        (
            {},
            {"warmup_steps": 2},
            "warmup_steps 0 → 2: The learning rate goes on by the new schedule, and may jump here.",
        ),
        ({}, {"processes": 2}, "processes 1 → 2: A resumed run skips as many batches as it has had, which are others"),
        ({"processes": 2}, {"processes": None}, "processes 2 → 1: A resumed run skips as many batches as it has had,"),
        ({"processes": 2}, {"processes": 2}, ""),
    ],
)
def test_another_schedule_or_number_of_processes_is_said(
    was: dict[str, Any],
    now: dict[str, Any],
    said: str,
    run: tuple[dict[str, Any], Path],
    caplog: pytest.LogCaptureFixture,
) -> None:
    record = json.loads((run[1] / RUN_FILE).read_text())
    record["settings"].update({"num_train_epochs": 3.0, **was})
    (run[1] / RUN_FILE).write_text(json.dumps(record))
    with caplog.at_level(logging.WARNING, "hf_galore"):
        check_settings(run[1] / "checkpoint-2", {**record["settings"], **now})
    assert (caplog.messages[0] if said else "".join(caplog.messages)).startswith(said)
    assert len(caplog.messages) == bool(said)


def test_what_has_no_effect_or_another_one_is_said(
    run: tuple[dict[str, Any], Path], caplog: pytest.LogCaptureFixture
) -> None:
    settings, out = run
    changes = {
        "max_steps": 5,
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 4,
        "optim": "galore_adamw_layerwise",
    }
    with caplog.at_level(logging.WARNING, "hf_galore"):
        assert main(["sft", *options({**settings, **changes}), *RESUMED]) == 0
    said = [record.getMessage() for record in caplog.records]
    assert (
        "learning_rate 2e-05 → 0.001: A resumed run keeps what its checkpoint has: the new value has no effect." in said
    )
    assert (
        "per_device_train_batch_size 2 → 4: A resumed run skips as many batches as it has had, which are others now: "
        "it repeats or omits some." in said
    )
    assert "max_steps 4 → 5: The learning rate goes on by the new schedule, and may jump here." in said
    rates = [entry["learning_rate"] for entry in history(out) if "loss" in entry]
    assert max(rates) <= 2e-5
    facts = RunFacts.read(out)
    assert facts is not None
    assert facts.learning_rate == 2e-5


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"optim": "adamw_torch"}, "settings of the optimizer: optim galore_adamw → adamw_torch."),
        ({"optim": "galore_adafactor"}, "settings of the optimizer: optim galore_adamw → galore_adafactor."),
    ],
)
def test_a_checkpoint_of_another_program_says_its_optimizer(
    changes: dict[str, Any], words: str, run: tuple[dict[str, Any], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """By its training arguments: there is no record of ours."""
    settings, out = run
    (out / RUN_FILE).unlink()
    assert optim_of(out / "checkpoint-4") == "galore_adamw"
    told = {key: value for key, value in settings.items() if "galore" in changes["optim"] or "optim_" not in key}
    line = said_of_mistake("sft", [*options({**told, **changes, "max_steps": 6}), *RESUMED], capsys)
    assert words in line


def test_what_is_no_pickle_of_training_arguments_says_nothing(tmp_path: Path) -> None:
    assert optim_of(tmp_path) is None
    (tmp_path / "training_args.bin").write_bytes(b"old")
    assert optim_of(tmp_path) is None
    torch.save({"optim": 3}, tmp_path / "training_args.bin")
    assert optim_of(tmp_path) is None


def test_adapters_that_the_run_did_not_have(
    run: tuple[dict[str, Any], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """The Trainer would leave the checkpoint's weights out, with a warning."""
    settings, _ = run
    line = said_of_mistake("sft", [*options({**settings, "max_steps": 6, "use_peft": "true"}), *RESUMED], capsys)
    assert "was written with other settings of the adapters: use_peft false → true. Give the run's own again" in line
