"""Commands in several processes: under torchrun and accelerate launch, on gloo; and where one of them is killed."""

from __future__ import annotations

import csv
import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType
from transformers import TrainingArguments

from hf_galore.cli import main as entry
from hf_galore.cli.main import COMMANDS, TOGETHER, main
from hf_galore.cli.noise import quieten
from hf_galore.cli.run_script import is_own_command
from hf_galore.log import logger
from hf_galore.recipes.catalog import catalog, copy, find, listed, next_commands
from hf_galore.recipes.checkpoints import check_folders, flaw
from hf_galore.recipes.embedded_model import CACHE_VARIABLE, Embedded
from hf_galore.recipes.run_record import RunFacts
from tests.support import warm
from tests.support.commands import ON_CPU, history, options, recipe_on_cpu, short_run, weights, write_recipe
from tests.support.helpers import arguments
from tests.support.ranks import printed

ROOT = Path(__file__).parents[2]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
ENDED: list[int] = []
"""The exit statuses with which commands would have ended this process at once."""


@pytest.fixture(autouse=True)
def _as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Undo what a command does to its process where it is one of several, and let none end the tests."""
    level = logger.level
    monkeypatch.setattr("hf_galore.cli.main.os._exit", ENDED.append)
    yield
    ENDED.clear()
    logger.setLevel(level)
    os.environ.pop("TQDM_DISABLE", None)


def run(command: Sequence[str | Path], cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [env.get("PYTHONPATH")])])
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd, env=env, timeout=300)


def assert_one_speaks(folder: Path) -> None:
    """Nothing that process 0 says is said by the other too."""
    assert printed(folder, 1, "stdout") == ""
    said = [set(filter(None, printed(folder, rank, "stderr").splitlines())) for rank in (0, 1)]
    assert not said[0] & said[1]


# ---- torchrun


@pytest.mark.slow
@pytest.mark.parametrize(
    ("optim", "launcher"),
    [("galore_adamw", "torchrun"), ("galore_adamw_layerwise", "its agent")],  # rounding tips codes of 8 bits over
)
def test_the_quickstart_in_two_processes_is_that_of_one(
    optim: str, launcher: str, small: Embedded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half as many rows a device, and every number as before; what is shown and written is so once."""
    settings = {
        "optim": optim,
        "optim_args": "rank=64, update_proj_gap=5, scale=1, proj_bits=16",
        "train_sampling_strategy": "random",  # of other lengths, groups of other lengths would be made
        "adam_epsilon": 1e-4,  # Adam's own makes much of rounding: plain AdamW ends 3e-4 apart then
        "max_steps": 12,
        "save_strategy": "steps",
        "save_steps": 6,
        "logging_steps": 1,
        "eval_on_start": "false",
        "eval_strategy": "no",
        "use_cpu": "true",
    }
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv(CACHE_VARIABLE, str(small.model.parents[1]))
    one, two = tmp_path / "one", tmp_path / "two"
    assert main(["quickstart", *options({**settings, "output_dir": one, "per_device_train_batch_size": 8})]) == 0
    given = options({**settings, "output_dir": two, "per_device_train_batch_size": 4})
    kept = ["--redirects", "3", "--log-dir", str(tmp_path / "logs")]
    if launcher == "torchrun":
        ended = run([*TORCHRUN, *kept, "-m", "hf_galore", "quickstart", *given])
    else:  # as quick as a command alone
        ended = warm.ran(warm.torchrun, 2, tmp_path / "logs", warm.hf_galore, "quickstart", *given)
    assert ended.returncode == 0, ended.stderr + printed(tmp_path, 0, "stderr") + printed(tmp_path, 1, "stderr")

    for name, expected in weights(one).items():
        torch.testing.assert_close(weights(two)[name], expected, rtol=0, atol=1e-5)
    losses = [[entry["loss"] for entry in history(folder)] for folder in (one, two)]
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    assert len(losses[1]) == 12

    assert_one_speaks(tmp_path)
    shown, said = printed(tmp_path, 0, "stdout"), printed(tmp_path, 0, "stderr")
    assert re.findall(r"^step (\d+)/12 ", shown, re.MULTILINE) == [str(step) for step in range(1, 13)]
    assert shown.count("The saved model, loaded again, is asked") == 1
    assert "2 processes train together: a step has 8 rows, of per_device_train_batch_size 4 x" in said
    facts = RunFacts.read(two)
    assert facts is not None
    assert (facts.command, facts.finished) == ("hf-galore quickstart", True)
    assert sorted(path.name for path in two.glob("checkpoint-*")) == ["checkpoint-12", "checkpoint-6"]
    for folder in two.glob("checkpoint-*"):
        assert flaw(folder) is None
        assert sorted(path.name for path in folder.glob("rng_state*")) == ["rng_state_0.pth", "rng_state_1.pth"]


# ---- accelerate launch


