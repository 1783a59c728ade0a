"""LLaMA-Factory, the real one, with hf_galore's optimizers: `python -m hf_galore llamafactory-cli train`."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from hf_galore.plan.cards import parse_size
from hf_galore.recipes.folders import configs_folder, recipes_folder
from tests.support.helpers import assert_identical, tiny_llama
from tests.support.tokenizer import save_tokenizer

pytest.importorskip("llamafactory")

ROOT = Path(__file__).parents[2]
EXAMPLE = recipes_folder() / "llamafactory" / "llama3_8b_alpaca.yaml"
RANK = 16
# 14 in the layers, and the embedding and the head, which the example names.
TARGETS = 16
# Stages other than sft, and what they train on here.
STAGES = {"pt": "sums", "dpo": "preferred", "rm": "preferred", "kto": "liked"}
VOCABULARY = 512  # room for the tokens that the template of Llama-3 adds


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, its tokenizer, and data sets to train and to prefer; empty modules that a CPU lacks."""
    folder = tmp_path_factory.mktemp("llamafactory")
    sums = [(f"What is {a} plus {b}?", f"{a} plus {b} is {a + b}.") for a in range(8) for b in range(8)]
    save_tokenizer(folder / "model", [" ".join(row) for row in sums])
    tiny_llama(vocab_size=VOCABULARY, max_position_embeddings=256).save_pretrained(folder / "model")

    alpaca = [{"instruction": asked, "input": "", "output": answer} for asked, answer in sums]
    long = [{"instruction": "What is 1 plus 1?", "input": "", "output": "2 " * 2048}] * 64
    preferred = [{"instruction": asked, "input": "", "chosen": answer, "rejected": "?"} for asked, answer in sums]
    liked = [{**row, "liked": index % 2 == 0} for index, row in enumerate(alpaca)]
    alpacas = {"prompt": "instruction", "query": "input", "response": "output"}
    columns = {"prompt": "instruction", "query": "input", "chosen": "chosen", "rejected": "rejected"}
    info = {
        "sums": {"file_name": "sums.json"},
        "long": {"file_name": "long.json"},
        "preferred": {"file_name": "preferred.json", "ranking": True, "columns": columns},
        "liked": {"file_name": "liked.json", "columns": {**alpacas, "kto_tag": "liked"}},
    }
    contents = {"sums": alpaca, "long": long, "preferred": preferred, "liked": liked, "dataset_info": info}
    for name, content in contents.items():
        (folder / f"{name}.json").write_text(json.dumps(content), "utf-8")

    (folder / "modules").mkdir()
    if importlib.util.find_spec("torchaudio") is None:  # imported, and not used for text
        (folder / "modules" / "torchaudio.py").touch()
    return folder


def overrides(tiny: Path, output_dir: Path, **others: Any) -> dict[str, Any]:
    """What makes the example one for a small model on a CPU."""
    return {
        "model_name_or_path": str(tiny / "model"),
        "dataset_dir": str(tiny),
        "dataset": "sums",
        "overwrite_cache": True,
        "pure_bf16": False,  # is asked of a GPU
        "optim_args": f"rank={RANK}, update_proj_gap=2, scale=0.5",
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "warmup_steps": 0,
        "max_steps": 2,
        "logging_steps": 1,
        "eval_steps": 2,
        "save_steps": 1,
        "output_dir": str(output_dir),
        **others,
    }


def settings(tiny: Path, output_dir: Path, **others: Any) -> dict[str, Any]:
    """The example with those."""
    return {**yaml.safe_load(EXAMPLE.read_text("utf-8")), **overrides(tiny, output_dir, **others)}


def python(tiny: Path, arguments: list[str], **variables: str) -> subprocess.CompletedProcess[str]:
    """Run it with this package, and torch's own commands on the PATH."""
    paths = [str(ROOT), str(tiny / "modules"), os.environ.get("PYTHONPATH", "")]
    env = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        **variables,
    }
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=env, cwd=tiny, timeout=600)


