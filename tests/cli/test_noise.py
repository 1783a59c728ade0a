"""What a person sees of a run, line by line: noise of libraries cannot come back unseen."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from hf_galore.cli import noise
from hf_galore.recipes.embedded_model import Embedded
from tests.support import warm
from tests.support.commands import ON_CPU, command_line, options, short_run
from tests.support.releases import needs_newest

NUMBER = re.compile(r"\d+(\.\d+)?([kKM]\b)?")
GALORE = (
    "GaLore projects # matrices (# parameters, # %) at rank #; full-rank: embeddings # %, output head # %, norms and "
    "biases # %."
)
STEP = "step #/# · loss # · # tokens/s · # GiB · # s left"
LAST = STEP.removesuffix(" · # s left")
MODEL = "The model is in OUT."


def masked(printed: str, tmp_path: Path) -> list[str]:
    return [NUMBER.sub("#", line.replace(str(tmp_path / "out"), "OUT")) for line in printed.splitlines()]


def said(command: str, given: Mapping[str, Any], tmp_path: Path) -> list[str]:
    """Everything that a command writes to a pipe, on stdout and stderr, with its numbers masked."""
    run = subprocess.run(
        command_line(command, *options(given)),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DELAY": "60"},  # bars of what takes long on a busy machine
    )
    assert run.returncode == 0, run.stdout
    return masked(run.stdout, tmp_path)


def said_after_imports(command: str, given: Mapping[str, Any], tmp_path: Path) -> list[str]:
    """The same but for what its imports say, which are those of a command that another test starts."""
    printed = tmp_path / "printed"
    process = warm.begun(
        warm.hf_galore,
        *(command, *options(given)),
        streams=(os.devnull, printed, printed),
        environment={"OMP_NUM_THREADS": "1"},
    )
    assert warm.ended(process) == 0, printed.read_text("utf-8")
    return masked(printed.read_text("utf-8"), tmp_path)


@pytest.fixture
def plain(small: Embedded, tmp_path: Path) -> dict[str, Any]:
    """A run that leaves all to its defaults that a person leaves to them."""
    given = short_run(small.model, small.data, tmp_path / "out")
    return {key: value for key, value in given.items() if key not in ("disable_tqdm", "report_to")}


@needs_newest
@pytest.mark.parametrize("beforehand", ["false", "true"])
def test_all_that_a_run_of_dpo_says(beforehand: str, plain: dict[str, Any], tmp_path: Path) -> None:
    """Whose reference TRL asks with checkpointing off, by names that transformers warns of."""
    row = {name: [{"role": "assistant", "content": name}] for name in ("chosen", "rejected")}
    row["prompt"] = [{"role": "user", "content": "Which?"}]
    (tmp_path / "data").mkdir()
    for split in ("train", "test"):
        (tmp_path / "data" / f"{split}.jsonl").write_text((json.dumps(row) + "\n") * 8, encoding="utf-8")
    given = {**plain, "dataset_name": tmp_path / "data", "eval_strategy": "steps", "eval_steps": 2}
    given |= {"precompute_ref_log_probs": beforehand, "activation_checkpointing": "true"}
    assert (said if beforehand == "false" else said_after_imports)("dpo", given, tmp_path) == [
        GALORE,
        LAST,
        STEP,
        "step #/# · held-out accuracies #",
        STEP.replace("loss #", "loss # · held-out accuracies #"),
        LAST.replace("loss #", "loss # · held-out accuracies #"),
        "step #/# · held-out accuracies #",
        MODEL,
    ]


@needs_newest
def test_all_that_a_run_of_sft_says(plain: dict[str, Any], tmp_path: Path) -> None:
    """With an evaluation and a checkpoint; the steps before the second know of no pace yet."""
    given = {**plain, "eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 64}
    assert said("sft", given, tmp_path) == [
        GALORE,
        LAST,
        STEP,
        "step #/# · held-out #",
        STEP.replace("loss #", "loss # · held-out #"),
        LAST.replace("loss #", "loss # · held-out #"),
        "step #/# · held-out #",
        MODEL,
    ]


@needs_newest
def test_all_that_a_run_with_lora_says(plain: dict[str, Any], tmp_path: Path) -> None:
    """With checkpointing of activations, about which TRL and PEFT ask by an older name."""
    given = {key: value for key, value in plain.items() if not key.startswith("optim") and "checkpointing" not in key}
    given = {**given, "use_peft": "true", "lora_r": 4, "optim": "adamw_torch", "save_strategy": "no"}
    assert said_after_imports("sft", given, tmp_path) == [LAST, STEP, STEP, LAST, MODEL]


@needs_newest
def test_all_that_a_run_of_glue_says(small: Embedded, tmp_path: Path) -> None:
    """Not that the classifier's head is new, which is what a classifier is trained from."""
    rows = [f"text {number},{'good' if number % 2 else 'bad'}" for number in range(8)]
    texts = tmp_path / "texts.csv"
    texts.write_text("\n".join(["sentence,label", *rows]))
    given = {
        **{key: value for key, value in ON_CPU.items() if key not in ("disable_tqdm", "report_to")},
        "model_name_or_path": small.model,
        "train_file": texts,
        "validation_file": texts,
        "optim": "galore_adamw",
        "optim_target_modules": ["attn", "mlp"],
        "optim_args": "rank=8",
        "max_steps": 1,
        "logging_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_strategy": "no",
        "output_dir": tmp_path / "out",
    }
    lines = said("glue", given, tmp_path)
    classifier = GALORE.replace(" output head # %,", "").replace("biases # %", "biases # %, linear layers # %")
    assert lines[:3] == [classifier, "step #/# · loss # · # GiB", "step #/# · held-out accuracy #"]
    assert lines[3].startswith("Scores in per cent")
    assert lines[-1].startswith("└")