def test_accelerates_files_say_what_they_are_for() -> None:
    ddp, fsdp = (load_config_from_file(str(find(name))) for name in ("accelerate/ddp.yaml", "fsdp2"))
    assert (ddp.distributed_type, fsdp.distributed_type) == (DistributedType.MULTI_GPU, DistributedType.FSDP)
    for config in (ddp, fsdp):
        assert (config.mixed_precision, config.num_machines, config.use_cpu) == ("no", 1, False)
        assert config.num_processes > 1
    assert fsdp.fsdp_config == {
        "fsdp_version": 2,
        "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "fsdp_reshard_after_forward": True,
        "fsdp_state_dict_type": "SHARDED_STATE_DICT",
        "fsdp_cpu_ram_efficient_loading": True,
        "fsdp_offload_params": False,
        "fsdp_activation_checkpointing": False,
    }


def test_accelerates_files_are_copied_and_are_no_recipes(tmp_path: Path) -> None:
    assert not [one.name for one in catalog() if one.name.startswith("accelerate")]
    path = copy("ddp", tmp_path, overwrite=False)
    (line,) = next_commands(listed("accelerate/ddp.yaml"), path)
    assert line == f"accelerate launch --config_file {path} -m hf_galore sft --config recipe.yaml"
    assert main(["sft", "--config", "accelerate/ddp.yaml"]) == 2


@pytest.mark.slow
def test_sft_under_accelerate_launch(small: Embedded, tmp_path: Path) -> None:
    """By the file that comes with hf_galore, which starts two processes without GPUs too."""
    settings = {**short_run(small.model, small.data, tmp_path / "out"), "gradient_accumulation_steps": 1}
    path = write_recipe(
        tmp_path, {key: str(value) if isinstance(value, Path) else value for key, value in settings.items()}
    )
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(find("accelerate/ddp.yaml"))]
    ended = run([*launcher, "--main_process_port", "0", "-m", "hf_galore", "sft", "--config", path], tmp_path)
    assert ended.returncode == 0, ended.stderr
    out = ended.stdout
    assert re.findall(r"^step (\d)/4 ", out, re.MULTILINE) == list("1234")
    assert out.count(f"The model is in {tmp_path / 'out'}.") == 1
    assert ended.stderr.count("2 processes train together: a step has 4 rows") == 1
    assert ended.stderr.count("GaLore projects 14 matrices") == 1
    assert (tmp_path / "out" / "checkpoint-4" / "rng_state_1.pth").is_file()
    assert flaw(tmp_path / "out" / "checkpoint-4") is None


# ---- what is shown, and what cannot be done