def command_line(tiny: Path, changed: Mapping[str, Any], **variables: str) -> subprocess.CompletedProcess[str]:
    """`python -m hf_galore llamafactory-cli train` of the example."""
    words = [f"{key}={json.dumps(value) if isinstance(value, bool) else value}" for key, value in changed.items()]
    return python(tiny, ["-m", "hf_galore", "llamafactory-cli", "train", str(EXAMPLE), *words], **variables)


def logged(output_dir: Path) -> list[dict[str, Any]]:
    """What a run has logged, step by step."""
    found: list[dict[str, Any]] = json.loads((output_dir / "trainer_state.json").read_text("utf-8"))["log_history"]
    return found


def weights(folder: Path) -> dict[str, Tensor]:
    """Those of a model that was saved."""
    return load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def trained(tiny: Path) -> Path:
    """The output of two steps of the example by the command line."""
    output_dir = tiny / "by the command line"
    ended = command_line(tiny, overrides(tiny, output_dir))
    assert ended.returncode == 0, ended.stderr
    assert f"GaLore projects {TARGETS} matrices" in ended.stderr
    return output_dir


@pytest.fixture(scope="module")
def outcomes(tiny: Path, trained: Path) -> dict[str, Any]:
    """What came of other runs, all in one process: a script with `import hf_galore` that calls LLaMA-Factory."""
    resumed = tiny / "resumed"
    shutil.copytree(trained / "checkpoint-1", resumed / "checkpoint-1")
    otherwise: dict[str, Any] = {
        "optim_target_modules": "all-linear",
        "optim": "galore_adafactor",
        "max_grad_norm": 0.0,
    }
    jobs = {
        "resumed": ("run", settings(tiny, resumed)),
        "plain": ("run_plain", settings(tiny, tiny / "plain")),
        **{
            stage: ("run", settings(tiny, tiny / stage, stage=stage, dataset=dataset, eval_strategy="no", val_size=0))
            for stage, dataset in STAGES.items()
        },
        "otherwise": ("run", settings(tiny, tiny / "otherwise", **otherwise)),
        "typo": ("run", settings(tiny, tiny / "typo", optim_args="rnak=16")),
        "muon": ("run", settings(tiny, tiny / "muon", use_muon=True)),
        "galore": ("without_checks_of_packages", settings(tiny, tiny / "galore", use_galore=True)),
        "peaks": ("plan_and_measure", settings(tiny, tiny / "peaks", val_size=0, eval_strategy="no", cutoff_len=16)),
    }
    return outcomes_of(tiny, tiny / "jobs", jobs)


def outcomes_of(tiny: Path, folder: Path, jobs: dict[str, Any]) -> dict[str, Any]:
    """Do jobs of `tests.support.llamafactory_jobs`."""
    folder.mkdir()
    given, written = folder / "jobs.json", folder / "outcomes.json"
    given.write_text(json.dumps(jobs), "utf-8")
    ended = python(tiny, ["-m", "tests.support.llamafactory_jobs", str(given), str(written)])
    assert ended.returncode == 0, ended.stderr
    found: dict[str, Any] = json.loads(written.read_text("utf-8"))
    return found


# ---- it trains as asked


def test_the_example_trains_by_the_command_line(trained: Path, tiny: Path) -> None:
    first, second = (entry for entry in logged(trained) if "loss" in entry)
    assert first["galore/targets"] == TARGETS
    assert first["galore/refreshes"] == TARGETS
    assert second["loss"] < first["loss"]
    assert first["grad_norm"] > 0  # LLaMA-Factory's own layerwise GaLore logs 0
    start, end = weights(tiny / "model"), weights(trained)
    assert [name for name, weight in start.items() if torch.equal(weight, end[name])] == []
    optimizer = torch.load(trained / "checkpoint-2" / "optimizer.pt", weights_only=True)
    assert (
        sum("exp_avg_absmax" in state for state in optimizer["state"].values()) == 8
    )  # in 8 bits: MLPs, and both ends
    assert {group.get("rank") for group in optimizer["param_groups"]} == {None, RANK}


