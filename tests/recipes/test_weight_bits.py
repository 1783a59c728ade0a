"""The key `weight_bits` of recipes: what is loaded, trained, saved, recorded, and refused with it."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hf_galore import quantize_weights_
from hf_galore.cli.main import main
from hf_galore.errors import UserError
from hf_galore.int8 import Int8Weight
from hf_galore.integrations.int8_layers import layers_in_int8
from hf_galore.recipes import glue, pretrain, sft
from hf_galore.recipes.checks import check_model, say_if_widened
from hf_galore.recipes.embedded_model import Embedded
from hf_galore.recipes.run_record import RunFacts
from hf_galore.recipes.training import check_weights
from hf_galore.recipes.weight_bits import check_weight_bits
from tests.support.commands import ON_CPU, options, recipe_on_cpu, recorded_trainer, said_of_mistake
from tests.support.devices import on
from tests.support.helpers import tiny_llama

MATRICES = 14  # of the embedded model's two layers


@pytest.fixture
def settings(small: Embedded, tmp_path: Path) -> dict[str, Any]:
    return {
        **ON_CPU,
        "model_name_or_path": str(small.model),
        "dataset_name": str(small.data),
        "dtype": "bfloat16",
        "weight_bits": 8,
        "max_length": 32,
        "optim": "galore_adamw_8bit_layerwise",
        "optim_target_modules": ["attn", "mlp"],
        "optim_args": "rank=16, update_proj_gap=2, scale=1",
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 2,
        "max_steps": 3,
        "save_steps": 1,
        "save_strategy": "steps",
        "report_to": "none",
        "output_dir": str(tmp_path / "out"),
        "disable_tqdm": True,
    }


def test_a_run_in_8_bits_leaves_an_ordinary_model_and_says_what_it_was(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    assert main(["sft", *options(settings)]) == 0
    out = tmp_path / "out"
    facts = RunFacts.read(out)
    assert facts is not None
    assert (facts.settings or {})["weight_bits"] == 8
    assert "weight_bits: 8\n" in (out / "hf_galore_recipe.yaml").read_text("utf-8")
    assert "| `weight_bits` | 8: while they were trained" in (out / "README.md").read_text("utf-8")
    for folder in (out, out / "checkpoint-3"):
        assert "quantization_config" not in json.loads((folder / "config.json").read_text("utf-8"))
    saved = load_file(out / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(out)
    assert not layers_in_int8(model)
    for name, value in model.state_dict().items():
        assert torch.equal(value, saved[name])
        if value.ndim == 2 and "proj" in name:  # all of them values that 8 bits have
            assert torch.equal(Int8Weight.from_float(value).dequantized(), value)

    # And goes on from a checkpoint as if it had not stopped.
    again = {**settings, "output_dir": str(tmp_path / "again")}
    assert main(["sft", *options({**again, "resume_from_checkpoint": str(out / "checkpoint-1")})]) == 0
    resumed = load_file(tmp_path / "again" / "model.safetensors")
    assert all(torch.equal(resumed[name], saved[name]) for name in saved)


def test_the_other_commands_take_it_too(settings: dict[str, Any], small: Embedded, tmp_path: Path) -> None:
    settings = {**settings, "save_strategy": "no"}
    trainer = sft.parse(options(settings), "", "").make_trainer()
    assert len(layers_in_int8(trainer.model)) == MATRICES

    own = {key: value for key, value in settings.items() if key not in ("model_name_or_path", "dataset_name")}
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(4):
        (texts / f"{number}.txt").write_text(f"word{number} " * 200, encoding="utf-8")
    made = pretrain.parse(
        options({**own, "config_name": small.model, "tokenizer_name": small.model, "dataset_name": texts}), "", ""
    ).make_trainer()
    assert len(layers_in_int8(made.model)) == MATRICES
    made.train()

    del own["max_length"]
    file = tmp_path / "glue.csv"
    file.write_text("sentence,label\n" + "".join(f"word{n},{'yes' if n % 2 else 'no'}\n" for n in range(8)))
    classed = {"train_file": file, "validation_file": file, "eval_strategy": "steps", "eval_steps": 3}
    classifier = glue.parse(options({**own, "model_name_or_path": small.model, **classed}), "", "").make_trainer()
    assert len(layers_in_int8(classifier.model)) == MATRICES
    assert classifier.model.score.weight.dtype == torch.bfloat16
    assert not layers_in_int8(classifier.model.score)
    classifier.train()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"weight_bits": 4}, "weight_bits"),
        ({"load_in_4bit": True}, "weight_bits 8 and load_in_4bit are both given"),
        ({"load_in_8bit": True, "use_peft": True}, "weight_bits 8 and load_in_8bit are both given"),
        ({"dtype": "float16"}, "weight_bits 8 does not go with dtype float16"),
        ({"optim": "adamw_torch"}, "weight_bits 8 does not go with optim adamw_torch: its updates are smaller than"),
    ],
    ids=["another number", "4 bits", "8 bits", "float16", "another optimizer"],
)
def test_what_does_not_go_with_it_is_said_before_anything_is_loaded(
    changes: dict[str, Any], said: str, settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {**settings, **changes}
    if changes.get("optim"):
        given = {key: value for key, value in given.items() if key not in ("optim_args", "optim_target_modules")}
    assert said in said_of_mistake("sft", options(given), capsys)
    assert not (tmp_path / "out").exists()


def test_adapters_may_have_another_optimizer_and_fp16_is_refused(settings: dict[str, Any]) -> None:
    parsed = sft.parse(options({**settings, "use_peft": True, "optim": "adamw_torch"}), "", "")
    check_weight_bits(parsed.model, parsed.training, "bfloat16")
    parsed.training.fp16 = True
    with pytest.raises(UserError, match=r"^weight_bits 8 does not go with fp16, whose range .* Give dtype: bfloat16"):
        check_weight_bits(parsed.model, parsed.training, "bfloat16")


def test_float32_is_said_to_be_slow_and_not_to_be_large(
    settings: dict[str, Any], caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    given = {**settings, "dtype": "float32"}
    parsed = sft.parse(["--config", recipe_on_cpu(tmp_path, **given)], "", "")
    config = check_model(parsed.model)
    config.dtype = torch.bfloat16
    with caplog.at_level(logging.INFO, logger="hf_galore"):
        say_if_widened(parsed.model, on(parsed.training, "cuda:0"), config)
    assert "computes in float32, TRL's choice where no dtype is given. With dtype: bfloat16 it is fa" in caplog.text
    assert "GiB" not in caplog.text


def test_a_run_that_was_in_16_bits_is_said_to_be_rounded(
    settings: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain = {**settings, "weight_bits": 16, "max_steps": 1}
    assert main(["sft", *options(plain)]) == 0
    resumed = {**settings, "resume_from_checkpoint": "true", "max_steps": 2}
    assert main(["sft", *options(resumed)]) == 0
    assert "weight_bits 16 → 8: A resumed run takes the weights of its checkpoint, and rounds them" in caplog.text


def test_broken_weights_are_found_without_a_float_of_them(tmp_path: Path) -> None:
    model = tiny_llama().to(torch.bfloat16)
    trainer = recorded_trainer(tmp_path, "galore_adamw", model)
    quantize_weights_(model)
    check_weights(trainer)
    model.model.layers[0].mlp.up_proj.weight.exponents[3, 1] = 255
    with pytest.raises(UserError, match=r"1 of \d+, the first is model\.layers\.0\.mlp\.up_proj\.weight"):
        check_weights(trainer)
