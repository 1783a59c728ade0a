"""Training with int8 weights by the Trainer and TRL: their checks, checkpoints, resuming, evaluation, adapters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

from hf_galore import Int8Config, quantize_weights_
from hf_galore.int8 import Int8Weight, is_int8
from hf_galore.integrations.int8_layers import layers_in_int8
from tests.support.helpers import argument_values, assert_identical, logged, tiny_llama
from tests.support.tokenizer import save_tokenizer

STEPS, AT = 5, 3
OPTIMS = ("galore_adamw_8bit", "galore_adamw_8bit_layerwise")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in bfloat16, with a tokenizer."""
    path = tmp_path_factory.mktemp("model")
    tiny_llama(vocab_size=300).to(torch.bfloat16).save_pretrained(path)
    save_tokenizer(path, ["one two three"])
    return path


def rows(count: int = 32) -> Dataset:
    ids = (3 + (torch.arange(count).unsqueeze(1) * 7 + torch.arange(16)) % 120).tolist()
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


def sft(model: Any, output_dir: Path, optim: str, config: Int8Config | None = None, **overrides: Any) -> SFTTrainer:
    settings = {
        **argument_values(output_dir, optim),
        "optim_args": "rank=16, update_proj_gap=2, scale=0.5",
        "learning_rate": 2e-3,
        "lr_scheduler_type": "cosine",
        "max_steps": STEPS,
        "save_strategy": "steps",
        "save_steps": 1,
        "bf16": False,
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "model_init_kwargs": {"dtype": "bfloat16"} if isinstance(model, str) else None,
        **overrides,
    }
    return SFTTrainer(
        model=model,
        args=SFTConfig(**settings),
        train_dataset=rows(),
        eval_dataset=rows(8),
        **({} if config is None else {"quantization_config": config}),
    )


def codes_of(model: Any) -> dict[str, Tensor]:
    """All that a model's values are."""
    return {
        f"{name}.{index}": part
        for name, value in model.state_dict().items()
        for index, part in enumerate(value.blocks if isinstance(value, Int8Weight) else (value,))
    }


@pytest.mark.parametrize("optim", OPTIMS)
def test_a_resumed_run_is_the_uninterrupted_one(optim: str, folder: Path, tmp_path: Path) -> None:
    """With random rounding: its numbers go on where they were. A checkpoint in bfloat16 has all of the codes."""
    whole = sft(str(folder), tmp_path / "whole", optim, Int8Config())
    assert len(layers_in_int8(whole.model)) == 14
    whole.train()
    losses = logged(whole, "loss")
    assert losses[-1] < losses[0]

    checkpoint = tmp_path / "whole" / f"checkpoint-{AT}"
    assert "quantization_config" not in json.loads((checkpoint / "config.json").read_text())
    resumed = sft(str(folder), tmp_path / "resumed", optim, Int8Config())
    resumed.train(resume_from_checkpoint=str(checkpoint))
    # And where the model is loaded from the checkpoint's own folder.
    anew = sft(str(checkpoint), tmp_path / "anew", optim, Int8Config())
    anew.train(resume_from_checkpoint=str(checkpoint))
    for trainer in (resumed, anew):
        assert logged(trainer, "loss") == losses
        assert logged(trainer, "grad_norm") == logged(whole, "grad_norm")
        assert_identical(codes_of(trainer.model), codes_of(whole.model))
        found, expected = (
            torch.load(Path(one.args.output_dir) / f"checkpoint-{STEPS}" / "optimizer.pt", weights_only=True)
            for one in (trainer, whole)
        )
        assert_identical(found, expected)
    # The weights moved in between, in 8 bits.
    start = load_file(checkpoint / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(whole.model.get_parameter(name).dequantized(), start[name])


def test_a_saved_model_evaluates_as_it_did(folder: Path, tmp_path: Path) -> None:
    trainer = sft(str(folder), tmp_path, OPTIMS[1], Int8Config(), save_strategy="no")
    trainer.train()
    loss = trainer.evaluate()["eval_loss"]
    trainer.save_model(str(tmp_path / "saved"))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert not layers_in_int8(plain)
    other = sft(plain, tmp_path / "other", OPTIMS[1])
    assert other.evaluate()["eval_loss"] == pytest.approx(loss, rel=1e-3)


def test_the_best_checkpoint_is_loaded_at_the_end(folder: Path, tmp_path: Path) -> None:
    trainer = sft(
        str(folder),
        tmp_path,
        OPTIMS[1],
        Int8Config(),
        learning_rate=2.0,  # after the first step it gets worse
        lr_scheduler_type="constant",
        load_best_model_at_end=True,
        eval_strategy="steps",
        eval_steps=1,
        metric_for_best_model="eval_loss",
    )
    trainer.train()
    best = load_file(Path(str(trainer.state.best_model_checkpoint)) / "model.safetensors")
    assert len(layers_in_int8(trainer.model)) == 14
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value.dequantized() if is_int8(value) else value, best[name])
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric, rel=1e-6)