# ---- what is hidden, and what is not


def report(*rows: str, model: str = "LlamaForSequenceClassification") -> logging.LogRecord:
    """transformers' table, with its colours."""
    table = "\n".join(["Key | Status | ", "----+--------+-", *rows, "", "Notes:", "- MISSING\t:those params were new."])
    return logging.makeLogRecord({"msg": f"\x1b[1m{model} LOAD REPORT\x1b[0m from: somewhere\n{table}"})


@pytest.mark.parametrize(
    ("record", "hidden"),
    [
        (report("score.weight   | MISSING    | ", "lm_head.weight | UNEXPECTED | "), True),
        (
            report("classifier.dense.weight | \x1b[31mMISSING\x1b[0m | ", "roberta.pooler.dense.bias | UNEXPECTED | "),
            True,
        ),
        (report("score.weight | MISSING | ", "model.layers.0.mlp.up_proj.weight | MISSING | "), False),
        (report("score.weight | MISMATCH | "), False),
        (report("model.layers.0.mlp.up_proj.weight | UNEXPECTED | "), False),
        (report("score.weight | MISSING | ", model="LlamaForCausalLM"), False),
        (logging.makeLogRecord({"msg": "score.weight | MISSING | "}), False),
    ],
)
def test_of_what_is_new_in_a_model_only_a_classifiers_head_is_no_news(record: logging.LogRecord, hidden: bool) -> None:
    assert noise._has_more_than_a_new_head(record) != hidden


def test_filters_and_warnings_are_not_added_twice() -> None:
    for _ in range(2):
        noise.quieten()
    for name in (*noise._BESIDE_THE_POINT, "transformers.modeling_utils"):
        filters = logging.getLogger(name).filters
        assert len(filters) == len(set(filters)) >= 1


@pytest.mark.parametrize("name", noise._BESIDE_THE_POINT)
def test_a_logger_says_what_is_not_named(name: str) -> None:
    noise.quieten()
    (named,) = (one for one in logging.getLogger(name).filters if isinstance(one, noise._Saying))
    words = noise._BESIDE_THE_POINT[name]
    assert not named.filter(logging.makeLogRecord({"msg": f"[RANK 0] {words} ..."}))
    assert named.filter(logging.makeLogRecord({"msg": f"[RANK 0] {words[1:]}"}))


def test_trl_does_itself_what_it_advises() -> None:
    """Of the words that are hidden: what is trained with a template that adds tokens has its output head trained."""
    import trl.trainer.sft_trainer

    source = Path(trl.trainer.sft_trainer.__file__).read_text(encoding="utf-8")
    behind = source.partition("but 'lm_head' is not in PEFT's")[2]
    assert 'peft_config.modules_to_save = ["lm_head"]' in behind[:800]


def test_other_warnings_are_shown() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        noise.quieten()
        ours = "`is_gradient_checkpointing` is deprecated and will be removed in v6. Use `is_activation_checkpointing`."
        warnings.warn(ours, FutureWarning, stacklevel=1)
        warnings.warn(ours, UserWarning, stacklevel=1)
        warnings.warn("`gradient_checkpointing` is deprecated", FutureWarning, stacklevel=1)
    assert [(str(one.message) == ours, one.category) for one in caught] == [(True, UserWarning), (False, FutureWarning)]


def test_bars_are_for_what_takes_long_unless_somebody_wants_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """tqdm reads them when it is imported."""
    code = """
import io, json
from hf_galore.cli.noise import quieten
quieten()
from tqdm import tqdm
bar = tqdm(total=1, file=io.StringIO())
print(json.dumps([bar.delay, bar.mininterval]))
"""
    shown = {}
    for wanted in (None, "0"):
        monkeypatch.delenv("TQDM_DELAY", raising=False)
        if wanted is not None:
            monkeypatch.setenv("TQDM_DELAY", wanted)
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        shown[wanted] = json.loads(run.stdout)
    assert shown == {None: [3, 10], "0": [0, 10]}
