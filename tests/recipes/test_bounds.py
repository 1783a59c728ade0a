"""Numbers of a recipe that are out of range: found before anything is made of them, wherever they are given."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from trl import DPOConfig, ModelConfig, SFTConfig

from hf_galore.errors import UserError
from hf_galore.recipes import dpo, sft
from hf_galore.recipes.bounds import BOUNDS, check_bounds
from tests.support.commands import recipe_on_cpu, said_of_mistake

OUT_OF_RANGE: dict[str, tuple[dict[str, Any], str]] = {
    "no batch": ({"per_device_train_batch_size": 0}, "per_device_train_batch_size has to be at least 1, but is 0."),
    "less than none": (
        {"gradient_accumulation_steps": -1},
        "gradient_accumulation_steps has to be at least 1, but is -1.",
    ),
    "no epochs": ({"num_train_epochs": 0}, "num_train_epochs has to be above 0, but is 0."),
    "no steps": ({"max_steps": 0}, "max_steps has to be at least 1, but is 0. Or -1, for num_train_epochs to say"),
    "never saved": ({"save_steps": 0}, "save_steps has to be above 0, but is 0. For no checkpoints set save_strategy"),
    "never logged": (
        {"logging_steps": 0},
        "logging_steps has to be above 0, but is 0. For no log set logging_strategy",
    ),
    "none kept": ({"save_total_limit": 0}, "save_total_limit has to be at least 1, but is 0. Leave it out to keep all"),
    "last token": ({"max_length": -1}, "max_length has to be at least 1, but is -1."),
    "uphill": ({"learning_rate": "-1e-4"}, "learning_rate has to be at least 0, but is -0.0001."),
    "no number": ({"learning_rate": "nan"}, "learning_rate has to be at least 0, but is nan."),
    "no end": ({"weight_decay": "inf"}, "weight_decay has to be at least 0, but is inf."),
    "all of it": ({"adam_beta2": 1.0}, "adam_beta2 has to be at least 0 and below 1, but is 1."),
    "negative norm": ({"max_grad_norm": -1}, "max_grad_norm has to be at least 0, but is -1. 0 is no clipping."),
    "seed": ({"seed": 2**32}, "seed has to be at least 0 and below 4294967296, but is 4294967296."),
    "rank of LoRA": ({"lora_r": 0}, "lora_r has to be at least 1, but is 0."),
}


@pytest.mark.parametrize(("given", "words"), OUT_OF_RANGE.values(), ids=list(OUT_OF_RANGE))
def test_a_number_out_of_range_is_named_with_its_range(given: dict[str, Any], words: str, tmp_path: Path) -> None:
    ((key, value),) = given.items()
    commands = (
        ["--config", recipe_on_cpu(tmp_path, **given)],
        ["--config", recipe_on_cpu(tmp_path / "bare"), f"--{key}={value}"],
    )
    for arguments in commands:
        with pytest.raises(UserError) as error:
            sft.parse(arguments, "hf-galore sft", "")
        assert str(error.value).startswith(words)


def test_numbers_of_dpo(tmp_path: Path) -> None:
    """TRL divides by the first at the first step."""
    recipe = recipe_on_cpu(tmp_path, sync_ref_model=True, ref_model_sync_steps=0)
    with pytest.raises(UserError, match=r"^ref_model_sync_steps has to be at least 1, but is 0"):
        dpo.parse(["--config", recipe], "hf-galore dpo", "")


def test_what_the_command_line_says_counts(tmp_path: Path) -> None:
    recipe = recipe_on_cpu(tmp_path, per_device_train_batch_size=0)
    parsed = sft.parse(["--config", recipe, "--per_device_train_batch_size", "3"], "hf-galore sft", "")
    assert parsed.training.per_device_train_batch_size == 3


def test_numbers_at_the_ends_of_ranges_and_what_is_no_number() -> None:
    ends = {
        "max_steps": -1,
        "save_steps": 0.1,
        "learning_rate": 0,
        "adam_beta1": 0.0,
        "seed": 2**32 - 1,
        "warmup_steps": 0,
    }
    check_bounds({**ends, "max_length": None, "save_total_limit": 1, "max_grad_norm": "0", "num_train_epochs": "1e-3"})
    check_bounds({"max_grad_norm": math.inf})  # no clipping, and the norm in the log
    check_bounds({"max_steps": "many", "seed": [1], "eval_steps": True, "anything": -1})  # the parser has its say


def test_every_key_is_one_of_a_recipe_and_every_default_is_in_range(tmp_path: Path) -> None:
    made = [SFTConfig(str(tmp_path), use_cpu=True, bf16=False), DPOConfig(str(tmp_path), use_cpu=True, bf16=False)]
    defaults: dict[str, Any] = {}
    for one in (*made, ModelConfig()):
        defaults.update({key: getattr(one, key) for key in BOUNDS if hasattr(one, key)})
        check_bounds({key: getattr(one, key) for key in BOUNDS if hasattr(one, key)})
    assert set(BOUNDS) - set(defaults) <= {"warmup_ratio"}  # of older transformers


@pytest.mark.parametrize("given", [["--output_dir", ""], ["--output_dir="]], ids=" ".join)
def test_an_empty_folder_is_none(given: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As a shell makes of "$OUT" that is not set."""
    said = said_of_mistake("sft", ["--config", recipe_on_cpu(tmp_path), *given], capsys)
    assert said == "hf-galore sft: output_dir is empty: give the folder that the run is to be in."
