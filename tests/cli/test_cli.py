"""`hf-galore`'s smaller promises: spellings, what is an error of the person and what is a bug, which checkpoint is the
last. Whole runs are in test_commands.py."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from hf_galore import GaLoreConfig
from hf_galore.cli.main import main
from hf_galore.recipes import checkpoints, errors, kinds, sft, training
from hf_galore.recipes.errors import UserError
from hf_galore.recipes.folders import recipes_folder
from tests.support.commands import write_checkpoint

RUNS_ANYWHERE = {"bf16": False, "use_cpu": True, "report_to": "none"}


def recipe_in(folder: Path, **settings: Any) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({**RUNS_ANYWHERE, "output_dir": str(folder / "out"), **settings}), encoding="utf-8")
    return str(path)


def parse(*arguments: str) -> sft.Arguments:
    return sft.parse(arguments, "hf-galore sft", "")


# ---- spellings


def test_values_in_every_spelling_that_yaml_and_trl_allow(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    # YAML 1.1 reads 1e-5 as text, 3 as an integer and yes as true.
    path.write_text(
        "learning_rate: 1e-5\nnum_train_epochs: 3\nbf16: no\nuse_cpu: yes\nresume_from_checkpoint: true\n"
        "model_init_kwargs: {attn_implementation: eager}\naccelerator_config: '{\"split_batches\": true}'\n"
        "max_length:\n"  # empty: none, which this key allows
    )
    for spelling in (["--config", str(path)], [f"--config={path}"]):
        parsed = parse(*spelling, "--weight-decay", "0.1")
        training = parsed.training
        assert training.learning_rate == 1e-5
        assert training.num_train_epochs == 3
        assert (training.bf16, training.use_cpu, training.resume_from_checkpoint) == (False, True, True)
        assert training.model_init_kwargs == {"attn_implementation": "eager"}
        assert training.accelerator_config.split_batches is True
        assert training.max_length is None
        assert training.weight_decay == 0.1
        assert parsed.recipe == path


def test_a_recipe_sets_environment_variables_as_trl_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_GALORE_TEST", "before")
    parse("--config", recipe_in(tmp_path, env={"HF_GALORE_TEST": 3}))
    assert os.environ["HF_GALORE_TEST"] == "3"


@pytest.mark.parametrize(
    ("settings", "options", "words"),
    [
        ({"env": 3}, [], "env has to be a mapping"),
        ({"max_steps": None}, [], "max_steps has to be an integer, but is empty"),
        ({"bf16": "perhaps"}, [], "bf16 has to be true or false"),
        ({"use_cpu": 1}, [], "use_cpu has to be true or false, but is 1"),
        ({"learning_rate": True}, [], "learning_rate has to be a number, but is True"),
        ({"learning_rate": "fast"}, [], "learning_rate has to be a number, but is 'fast'"),
        ({"optim_args": {"rank": 8}}, [], "optim_args has to be a string, but is {'rank': 8}"),
        ({"optim_target_modules": ["attn", 3]}, [], "optim_target_modules has to be a string or a list of strings"),
        ({"lr_scheduler_type": "cosin"}, [], "Did you mean 'cosine'?"),
        ({"datasets": "mine"}, [], "datasets has to be a list of mappings, but is 'mine'"),
        ({}, ["--optim_target_modules", '["attn", 3]'], '["attn", 3] is not a list of strings'),
        ({}, ["--config", "other.yaml"], "--config is given twice"),
        ({}, ["stray"], "'stray' belongs to no --key"),
        # transformers would keep the recipe's value and drop the command line's.
        (
            {"activation_checkpointing": True},
            ["--gradient_checkpointing", "false"],
            "gradient_checkpointing and activation_checkpointing are both given",
        ),
    ],
)
def test_what_a_recipe_and_its_overrides_must_not_say(
    settings: dict[str, Any], options: list[str], words: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as error:
        parse("--config", recipe_in(tmp_path, **settings), *options)
    assert words in str(error.value)


def test_config_needs_a_file() -> None:
    for arguments in (["--config"], ["--config", "--max_steps", "3"], ["--config="]):
        with pytest.raises(UserError, match="--config needs a file"):
            parse(*arguments)


def test_a_template_is_found_from_the_recipes_folder_and_the_one_above(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for template in (tmp_path / "project" / "beside.jinja", tmp_path / "project" / "recipes" / "inside.jinja"):
        template.parent.mkdir(parents=True, exist_ok=True)
        template.write_text("{{ messages }}")
        path = recipe_in(tmp_path / "project" / "recipes", chat_template_path=template.name)
        assert parse("--config", path).training.chat_template_path == str(template)
    # A name that is nowhere may be a model on the Hub: it is left as it is.
    path = recipe_in(tmp_path / "project" / "recipes", chat_template_path="someone/tokenizer")
    assert parse("--config", path).training.chat_template_path == "someone/tokenizer"


@pytest.mark.parametrize(
    ("options", "args", "targets"),
    [
        (["--optim", "adamw_torch"], None, None),
        (["--optim=adamw_bnb_8bit"], None, None),
        (["--optim", "galore_adafactor"], "rank=8", ["attn"]),
        (["--optim", "lomo", "--optim_target_modules", "mlp"], None, "mlp"),
        ([], "rank=8", ["attn"]),
    ],
)
def test_another_optimizer_does_not_get_galores_arguments(
    options: list[str], args: str | None, targets: Any, tmp_path: Path
) -> None:
    galore = {"optim": "galore_adamw", "optim_args": "rank=8", "optim_target_modules": ["attn"]}
    training = parse("--config", recipe_in(tmp_path, **galore), *options).training
    assert (training.optim_args, training.optim_target_modules) == (args, targets)


@pytest.mark.parametrize(
    ("settings", "options", "command"),
    [
        ({"config_name": "llama_60m"}, [], "pretrain"),
        ({"task_name": "rte"}, [], "glue"),
        ({"model_name_or_path": "m"}, [], "sft"),
        ({}, ["--train-file=a.csv"], "glue"),
        ({"learning_rate": 1e-3}, ["--model_name_or_path", "m"], "sft"),
    ],
)
def test_a_recipes_keys_say_its_command(
    settings: dict[str, Any], options: list[str], command: str, tmp_path: Path
) -> None:
    path = recipe_in(tmp_path, **settings)
    assert kinds.command_for(["--config", path, *options]) == command
    if not options:
        assert kinds.command_of(Path(path)) == command


def test_a_recipe_for_another_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sft", "--config", "pretrain/llama_60m_c4.yaml"]) == 2
    assert "there is no option 'config_name'. It is one of hf-galore pretrain." in capsys.readouterr().err


def test_the_quickstarts_recipe_is_its_own() -> None:
    assert kinds.command_of(recipes_folder() / kinds.QUICKSTART) == "quickstart"
    assert kinds.command_for(["--config", kinds.QUICKSTART, "--model_name_or_path", "m"]) == "sft"


# ---- errors


def test_optim_args_are_checked_before_a_model_is_looked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = recipe_in(tmp_path, model_name_or_path="nowhere/nothing", optim="galore_adamw", optim_args="rank=0")
    assert main(["sft", "--config", path]) == 2
    assert "GaLore's rank has to be an integer of at least 1" in capsys.readouterr().err


def test_a_folder_that_nothing_can_be_written_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if not Path("/proc/self").exists():
        pytest.skip("/proc is the one folder that not even root can write to")
    path = recipe_in(tmp_path, model_name_or_path="m", dataset_name="d", output_dir="/proc/out")
    assert main(["sft", "--config", path]) == 2
    assert "output_dir /proc/out cannot be written to" in capsys.readouterr().err


def test_a_bug_keeps_its_traceback(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a bug"), errors.reporting_errors(str(tmp_path / "out")):
        raise ValueError("a bug")  # this module is none that checks arguments
    with pytest.raises(ValueError, match="unpack"), errors.reporting_errors(str(tmp_path / "out")):
        _, _ = (1,)  # type: ignore[misc]
    with pytest.raises(FileNotFoundError), errors.reporting_errors(str(tmp_path / "out")):
        (tmp_path / "missing").read_text()  # the operating system's own
    with pytest.raises(UserError, match="rank"), errors.reporting_errors(str(tmp_path / "out")):
        GaLoreConfig(rank=0)


def test_only_empty_folders_of_a_failed_run_are_removed(tmp_path: Path) -> None:
    for leaves_a_file in (False, True):
        out = tmp_path / "new" / "out"

        def fails(out: Path = out, leaves_a_file: bool = leaves_a_file) -> None:
            with errors.reporting_errors(str(out)):
                out.mkdir(parents=True)
                if leaves_a_file:
                    (out / "weights").touch()
                GaLoreConfig(rank=0)

        with pytest.raises(UserError):
            fails()
        assert (tmp_path / "new").exists() == leaves_a_file


# ---- checkpoints


def test_the_last_checkpoint_is_the_last_whole_one(tmp_path: Path) -> None:
    assert checkpoints.last_checkpoint(tmp_path) is None
    write_checkpoint(tmp_path / "checkpoint-9")
    latest = write_checkpoint(tmp_path / "checkpoint-10")  # after 9 by number, before it by name
    (tmp_path / "checkpoint-11").mkdir()  # its run was killed while it was written
    (tmp_path / "checkpoint-best").mkdir()
    assert checkpoints.last_checkpoint(tmp_path) == latest


def test_resume_from_a_folder_that_is_no_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = recipe_in(tmp_path, model_name_or_path="m", dataset_name="d")
    assert main(["sft", "--config", path, "--resume_from_checkpoint", str(tmp_path)]) == 2
    assert f"{tmp_path} is no checkpoint" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_finished_runs_folder_is_no_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It has the Trainer's log, but no optimizer."""
    path = recipe_in(tmp_path, model_name_or_path="m", dataset_name="d")
    finished = write_checkpoint(tmp_path / "finished")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        (finished / name).unlink()
    assert main(["sft", "--config", path, "--resume_from_checkpoint", str(finished)]) == 2
    said = capsys.readouterr().err
    assert (
        "it holds no optimizer.pt, scheduler.pt and rng_state.pth, only the model, as a finished run's folder" in said
    )


@pytest.mark.parametrize("resumed", [[], ["--resume_from_checkpoint"], ["--resume_from_checkpoint", "before"]])
def test_the_command_to_go_on_with_asks_to_resume_once(
    resumed: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "run", interrupted)
    path = recipe_in(tmp_path)
    write_checkpoint(tmp_path / "out" / "checkpoint-4")
    assert main(["sft", "--config", path, *resumed, "--max_steps", "9"]) == 130
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.endswith(f": hf-galore sft --config {path} --max_steps 9 --resume_from_checkpoint")
