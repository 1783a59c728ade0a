"""How `hf-galore sft` loads a model by its name: onto which device, in which dtype, and what it says of that."""

from __future__ import annotations

import copy
import json
import logging
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hf_galore.errors import UserError
from hf_galore.recipes import sft
from hf_galore.recipes.checks import check_model, say_if_emulated, say_if_widened
from hf_galore.recipes.embedded_model import Embedded
from hf_galore.recipes.trl_recipe import Checked
from tests.support.commands import recipe_on_cpu
from tests.support.devices import on, pretend_gpus, with_gpus


@pytest.fixture
def recipe(small: Embedded, tmp_path: Path) -> dict[str, Any]:
    return {
        "model_name_or_path": str(small.model),
        "dataset_name": str(small.data),
        "max_length": 64,
        "optim": "galore_adamw_8bit_layerwise",
        "optim_target_modules": ["attn", "mlp"],
        "optim_args": "rank=16, update_proj_gap=4, scale=1",
        "max_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
    }


def parse(recipe: dict[str, Any], tmp_path: Path, *more: str) -> sft.Arguments:
    return sft.parse(["--config", recipe_on_cpu(tmp_path, **recipe), *more], "hf-galore sft", "")


# ---- rows that teach nothing


def test_rows_of_which_nothing_to_learn_is_left_are_said_to_be_left_out(
    recipe: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """TRL leaves them out without a word; and of nothing at all torch's sampler says `num_samples=0`."""
    data = tmp_path / "data"
    data.mkdir()
    long, short = ([{"role": "user", "content": "word " * n}, {"role": "assistant", "content": "b"}] for n in (200, 2))

    def write(*conversations: Any) -> None:
        (data / "train.jsonl").write_text("".join(json.dumps({"messages": one}) + "\n" for one in conversations))

    settings = {**recipe, "dataset_name": str(data), "assistant_only_loss": True}
    write(long, short, long)
    trainer = parse(settings, tmp_path).make_trainer()
    assert len(trainer.train_dataset) == 1
    said = [message for message in caplog.messages if "left out" in message]
    assert said == ["2 of 3 rows for training are left out: no token to learn is left within max_length 64."]
    write(long, long)
    with pytest.raises(UserError, match=r"^all 2 rows for training are left out: no token .* 64\. Give a larger one\."):
        parse(settings, tmp_path).make_trainer()


def test_adapters_that_nobody_makes_are_said(
    recipe: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As `trl sft`, which says nothing of it, it trains all weights then."""
    given = {**recipe, "lora_r": 8, "lora_target_modules": "all-linear"}
    trainer = parse(given, tmp_path).make_trainer()
    said = [message for message in caplog.messages if message.startswith("lora_r, lora_target_modules: ")]
    assert len(said) == 1
    assert "use_peft is not set, so all weights are trained" in said[0]
    assert all(param.requires_grad for param in trainer.model.parameters())


# ---- the device


def loaded_with(parsed: sft.Arguments, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The keywords that TRL's trainer would load the model with."""
    found: dict[str, Any] = {}

    def trainer(model: str, args: Any, **kwargs: Any) -> Any:
        found.update(args.model_init_kwargs)
        return SimpleNamespace(train_dataset=None, eval_dataset=None)

    monkeypatch.setattr(sft, "RecordedSFTTrainer", trainer)
    sft.make_trainer(parsed, Checked(None, None, None))
    return found


def test_two_visible_gpus_are_no_data_parallel_and_no_split_model(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pretend_gpus(monkeypatch, 2)
    parsed = parse(recipe, tmp_path)
    assert parsed.training.n_gpu == 2
    trainer = parsed.make_trainer()  # TRL refuses nn.DataParallel
    assert trainer.args.n_gpu == 1
    assert len([record for record in caplog.records if "2 GPUs are visible" in record.getMessage()]) == 1
    trainer.train()
    assert trainer.state.global_step == 1


@pytest.mark.parametrize("count", [1, 2])
def test_a_model_is_loaded_onto_one_gpu(
    count: int, recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TRL's own choice, where no device_map is given, is "auto": all that are visible, and the CPU."""
    parsed = parse(recipe, tmp_path)
    on(with_gpus(parsed.training, count), "cuda:0")
    keywords = loaded_with(parsed, monkeypatch)
    assert keywords["device_map"] == {"": "cuda:0"}
    assert parsed.training.n_gpu == 1
    json.dumps(parsed.training.to_dict())  # the Trainer writes its arguments


def test_a_device_map_of_the_recipe_is_the_one_that_counts(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    parsed = parse({**recipe, "model_init_kwargs": {"device_map": "auto"}}, tmp_path)
    on(with_gpus(parsed.training, 2), "cuda:0")
    assert loaded_with(parsed, monkeypatch)["device_map"] == "auto"
    assert "GPUs are visible" not in caplog.text


def test_a_cpu_needs_no_device_map(recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "device_map" not in loaded_with(parse(recipe, tmp_path), monkeypatch)


# ---- the dtype


@pytest.fixture
def in_16_bits(small: Embedded, tmp_path: Path) -> Path:
    """The config of a model that was saved in bfloat16, of a gibi of parameters."""
    folder = tmp_path / "saved"
    shutil.copytree(small.model, folder)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config |= {"dtype": "bfloat16", "vocab_size": 2**20, "hidden_size": 1024, "intermediate_size": 64}
    config |= {"num_hidden_layers": 0, "num_attention_heads": 8, "num_key_value_heads": 8, "tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    return folder


CASES: dict[str, tuple[dict[str, Any], bool]] = {
    "no dtype": ({}, True),
    "asked for": ({"dtype": "float32"}, True),
    "as it was saved": ({"dtype": "auto"}, False),
    "bfloat16": ({"dtype": "bfloat16"}, False),
    "bfloat16 among the keywords": ({"model_init_kwargs": {"dtype": "bfloat16"}}, False),
    "float32 among the keywords": ({"dtype": "bfloat16", "model_init_kwargs": {"dtype": "float32"}}, True),
    "in 4 bits": ({"load_in_4bit": True}, False),
}


@pytest.mark.parametrize(("changes", "is_said"), CASES.values(), ids=list(CASES))
def test_a_model_that_becomes_twice_as_large_is_told_of(
    changes: dict[str, Any],
    is_said: bool,
    recipe: dict[str, Any],
    in_16_bits: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    parsed = parse({**recipe, "model_name_or_path": str(in_16_bits), **changes}, tmp_path)
    config = check_model(parsed.model)
    given = parsed.training.model_init_kwargs
    with caplog.at_level(logging.INFO, logger="hf_galore"):
        say_if_widened(parsed.model, parsed.training, config, given)
        assert caplog.records == []  # a CPU's memory is nobody's worry here
        say_if_widened(parsed.model, on(parsed.training, "cuda:0"), config, given)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == is_said
    if is_said:
        assert f"{in_16_bits} is loaded in float32" in said[0]
        assert "it was saved in bfloat16: 4.0 GiB for the weights alone. With dtype: bfloat16" in said[0]


def test_what_was_saved_in_float32_or_is_not_transformers_own(
    recipe: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    parsed = parse(recipe, tmp_path)
    on(parsed.training, "cuda:0")
    config = copy.deepcopy(check_model(parsed.model))
    with caplog.at_level(logging.INFO, logger="hf_galore"):
        config.dtype = torch.float32
        say_if_widened(parsed.model, parsed.training, config)
        assert caplog.records == []
        config.dtype = torch.float16
        for architectures in (["SomebodysForCausalLM"], None):
            config.architectures = architectures
            say_if_widened(parsed.model, parsed.training, config)
    assert [record.getMessage().count("saved in float16. With") for record in caplog.records] == [1, 1]


@pytest.mark.parametrize(
    ("capability", "given", "dtype", "is_said"),
    [
        ((7, 5), {"bf16": True}, "float32", True),
        ((7, 5), {"bf16": False}, "bfloat16", True),
        ((7, 5), {"bf16": False}, torch.bfloat16, True),
        ((7, 5), {"bf16": False}, "float32", False),
        ((8, 0), {"bf16": True}, "bfloat16", False),
    ],
)
def test_a_card_without_bfloat16_is_named(
    capability: tuple[int, int],
    given: dict[str, Any],
    dtype: Any,
    is_said: bool,
    recipe: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """torch says of a T4 that it has bfloat16, counting its emulation."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    training = parse({**recipe, **given}, tmp_path).training
    say_if_emulated(training, dtype)
    assert caplog.records == []  # a CPU is another matter
    say_if_emulated(on(training, "cuda:0"), dtype)
    said = [record.getMessage() for record in caplog.records]
    assert [line.startswith("Tesla T4 has no bfloat16, which torch emulates there, slowly. ") for line in said] == (
        [True] if is_said else []
    )


def test_trl_loads_in_float32_where_no_dtype_is_given(recipe: dict[str, Any], tmp_path: Path) -> None:
    """What the sentence says."""
    folder = tmp_path / "saved"
    parsed = parse(recipe, tmp_path)
    made = parsed.make_trainer()
    made.model.to(torch.bfloat16).save_pretrained(folder)
    made.processing_class.save_pretrained(folder)
    again = {**recipe, "model_name_or_path": str(folder)}
    assert check_model(parse(again, tmp_path).model).dtype == torch.bfloat16
    assert parse(again, tmp_path).make_trainer().model.dtype == torch.float32
    assert parse(again, tmp_path, "--dtype", "auto").make_trainer().model.dtype == torch.bfloat16