def test_a_mistake_is_said_once_and_by_others_only_where_nobody_ends_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    waited: list[float] = []
    monkeypatch.setattr("hf_galore.cli.main.time.sleep", waited.append)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert main(["sft", "--config", "nowhere.yaml"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("hf-galore sft: --config nowhere.yaml: there is no such file")
    assert not waited
    assert ENDED == [2]  # not by way of torch's own end, which may wait for the others
    monkeypatch.setenv("RANK", "1")
    assert main(["sft", "--config", "nowhere.yaml"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("hf-galore sft (process 1): --config nowhere.yaml: there is no such file")
    assert waited == [entry.PATIENCE]


def test_the_first_process_alone_makes_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another could make it again, where the first has found a mistake and has taken it away."""
    args = arguments(tmp_path / "out", "galore_adamw")
    for process in (1, 0):
        monkeypatch.setattr(TrainingArguments, "process_index", process)
        check_folders(args)
        assert (tmp_path / "out").is_dir() == (process == 0)


def test_all_but_the_first_process_say_errors_only(monkeypatch: pytest.MonkeyPatch) -> None:
    for rank, quiet in (("0", False), ("1", True)):
        monkeypatch.setenv("RANK", rank)
        quieten()
        assert logger.isEnabledFor(logging.WARNING) != quiet
        assert ("TQDM_DISABLE" in os.environ) == quiet


@pytest.mark.parametrize("command", sorted(set(COMMANDS) - set(TOGETHER)))
def test_commands_for_one_process_are_refused_in_several(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main([command]) == 2
    said = capsys.readouterr()
    assert said.err.startswith(f"hf-galore {command}: 2 processes were started for what one does.")
    assert said.out == ""


def test_a_launcher_starts_commands_by_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").mkdir()
    assert all(is_own_command(name) for name in COMMANDS)
    (tmp_path / "sft").write_text("#!/usr/bin/env python\n")
    assert not is_own_command("sft")
    assert not is_own_command("train.py")


# ---- each command


@pytest.fixture(scope="module")
def in_two(small: Embedded, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of what commands have left, each run in two processes."""
    folder = tmp_path_factory.mktemp("in_two")
    texts = folder / "texts.csv"
    with texts.open("w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *[("good food", 1), ("bad food", 0)] * 8])
    documents, pairs = folder / "documents", folder / "pairs"
    documents.mkdir()
    for number in range(10):
        words = (f"word{number}{chr(97 + index % 7)}" for index in range(60))
        (documents / f"{number}.txt").write_text(" ".join(words))
    pairs.mkdir()
    row = json.dumps({"prompt": "Who are you?", "chosen": " A model.", "rejected": " Why?"})
    (pairs / "train.jsonl").write_text(f"{row}\n" * 8)
    common = {**ON_CPU, "optim": "galore_adamw", "optim_target_modules": ["attn", "mlp"], "optim_args": "rank=8"}
    short = {**common, "max_steps": 2, "logging_steps": 1, "per_device_train_batch_size": 2}
    sft = {**short_run(small.model, small.data, folder / "mistake-out"), "dataset_train_split": "nowhere"}
    own = {**short, "model_name_or_path": str(small.model), "train_file": str(texts), "validation_file": str(texts)}
    recipes = [
        recipe_on_cpu(folder / name, **{**own, "eval_strategy": "epoch", "save_strategy": "no", "disable_tqdm": True})
        for name in ("first", "second")
    ]
    text = {"config_name": small.model, "tokenizer_name": small.model, "dataset_name": documents, "held_out": 0.2}
    commands = {
        "mistake": ["sft", *options(sft)],
        "glue": ["glue", "--config", *recipes],
        "pretrain": ["pretrain", *options({
            **short, **text, "dataset_streaming": "true", "max_length": 16, "eval_strategy": "steps", "eval_steps": 2,
            "save_steps": 2, "output_dir": folder / "pretrain-out",
        })],
        "dpo": ["dpo", *options({
            **short, "model_name_or_path": small.model, "dataset_name": pairs, "max_length": 32, "save_strategy": "no",
            "output_dir": folder / "dpo-out",
        })],
    }  # fmt: skip
    ended = warm.ran(warm.module, "tests.support.commands_in_two", str(folder), json.dumps(commands))
    assert ended.returncode == 0, ended.stderr
    return folder


def assert_fine(folder: Path) -> None:
    assert (folder / "status").read_text() == "0", printed(folder, 0, "stderr") + printed(folder, 1, "stderr")
    assert_one_speaks(folder)


@pytest.mark.slow
def test_a_mistake_in_two_processes(in_two: Path) -> None:
    """Of data, which process 0 looks at first; nothing is left of the run."""
    assert (in_two / "mistake" / "status").read_text() == "1"
    lines = printed(in_two / "mistake", 0, "stderr").splitlines()
    assert [line for line in lines if line.startswith("hf-galore sft: The dataset has no split 'nowhere'")]
    assert "no split" not in printed(in_two / "mistake", 1, "stderr")
    assert not (in_two / "mistake-out").exists()


@pytest.mark.slow
def test_glue_runs_one_after_the_other_in_two_processes(in_two: Path) -> None:
    assert_fine(in_two / "glue")
    assert printed(in_two / "glue", 0, "stdout").count("Scores in per cent") == 1
    for name in ("first", "second"):
        facts = RunFacts.read(in_two / name / "out")
        assert facts is not None
        assert facts.finished


@pytest.mark.slow
def test_pretrain_and_dpo_in_two_processes(in_two: Path) -> None:
    for command in ("pretrain", "dpo"):
        assert_fine(in_two / command)
        assert printed(in_two / command, 0, "stdout").count(f"The model is in {in_two / command}-out.") == 1
        assert [entry["step"] for entry in history(in_two / f"{command}-out") if "loss" in entry] == [1, 2]
    assert (in_two / "pretrain-out" / "checkpoint-2" / "stream_position.json").is_file()


# ---- a process is killed


@pytest.mark.slow
@pytest.mark.parametrize("optim", ["galore_adamw_8bit_layerwise"])
def test_a_killed_process_ends_the_other_and_the_run_goes_on_from_its_last_whole_checkpoint(
    optim: str, small: Embedded, tmp_path: Path
) -> None:
    """To where it would have ended; the program that is run here holds that the weights and all state are the same."""
    ended = warm.ran(warm.module, "tests.support.killed_ranks", *map(str, (tmp_path, small.model, small.data, optim)))
    assert ended.returncode == 0, ended.stdout + ended.stderr
    found: list[dict[str, Any]] = json.loads(ended.stdout.splitlines()[-1])
    assert len(found) == 4
    for kill in found:
        assert kill["seconds"] < 60, kill
    whole = [next(name for name, problem in kill["flaws"].items() if problem is None) for kill in found]
    assert whole == ["checkpoint-1", "checkpoint-3", "checkpoint-4", "checkpoint-5"]
    half = [{name: problem for name, problem in kill["flaws"].items() if problem is not None} for kill in found]
    assert half[:2] == [{}, {}]
    assert half[2] == {"checkpoint-5": "it holds no trainer_state.json"}
    assert "optimizer.pt is cut off" in half[3]["checkpoint-6"]
