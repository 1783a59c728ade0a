"""A folder with a run in it: it is mixed with no other, and removed only where that was asked for."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from hf_galore.cli.main import main
from hf_galore.cli.training_command import how_to_go_on
from hf_galore.recipes.embedded_model import Embedded
from hf_galore.recipes.output_folder import OutputArguments, check_unused, remove_run
from hf_galore.recipes.run_record import RUN_FILE, RunFacts
from hf_galore.recipes.settings import RECIPE_FILE
from tests.support.commands import ON_CPU, history, options, said_of_mistake, short_run, write_checkpoint, write_recipe
from tests.support.written_runs import write_run

TYPED = {key: value == "true" for key, value in ON_CPU.items() if value in ("true", "false")}
TYPED["activation_checkpointing"] = False


@pytest.fixture
def settings(small: Embedded, tmp_path: Path) -> dict[str, Any]:
    own = {"optim": "galore_adamw_layerwise", "optim_target_modules": "all-linear"}
    return {**short_run(small.model, small.data, tmp_path / "out"), **own}


def test_a_new_run_refuses_the_folder_of_another_unless_told(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["sft", *options(settings)]) == 0
    facts = RunFacts.read(out)
    assert facts is not None
    before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    new = {**settings, "learning_rate": 3e-4, "max_steps": 1, "save_steps": 1}
    said = said_of_mistake("sft", options(new), capsys)
    assert said == (
        f"hf-galore sft: output_dir {out} holds a run: hf-galore sft of {settings['model_name_or_path']}, optim "
        f'galore_adamw_layerwise, optim_args "rank=8", learning rate 2e-05, begun {facts.started.replace("T", " ")}, '
        "finished; its last checkpoint is checkpoint-4. Go on with it by --resume_from_checkpoint, give another "
        "--output_dir, or remove what is there by --overwrite_output_dir."
    )
    assert {file: file.read_bytes() for file in out.rglob("*") if file.is_file()} == before
    # A mistake is found before anything is removed.
    assert main(["sft", *options({**new, "optim_target_modules": "atn"}), "--overwrite_output_dir"]) == 2
    assert {file: file.read_bytes() for file in out.rglob("*") if file.is_file()} == before
    (out / "notes.txt").write_text("mine")
    assert main(["sft", *options(new), "--overwrite_output_dir"]) == 0
    assert sorted(path.name for path in out.glob("checkpoint-*")) == ["checkpoint-1"]
    assert [entry["step"] for entry in history(out) if "loss" in entry] == [1]
    assert (out / "notes.txt").read_text() == "mine"
    assert "are both given" in said_of_mistake(
        "sft", [*options(new), "--overwrite_output_dir", "--resume_from_checkpoint"], capsys
    )


def test_the_recipe_that_a_run_leaves_runs_again(settings: dict[str, Any], tmp_path: Path) -> None:
    """What the file says, and over it what the command line does: the same losses, bit for bit."""
    texts = {key: str(value) if isinstance(value, Path) else value for key, value in settings.items()}
    path = write_recipe(tmp_path, {**texts, **TYPED})
    options_ = [
        "--learning_rate",
        "3e-4",
        "--no_dataloader_pin_memory",
        "--optim-target-modules",
        "attn",
        "mlp",
        "--hub_token=secret",
    ]
    assert main(["sft", "--config", path, *options_]) == 0
    left = tmp_path / "out" / RECIPE_FILE
    said = yaml.safe_load(left.read_text("utf-8"))
    expected = {**yaml.safe_load(Path(path).read_text("utf-8")), "learning_rate": 3e-4}
    assert said == {**expected, "optim_target_modules": ["attn", "mlp"], "dataloader_pin_memory": False}
    assert main(["sft", "--config", str(left), "--output_dir", str(tmp_path / "again")]) == 0
    assert history(tmp_path / "again") == history(tmp_path / "out")
    first, second = (RunFacts.read(tmp_path / name) for name in ("out", "again"))
    assert first is not None
    assert second is not None
    assert first.settings == second.settings
    assert first.settings is not None
    assert (first.settings["seed"], first.settings["max_length"]) == (42, 32)
    assert (first.settings["hub_token"], first.settings["eos_token"]) == ("<HUB_TOKEN>", None)
    assert "secret" not in left.read_text("utf-8")


def test_a_run_that_was_stopped_before_its_first_checkpoint_is_begun_again(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    record = json.loads((folder / RUN_FILE).read_text())
    for file in folder.iterdir():
        file.unlink()
    (folder / RUN_FILE).write_text(json.dumps({**record, "finished": False}))
    check_unused(folder, OutputArguments(), resumes=False)
    check_unused(tmp_path / "nowhere", OutputArguments(), resumes=False)


def test_a_run_of_another_program(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "checkpoint-20")
    with pytest.raises(ValueError, match=r"holds a run: of \d{4}-.*, by another program; its last checkpoint is"):
        check_unused(tmp_path, OutputArguments(), resumes=False)
    check_unused(tmp_path, OutputArguments(), resumes=True)
    remove_run(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_how_to_go_on_after_ctrl_c_names_no_other_runs_checkpoint(tmp_path: Path) -> None:
    """Before the new run begins to train, the folder may still hold the one that it is to remove."""
    checkpoint = write_checkpoint(tmp_path / "checkpoint-20")
    os.utime(checkpoint, (1000, 1000))
    arguments = ["--config", "a.yaml", "--overwrite_output_dir", "--max_steps", "9"]
    new = how_to_go_on("hf-galore sft", arguments, str(tmp_path), since=2000.0)
    assert "holds no checkpoint yet, so run the same command again" in new
    for since in (500.0, None):
        assert how_to_go_on("hf-galore sft", arguments, str(tmp_path), since=since) == (
            f"interrupted; go on from {checkpoint} with: hf-galore sft --config a.yaml --max_steps 9 "
            "--resume_from_checkpoint"
        )