def test_its_weights_are_a_plain_trainers(trained: Path, tiny: Path, outcomes: dict[str, Any]) -> None:
    """Accumulated and clipped; LLaMA-Factory checkpoints activations besides."""
    assert outcomes["plain"] is None
    assert_identical(weights(trained), weights(tiny / "plain"))


def test_a_run_that_finds_a_checkpoint_goes_on_bit_for_bit(trained: Path, tiny: Path, outcomes: dict[str, Any]) -> None:
    """That one in a script with `import hf_galore`, which calls `run_exp`."""
    assert outcomes["resumed"] is None
    assert [entry["step"] for entry in logged(tiny / "resumed") if "loss" in entry] == [1, 2]
    assert_identical(weights(trained), weights(tiny / "resumed"))


@pytest.mark.parametrize(("name", "targets"), [*((stage, TARGETS) for stage in STAGES), ("otherwise", 14)])
def test_other_settings_train(name: str, targets: int, tiny: Path, outcomes: dict[str, Any]) -> None:
    assert outcomes[name] is None
    assert logged(tiny / name)[0]["galore/targets"] == targets


@pytest.mark.slow
def test_two_processes_that_it_starts_itself(tiny: Path) -> None:
    """As it does where there are several GPUs."""
    output_dir = tiny / "two"  # it takes a command line apart at spaces
    changed = overrides(tiny, output_dir, optim="galore_adamw_8bit", optim_args=f"rank={RANK}")
    ended = command_line(tiny, changed, FORCE_TORCHRUN="1", NPROC_PER_NODE="2")
    assert ended.returncode == 0, ended.stderr
    assert "world size: 2" in ended.stdout + ended.stderr
    assert logged(output_dir)[0]["galore/targets"] == TARGETS


# ---- or says why not


def test_a_typo_is_one_clear_error(outcomes: dict[str, Any]) -> None:
    assert re.fullmatch(r"ValueError: GaLore has no argument 'rnak'; .* Did you mean 'rank'\?", outcomes["typo"])


def test_another_optimizer_of_its_own_is_an_error(outcomes: dict[str, Any]) -> None:
    """Without the error use_muon would train with Muon, whatever optim says."""
    assert outcomes["muon"].endswith(
        "made an optimizer of its own, Muon. LLaMA-Factory does so for use_muon. Leave that out; or, to train with it, "
        "leave out optim, optim_target_modules and optim_args."
    )
    assert "Leave out what sets that (use_galore, " in outcomes["galore"]


# ---- memory


def test_a_plan_of_its_trainer_is_what_the_run_takes(outcomes: dict[str, Any]) -> None:
    planned, measured = outcomes["peaks"]
    assert planned == measured


@pytest.mark.slow
def test_the_example_takes_the_memory_that_its_header_says(tiny: Path) -> None:
    model = tiny / "the example's"
    shutil.copytree(tiny / "model", model, ignore=shutil.ignore_patterns("*.safetensors"))
    shutil.copy(configs_folder() / "meta-llama" / "Meta-Llama-3-8B" / "config.json", model)
    text = EXAMPLE.read_text("utf-8")
    said = re.search(r"^# Planned: peak (\d+\.\d+) GiB, and a card has to have (\d+\.\d+);", text, re.MULTILINE)
    assert said is not None
    changed = {
        "dataset_dir": str(tiny),
        "dataset": "long",
        "output_dir": str(tiny / "planned"),
        "overwrite_cache": True,
    }
    example = {**yaml.safe_load(text), **changed, "model_name_or_path": str(model)}
    found = outcomes_of(tiny, tiny / "plan", {"plan": ("plan", example)})["plan"]
    assert found["peak_bytes"] / 2**30 == pytest.approx(float(said[1]), rel=0.01)
    assert found["needed_bytes"] / 2**30 == pytest.approx(float(said[2]), rel=0.01)
    assert found["needed_bytes"] <= parse_size("24GB")