def test_checkpoints_in_several_files_resume(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As larger models than this one have them: the Trainer reads one after the other."""
    monkeypatch.setattr("hf_galore.integrations.int8_saving.SHARD", "64KB")
    whole = sft(str(folder), tmp_path / "whole", OPTIMS[1], Int8Config())
    whole.train()
    checkpoint = tmp_path / "whole" / f"checkpoint-{AT}"
    assert len(list(checkpoint.glob("*.safetensors"))) > 2
    resumed = sft(str(folder), tmp_path / "resumed", OPTIMS[1], Int8Config())
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert_identical(codes_of(resumed.model), codes_of(whole.model))


@pytest.mark.parametrize("shard", ["2GB", 16_500], ids=["one file", "several files"])
def test_checkpoints_in_int8_resume(
    shard: str | int, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Trainer loads them with `strict=False`: names that nobody knows would be left out without an error."""
    monkeypatch.setattr("hf_galore.integrations.int8_saving.SHARD", shard)
    whole = sft(str(folder), tmp_path / "whole", OPTIMS[1], Int8Config(save="int8"))
    whole.train()
    checkpoint = tmp_path / "whole" / f"checkpoint-{AT}"
    names = [set(load_file(file)) for file in checkpoint.glob("*.safetensors")]
    if shard == 16_500:  # there is a weight whose parts are in two files
        assert any(
            f"{name.removesuffix('_codes')}_exponents" not in own
            for own in names
            for name in own
            if name.endswith("_codes")
        )
    for config in (Int8Config(), Int8Config(save="int8")):
        caplog.clear()
        resumed = sft(str(folder), tmp_path / config.save, OPTIMS[1], config)
        resumed.train(resume_from_checkpoint=str(checkpoint))
        assert_identical(codes_of(resumed.model), codes_of(whole.model))
        assert ("missing keys" in caplog.text) == (shard == 16_500)  # what it says of several files it takes from names


@pytest.mark.parametrize("shard", ["2GB", 16_500], ids=["one file", "several files"])
def test_an_int8_checkpoint_is_not_resumed_with_floats(
    shard: str | int, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Trainer would go on with the weights that the model began with, and a warning of names."""
    monkeypatch.setattr("hf_galore.integrations.int8_saving.SHARD", shard)
    whole = sft(str(folder), tmp_path / "whole", OPTIMS[1], Int8Config(save="int8"))
    whole.train()
    checkpoint = str(tmp_path / "whole" / f"checkpoint-{AT}")
    for config, layer in (
        (None, r"mlp\.down_proj and 13 other"),
        (Int8Config(modules_to_not_convert=["up_proj"]), r"0\.mlp\.up_proj and 1 other"),
    ):
        resumed = sft(str(folder), tmp_path / "resumed", OPTIMS[1], config)
        with pytest.raises(ValueError, match=rf"{layer}.* of this model has floats, into which they were not loaded"):
            resumed.train(resume_from_checkpoint=checkpoint)
    # What the message advises.
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    model.hf_quantizer.quantization_config.save = "float"
    model.save_pretrained(checkpoint)
    resumed = sft(str(folder), tmp_path / "resumed", OPTIMS[1])
    resumed.train(resume_from_checkpoint=checkpoint)
    assert logged(resumed, "loss")[:AT] == logged(whole, "loss")[:AT]
    assert logged(resumed, "loss")[AT:] == pytest.approx(logged(whole, "loss")[AT:], rel=1e-2)


def test_a_model_in_memory_trains_as_one_that_is_loaded(folder: Path, tmp_path: Path) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(folder, quantization_config=Int8Config())
    made = AutoModelForCausalLM.from_pretrained(folder)
    quantize_weights_(made)
    trainers = [sft(model, tmp_path / str(index), OPTIMS[1]) for index, model in enumerate((loaded, made))]
    for trainer in trainers:
        trainer.train()
    assert_identical(codes_of(made), codes_of(loaded))
    names = ("model.safetensors", "config.json")
    for name in names:
        first, second = ((tmp_path / str(index) / f"checkpoint-{STEPS}" / name).read_bytes() for index in (0, 1))
        assert first == second


def test_another_optimizer_is_refused_at_its_first_step(folder: Path, tmp_path: Path) -> None:
    """What is smaller than a step of 8 bits would be lost."""
    trainer = sft(str(folder), tmp_path, "adamw_torch", Int8Config(), optim_target_modules=None, optim_args=None)
    with pytest.raises(RuntimeError, match=r"would change an int8 weight in place"):
        trainer.train()


def test_a_run_in_16_bits_goes_on_in_8_and_back(folder: Path, tmp_path: Path) -> None:
    """Its groups have no seed for random rounding; the weights are rounded to the nearest once, or not at all."""
    before = None
    for index, config in enumerate((None, Int8Config(), None)):
        trainer = sft(str(folder), tmp_path / str(index), OPTIMS[1], config, max_steps=index + 1)
        trainer.train(resume_from_checkpoint=before)
        before = str(tmp_path / str(index) / f"checkpoint-{index + 1}")
        groups = torch.load(Path(before) / "optimizer.pt", weights_only=True)["param_groups"]
        assert any("rounding_seed" in group for group in groups) == (index > 0)
    assert len(logged(trainer, "loss")) == 3


# ---- adapters


def test_adapters_train_over_int8_weights(folder: Path, tmp_path: Path) -> None:
    """As they do over the same values in bfloat16."""
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=Int8Config())
    before = {name: value.clone() for name, value in codes_of(model).items()}
    plain = AutoModelForCausalLM.from_pretrained(folder, quantization_config=Int8Config()).dequantize()
    losses = []
    for name, base in (("int8", model), ("plain", plain)):
        torch.manual_seed(0)
        adapted = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "up_proj"]))
        trainer = sft(
            adapted,
            tmp_path / name,
            "adamw_torch",
            optim_target_modules=None,
            optim_args=None,
            gradient_checkpointing=True,
        )
        trainer.train()
        losses.append(logged(trainer, "loss"))
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    base = {name.replace(".base_layer", ""): value for name, value in codes_of(model).items()}
    assert_identical({name: base[name] for name in before}, before)
    saved = load_file(tmp_path / "int8" / f"checkpoint-{STEPS}" / "adapter_model.safetensors")
    assert all("lora_" in name for name in saved)


def test_adapters_are_merged_into_a_dequantized_model(folder: Path) -> None:
    """Into weights of 8 bits they do not go: what is smaller than a step of 8 bits would be lost."""
    lora = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=Int8Config())
    adapted = get_peft_model(model, lora)
    ids = torch.arange(32).view(2, 16)
    loss = adapted(ids, labels=ids).loss
    for safe in (False, True):
        with pytest.raises(RuntimeError, match=r"int8 weight.*; adapters are merged after model\.dequantize\(\)"):
            adapted.merge_and_unload(safe_merge=safe)
    model.dequantize()
    merged = adapted.merge_and_unload()
    assert not layers_in_int8(merged)
    torch.testing.assert_close(merged(ids, labels=ids).loss, loss, rtol=2e-3, atol=0)
