"""A plan's figures are those of the real run, byte for byte; and a plan leaves nothing behind."""

from __future__ import annotations

import dataclasses
import functools
import gc
import importlib
import inspect
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import trl.trainer.utils
from peft import LoraConfig
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
)

import hf_galore.integrations.trl_head
from hf_galore.integrations.trainer import is_registered
from hf_galore.lowrank import float8, rounding
from hf_galore.lowrank.quantize import _equal_steps
from hf_galore.plan import planner
from hf_galore.plan.cards import PresentCard
from hf_galore.plan.fakes import fake_training
from hf_galore.plan.needs import CONTEXT, OUTSIDE, OUTSIDE_BYTES
from hf_galore.plan.planner import MemoryPlan, measure, plan
from hf_galore.plan.rehearsal import LOW_RANK
from hf_galore.plan.tracking import GRANULE
from hf_galore.recipes import any_recipe, stand_in
from hf_galore.recipes.planning import plan_recipe
from tests.support.helpers import NAMES, VOCABULARY, assert_identical, make_trainer, optimizer_of, snapshot
from tests.support.planning import LENGTH, MIXTURE, OPTIM_ARGS, Maker, llama, mixtral, rows, sft, tokenizer
from tests.support.releases import FUSED_HEAD, HEAD_BY_TOKENS


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of logits that are smaller than the vocabulary, and no longer larger than all else."""
    monkeypatch.setattr(trl.trainer.utils, "_CHUNKED_LOGPROB_CHUNK_SIZE", 96, raising=FUSED_HEAD)
    if HEAD_BY_TOKENS:
        monkeypatch.setattr("trl.trainer.sft_trainer._CHUNKED_LM_HEAD_CHUNK_SIZE", 8)
    monkeypatch.setattr(hf_galore.integrations.trl_head, "VOCABULARY_PART", 80)


def assert_plan_is_measured(make: Maker) -> MemoryPlan:
    planned, measured = plan(make, target="cpu"), measure(make)
    assert planned.phase_peaks == measured.phase_peaks
    assert (planned.peak_bytes, planned.phase) == (measured.peak_bytes, measured.phase)
    assert planned.resident_bytes == measured.resident_bytes
    assert planned.parameters == measured.parameters
    for figures in (planned, measured):
        assert sum(figures.breakdown.values()) == figures.peak_bytes == max(figures.phase_peaks.values())
        assert list(figures.breakdown.values()) == sorted(figures.breakdown.values(), reverse=True)
    # The loss of a micro-batch that a plan leaves out goes by another name.
    assert set(planned.breakdown) == set(measured.breakdown)
    for label, nbytes in planned.breakdown.items():
        assert abs(nbytes - measured.breakdown[label]) <= GRANULE, label
    return planned


# ---- a plan's figures are those of the real run

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulated": {"gradient_accumulation_steps": 4},
    "clipped": {"max_grad_norm": 1.0},
    "checkpointed": {"activation_checkpointing": True},
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("optim", ["adamw_torch", *NAMES])
def test_every_optimizer(optim: str, setting: str, tmp_path: Path) -> None:
    planned = assert_plan_is_measured(sft(tmp_path, optim, **SETTINGS[setting]))
    assert {"forward", "backward", "update", "evaluation"} <= set(planned.phase_peaks)
    assert {"parameters", "activations"} <= set(planned.breakdown)


@pytest.mark.parametrize(
    "options",
    [
        "proj_bits=16",
        "proj_bits=8",
        "moments=rotate",
        "refresh=svd",
        "refresh=randomized",
        "projected_backward=true",
        pytest.param(
            "projected_backward=true, proj_type=full, proj_bits=16",
            # There it is the peak.
            marks=pytest.mark.skipif(HEAD_BY_TOKENS, reason="a plan has 1.4 % less than a refresh of both sides takes"),
        ),
        "lazy_refresh=true, stagger=true",
        "rule=muon, scale=auto, moments=rotate",
    ],
)
def test_every_option_of_the_plain_optimizer(options: str, tmp_path: Path) -> None:
    assert_plan_is_measured(sft(tmp_path, "galore_adamw", optim_args=f"{OPTIM_ARGS}, {options}"))


WHOLE_MUON = "rule=muon, residual=muon"
NEED_GRADIENTS = ["residual=fira", "residual=sign", "scaling=channel", WHOLE_MUON]
NEED_GRADIENTS += [f"{WHOLE_MUON}, residual_bits=8", "rule=muon, residual=normuon, residual_bits=8, moments=rotate"]


@pytest.mark.parametrize("options", NEED_GRADIENTS)
@pytest.mark.parametrize("optim", ["galore_adamw", "galore_adamw_8bit_layerwise"])
def test_options_that_need_gradients(optim: str, options: str, tmp_path: Path) -> None:
    """Layerwise the gradient of one layer at a time is there, and the term in its place."""
    planned = assert_plan_is_measured(sft(tmp_path, optim, optim_args=f"{OPTIM_ARGS}, {options}"))
    assert ("bases" in planned.breakdown) == ("residual" in options)


@pytest.mark.parametrize(
    ("optim", "setting"),
    [
        ("adamw_torch", {}),
        ("galore_adamw", MIXTURE),
        ("galore_adamw_8bit_layerwise", {**MIXTURE, "max_grad_norm": 1.0}),
    ],
    ids=["adamw", "plain", "layerwise and clipped"],
)
def test_a_mixture_of_experts(optim: str, setting: dict[str, Any], tmp_path: Path) -> None:
    """With its grouped products, and with the copies of experts that a checkpoint takes."""
    planned = assert_plan_is_measured(sft(tmp_path, optim, mixtral, **setting))
    experts = 2 * 4 * (2 * 96 * 64 + 64 * 96) * 4
    assert planned.breakdown["gradients" if optim != "galore_adamw_8bit_layerwise" else "parameters"] > experts
    # gate_up_proj is written as two, neither of which is a view; down_proj is.
    assert planned.phase_peaks["saving a checkpoint"] - planned.resident_bytes >= 2 * experts // 3
    if optim == "adamw_torch":
        assert planned.projection is None
    else:
        assert planned.projection is not None
        assert planned.projection.startswith("GaLore projects 8 matrices and 4 stacks of 4 (")


def test_values_of_another_width_than_keys(tmp_path: Path) -> None:
    """Before: a plan of DeepSeek's attention ended in an error of a product whose sides do not go together."""

    def latent() -> Any:
        torch.manual_seed(0)
        widths = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
        sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
        dense = {"first_k_dense_replace": 2, "num_key_value_heads": 4, "vocab_size": VOCABULARY}
        return DeepseekV3ForCausalLM(DeepseekV3Config(**widths, **sizes, **dense))

    planned = assert_plan_is_measured(sft(tmp_path, "adamw_torch", latent))
    assert plan(sft(tmp_path, "adamw_torch", latent)).breakdown["activations"] < planned.breakdown["activations"]


def test_experts_in_a_loop_are_not_planned_silently(tmp_path: Path) -> None:
    """Before: a plan had none of their gradients and moments, and did not say so."""
    planned = plan(sft(tmp_path, "adamw_torch", lambda: mixtral(experts_implementation="eager")), target="cpu")
    (note,) = planned.notes
    assert (
        "gave a gradient to model.layers.*.mlp.experts.gate_up_proj (2), model.layers.*.mlp.experts.down_proj (2)"
        in note
    )
    assert "take 'grouped_mm'" in note


@pytest.mark.parametrize(
    ("optim", "setting"),
    [
        ("galore_adamw_layerwise", "clipped"),
        ("galore_adamw_8bit_layerwise", "accumulated"),
        ("galore_adafactor_layerwise", "accumulated"),
        ("galore_adamw", "clipped"),
    ],
)
def test_low_rank_gradients_in_8_bits(optim: str, setting: str, tmp_path: Path) -> None:
    """Those of q_proj are too small for 8 bits: 2 of 24 × 64, beside 4 of 24 × 256; rank 16 and 8 norm probes."""

    def make(bits: int) -> Maker:
        projected = "" if optim.endswith("layerwise") else ", projected_backward=true"
        optim_args = f"{OPTIM_ARGS}, gradient_bits={bits}{projected}"
        return sft(tmp_path, optim, lambda: llama().to(torch.bfloat16), optim_args=optim_args, **SETTINGS[setting])

    planned = assert_plan_is_measured(make(8))
    in_16, in_8 = 4 * 24 * 256 * 2, 4 * (24 * 256 + GRANULE)  # the scales are 24 numbers
    whole = plan(make(16), target="cpu")
    if setting == "accumulated":
        assert whole.breakdown[LOW_RANK] - planned.breakdown[LOW_RANK] == in_16 - in_8
    else:  # the peak is before they are there
        assert whole.phase_peaks["update"] > planned.phase_peaks["update"]


@pytest.mark.parametrize("options", ["", "moments=rotate", "refresh=svd", "projected_backward=false", "rule=muon"])
def test_all_layers_with_the_head(options: str, tmp_path: Path) -> None:
    assert_plan_is_measured(
        sft(
            tmp_path,
            "galore_adamw_8bit_layerwise",
            optim_target_modules=["attn", "mlp", "lm_head"],
            optim_args=f"{OPTIM_ARGS}, {options}",
        )
    )


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("options", ["", "gradient_bits=8", "projected_backward=false"])
@pytest.mark.parametrize("targets", [["attn", "mlp"], ["attn", "mlp", "lm_head", "embed_tokens"]], ids=["some", "all"])
def test_embeddings_in_windows(targets: list[str], options: str, tied: bool, tmp_path: Path) -> None:
    """Their gradients come by rows, fewer than the vocabulary has, unless the backward pass is torch's own."""
    make = sft(
        tmp_path,
        "galore_adamw_layerwise",
        lambda: llama(tie_word_embeddings=tied, vocab_size=640),
        optim_target_modules=targets,
        optim_args=f"{OPTIM_ARGS}, {options}",
        gradient_accumulation_steps=2,
        max_grad_norm=1.0,
    )
    assert_plan_is_measured(make)


@pytest.mark.parametrize("optim", ["galore_adamw", "galore_adamw_8bit_layerwise"])
def test_stochastic_rounding_in_bfloat16(optim: str, tmp_path: Path) -> None:
    make = sft(
        tmp_path, optim, lambda: llama().to(torch.bfloat16), optim_args=f"{OPTIM_ARGS}, stochastic_rounding=true"
    )
    planned = assert_plan_is_measured(make)
    nbytes = sum(param.numel() * 2 for param in llama().parameters())
    assert nbytes <= planned.breakdown["parameters"] < 1.1 * nbytes


@pytest.mark.parametrize("optim", ["adafactor", "adamw_bnb_8bit"])
def test_other_optimizers(optim: str, tmp_path: Path) -> None:
    assert_plan_is_measured(sft(tmp_path, optim))


def test_autocast(tmp_path: Path) -> None:
    assert_plan_is_measured(sft(tmp_path, "galore_adamw_layerwise", bf16=True))


@pytest.mark.parametrize("optim", ["adamw_torch", "galore_adamw_layerwise"])
def test_checkpointing_with_reentry(optim: str, tmp_path: Path) -> None:
    assert_plan_is_measured(
        sft(tmp_path, optim, activation_checkpointing=True, activation_checkpointing_kwargs={"use_reentrant": True})
    )


def test_a_data_loader_with_workers(tmp_path: Path) -> None:
    """They have no part in a plan, nor has what they fetch beforehand."""
    found = planner.plan(
        sft(tmp_path, "adamw_torch", dataloader_num_workers=2, dataloader_prefetch_factor=4), target="cpu"
    )
    assert found.phase_peaks == planner.plan(sft(tmp_path, "adamw_torch"), target="cpu").phase_peaks


def test_checkpointing_lowers_the_peak(tmp_path: Path) -> None:
    def activations(**overrides: Any) -> int:
        make = sft(tmp_path, "galore_adamw_layerwise", per_device_train_batch_size=32, **overrides)
        return plan(make, target="cpu").breakdown["activations"]

    # A layer's at a time instead of both layers'.
    assert activations(activation_checkpointing=True) < 0.7 * activations()


def test_lora(tmp_path: Path) -> None:
    peft_config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    planned = assert_plan_is_measured(sft(tmp_path, "adamw_torch", peft_config=peft_config))
    assert planned.resident_bytes < plan(sft(tmp_path, "adamw_torch"), target="cpu").resident_bytes


@pytest.mark.parametrize("optim", ["adamw_torch", "galore_adamw_8bit_layerwise"])
def test_packed_documents(optim: str, tmp_path: Path) -> None:
    data = rows(seq_lengths=[[LENGTH // 2, LENGTH // 2]])
    assert_plan_is_measured(sft(tmp_path, optim, llama, data, packing=True, padding_free=True, eval_packing=True))


@pytest.mark.parametrize("optim", ["adamw_torch", "galore_adamw_layerwise"])
def test_padded_batches(optim: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With padding attention has a mask, and copies of its keys and values."""
    if HEAD_BY_TOKENS:  # a plan counts the labels of padding too: they have to be in the one tile of the others
        monkeypatch.setattr("trl.trainer.sft_trainer._CHUNKED_LM_HEAD_CHUNK_SIZE", 256)
    tokens = list(range(5, 14))
    data = datasets.Dataset.from_dict({"input_ids": [tokens], "labels": [tokens]}).select([0] * 32)
    padded = assert_plan_is_measured(sft(tmp_path, optim, data=data, pad_to_multiple_of=LENGTH))
    assert padded.phase_peaks["backward"] > plan(sft(tmp_path, optim), target="cpu").phase_peaks["backward"]


# ---- other trainers and models


@pytest.mark.parametrize("optim", ["adamw_torch", "galore_adamw_8bit", "galore_adamw_layerwise"])
@pytest.mark.parametrize("model", ["gpt2", "tied"])
def test_a_plain_trainer(model: str, optim: str, tmp_path: Path) -> None:
    def gpt2() -> GPT2LMHeadModel:
        torch.manual_seed(0)
        settings = {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 32}
        # Attention with dropout takes another way on a CPU than on a GPU.
        return GPT2LMHeadModel(GPT2Config(**settings, attn_pdrop=0.0, bos_token_id=1, eos_token_id=2))

    def make() -> Trainer:
        overrides: dict[str, Any] = {"optim_target_modules": ["attn", "mlp"], "optim_args": OPTIM_ARGS}
        return make_trainer(
            gpt2() if model == "gpt2" else llama(tie_word_embeddings=True),
            tmp_path,
            optim,
            **(overrides if optim.startswith("galore") else {"optim_target_modules": None, "optim_args": None}),
        )

    assert_plan_is_measured(make)


def test_a_model_from_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    llama().save_pretrained(folder)

    def from_folder() -> LlamaForCausalLM:
        return LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)

    planned = assert_plan_is_measured(sft(tmp_path, "galore_adamw_layerwise", from_folder))
    assert planned.parameters == sum(param.numel() for param in llama().parameters())


def test_a_plan_needs_no_weights(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    llama().save_pretrained(folder)
    with_weights = plan(sft(tmp_path, "galore_adamw", lambda: AutoModelForCausalLM.from_pretrained(folder)))
    (folder / "model.safetensors").unlink()
    without = plan(sft(tmp_path, "galore_adamw", lambda: AutoModelForCausalLM.from_pretrained(folder)))
    assert without.phase_peaks == with_weights.phase_peaks


RECIPE = """
model_name_or_path: {folder}
dataset_name: nobody/asks-for-it
dtype: float32
optim: galore_adamw_8bit_layerwise
optim_target_modules: [attn, mlp]
optim_args: {optim_args}
max_length: 16
packing: true
padding_free: true
per_device_train_batch_size: 2
per_device_eval_batch_size: 2
gradient_accumulation_steps: 2
max_grad_norm: 0.0
eval_strategy: steps
bf16: false
report_to: none
output_dir: {output}
"""


def test_a_packed_recipe(tmp_path: Path) -> None:
    folder, file = tmp_path / "model", tmp_path / "recipe.yaml"
    llama().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    file.write_text(RECIPE.format(folder=folder, optim_args=OPTIM_ARGS, output=tmp_path / "output"))
    planned = plan_recipe(file, target="cpu")
    make = stand_in.prepare(any_recipe.parse(["--config", str(file)], "plan", "")).make_trainer
    measured = measure(make)
    assert planned.phase_peaks == measured.phase_peaks
    assert planned.resident_bytes == measured.resident_bytes
    assert planned.tokens_per_step == 2 * 2 * 16
    longer = plan_recipe(file, target="cpu", overrides=["--max_length", "32"])
    assert longer.tokens_per_step == 2 * 2 * 32
    assert longer.phase_peaks["forward"] > planned.phase_peaks["forward"]


# ---- what a plan refuses


def test_a_quantized_model_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    llama().save_pretrained(folder)

    def quantized() -> LlamaForCausalLM:
        quantization = BitsAndBytesConfig(load_in_4bit=True)
        return LlamaForCausalLM.from_pretrained(folder, quantization_config=quantization)

    with pytest.raises(ValueError, match=r"quantized weights.*cannot be planned"):
        plan(sft(tmp_path, "adamw_torch", quantized))


def test_a_model_saved_with_quantized_weights_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    model = llama()
    model.config.quantization_config = BitsAndBytesConfig(load_in_4bit=True).to_dict()
    model.config.save_pretrained(folder)
    with pytest.raises(ValueError, match=r"quantized weights.*cannot be planned"):
        plan(sft(tmp_path, "adamw_torch", lambda: LlamaForCausalLM.from_pretrained(folder)))


# ---- what a plan leaves behind


def clear_tables() -> None:
    from bitsandbytes import functional

    _equal_steps.cache_clear()
    functional.name2qmap.clear()


def tables() -> list[Tensor]:
    """The codes that are kept for the process."""
    from bitsandbytes import functional

    return [_equal_steps(torch.device("cpu")), *functional.name2qmap.values()]


def fakes_alive() -> int:
    gc.collect()
    # By their type: isinstance() asks an object for its class, which a lazy module takes for a wish to be loaded.
    return sum(type(each) is FakeTensor for each in gc.get_objects())


@pytest.mark.parametrize(
    ("optim", "options"),
    [
        ("galore_adamw_8bit_layerwise", "proj_bits=8"),
        ("galore_adamw_8bit_layerwise", "proj_bits=4"),
        ("galore_adafactor", "proj_bits=8, refresh=randomized"),
        ("adamw_torch", ""),
    ],
)
def test_a_training_after_a_plan_is_as_if_there_had_been_none(optim: str, options: str, tmp_path: Path) -> None:
    extra: dict[str, Any] = {"optim_args": f"{OPTIM_ARGS}, {options}"} if options else {}
    make = sft(tmp_path, optim, **extra)

    def trained() -> nn.Module:
        trainer = make()
        loss = trainer.train().training_loss
        assert math.isfinite(loss)
        assert type(optimizer_of(trainer)).__module__.startswith("hf_galore" if options else "torch")
        model: nn.Module = trainer.model
        return model

    clear_tables()
    expected = snapshot(trained())
    start = snapshot(llama())
    clear_tables()  # tables that the plan would find are not tables that it could leave
    before = fakes_alive()  # bitsandbytes keeps the embeddings of test_other_optimizers
    plan(make)
    assert fakes_alive() <= before
    found = snapshot(trained())
    assert all(type(weight) is Tensor for weight in found.values())
    assert_identical(found, expected)
    assert any(not torch.equal(found[name], start[name]) for name in start)
    assert not any(isinstance(table, FakeTensor) for table in tables())


def test_a_plan_uses_no_tables_of_a_training(tmp_path: Path) -> None:
    """Real tables in memory already would not be counted."""
    make = sft(tmp_path, "galore_adamw_8bit_layerwise", optim_args=f"{OPTIM_ARGS}, proj_bits=8")
    clear_tables()
    before = plan(make)
    make().train()
    after = plan(make)
    assert after.phase_peaks == before.phase_peaks
    assert not any(isinstance(table, FakeTensor) for table in tables())


def test_a_measurement_uses_no_tables_of_a_training(tmp_path: Path) -> None:
    make = sft(tmp_path, "galore_adamw_8bit_layerwise", optim_args=f"{OPTIM_ARGS}, proj_bits=8")
    make().train()
    assert measure(make).phase_peaks == measure(make).phase_peaks == plan(make, target="cpu").phase_peaks


def test_a_plan_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    def fail() -> Trainer:
        trainer = sft(tmp_path, "galore_adamw_8bit")()
        raise RuntimeError(f"No use for {type(trainer).__name__}.")

    attention, before = nn.functional.scaled_dot_product_attention, fakes_alive()
    with pytest.raises(RuntimeError, match="No use for SFTTrainer"):
        plan(fail)
    assert fakes_alive() <= before
    assert type(torch.zeros(1)) is Tensor
    assert nn.functional.scaled_dot_product_attention is attention
    sft(tmp_path, "galore_adamw_8bit")().train()


def test_fakes_alive_would_find_one() -> None:
    before = fakes_alive()
    with fake_training("cpu"):
        fake = torch.zeros(1)
    assert type(fake) is FakeTensor
    assert fakes_alive() == before + 1


# ---- what does not fit anywhere


@pytest.mark.slow
def test_a_model_of_a_thousand_times_this_machines_memory(tmp_path: Path) -> None:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    hidden, layers = 16384, 4
    intermediate = 1000 * memory // (2 * 3 * hidden * layers) // 512 * 512 + 512
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=128,
        num_key_value_heads=8,
        vocab_size=VOCABULARY,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    weights = [*model.parameters(), *model.buffers()]
    nbytes = sum(-(-weight.nbytes // GRANULE) * GRANULE for weight in weights)
    make = sft(
        tmp_path,
        "galore_adamw_8bit_layerwise",
        lambda: LlamaForCausalLM(config).to(torch.bfloat16),
        optim_args="rank=128, update_proj_gap=200",
    )
    planned = plan(make)
    assert planned.parameters == sum(param.numel() for param in model.parameters())
    assert 2 * planned.parameters > 1000 * memory
    assert planned.breakdown["parameters"] == nbytes
    assert sum(planned.breakdown.values()) == planned.peak_bytes


# ---- what a plan leaves out


@pytest.mark.parametrize(
    ("optim", "more"),
    [
        ("galore_adamw_8bit", {}),
        ("galore_adamw_8bit_layerwise", {}),
        ("galore_adamw_8bit_layerwise", {"gradient_accumulation_steps": 5, "activation_checkpointing": True}),
        # At rank 8: a gradient of less than the rank is projected twice, and its first R goes by another name.
        (
            "galore_adamw_8bit_layerwise",
            {"max_grad_norm": 1.0, "activation_checkpointing": True, "optim_args": OPTIM_ARGS.replace("16", "8", 1)},
        ),
    ],
)
def test_what_lies_between_the_first_and_the_last_of_a_kind_changes_nothing(
    optim: str, more: dict[str, Any], tmp_path: Path
) -> None:
    """Five layers, of which a plan refreshes the outer ones only, and runs two micro-batches of five."""
    deep = functools.partial(llama, num_hidden_layers=5)
    assert_plan_is_measured(sft(tmp_path, optim, deep, **more))


@pytest.mark.parametrize(
    ("optim", "more"),
    [
        ("galore_adamw", {}),
        ("galore_adamw_8bit_layerwise", {"gradient_accumulation_steps": 3, "max_grad_norm": 1.0}),
    ],
)
def test_parts_in_the_middle_change_nothing(
    optim: str, more: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of an update in many parts, and of low-rank gradients in 8 bits, a plan computes three: beside the real run."""
    monkeypatch.setattr(rounding, "CHUNK_ELEMENTS", 2**10)
    passed: list[int] = []
    whole = rounding.parts

    def counted(length: int, size: int) -> Iterator[slice]:
        every = list(whole(length, size))
        passed.append(len(every))
        yield from every

    options = f"{OPTIM_ARGS}, stochastic_rounding=true"
    if more:
        options += ", gradient_bits=8"
    make = sft(tmp_path, optim, lambda: llama().to(torch.bfloat16), optim_args=options, **more)
    for module in (rounding, float8):
        monkeypatch.setattr(module, "parts", counted)
    assert_plan_is_measured(make)
    assert max(passed) > 3  # in the real run: there was something to leave out


# ---- what is called


def test_the_package_is_called_for_trainers_and_for_recipes(tmp_path: Path) -> None:
    room: Any = importlib.import_module("hf_galore.plan")
    make = sft(tmp_path, "galore_adamw")
    assert room(make, target="cpu").phase_peaks == plan(make, target="cpu").phase_peaks
    file = tmp_path / "recipe.yaml"
    llama().save_pretrained(tmp_path / "model")
    file.write_text(RECIPE.format(folder=tmp_path / "model", optim_args=OPTIM_ARGS, output=tmp_path / "output"))
    for recipe in (file, str(file), any_recipe.parse(["--config", str(file)], "plan", "")):
        found = room(recipe, target="cpu")
        assert found.phase_peaks == plan_recipe(file, target="cpu").phase_peaks
        assert (found.tokens_per_step, len(found.notes)) == (2 * 2 * 16, 1)  # of the tokenizer, which is not there
    with pytest.raises(ValueError, match="overrides and layers are for a recipe, but a function was given"):
        room(make, layers=1)


def test_planning_a_recipe_leaves_nothing_registered(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    llama().save_pretrained(tmp_path / "model")
    file.write_text(RECIPE.format(folder=tmp_path / "model", optim_args=OPTIM_ARGS, output=tmp_path / "output"))
    hf_galore.unregister()
    try:
        found = plan_recipe(file, target="cpu")
        assert not is_registered()
    finally:
        hf_galore.register()
    assert found.breakdown == plan_recipe(file, target="cpu").breakdown
    assert is_registered()
    assert "bases" in found.breakdown


def test_the_planner_does_without_recipes_and_commands() -> None:
    code = "import sys, hf_galore.plan; print(*(name for name in sys.modules if name.startswith('hf_galore.')))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    rooms = {name.split(".")[1] for name in run.stdout.split()}
    assert "plan" in rooms
    assert rooms.isdisjoint({"recipes", "compare", "cli"})


@pytest.mark.parametrize(
    ("source", "options", "words"),
    [
        (5, {}, "of a recipe's file, or of a function that makes a Trainer, but was given a int: 5"),
        (None, {}, "but was given a NoneType"),
        ("x.yaml", {"overrides": "--max_length 5"}, r"overrides is a list of texts, \['--max_length', '512'\]"),
        ("x.yaml", {"overrides": ["--max_length", 5]}, "overrides is a list of texts"),
        ("x.yaml", {"layers": 0}, "layers has to be at least 1, but is 0"),
        (lambda: 5, {"layers": 1}, "overrides and layers are for a recipe"),
        (lambda: 5, {"vram": 24}, r"in bytes \(24 \* 2\*\*30\) or a text \('24GB'\), but was given 24"),
        (lambda: 5, {"vram": -1}, "but was given -1"),
        (lambda: 5, {"vram": "24 lightyears"}, "A card is given by its name, its label"),
        (lambda: 5, {"target": "gpu"}, "target has to be one of cuda, cpu, but is 'gpu'"),
        (lambda: 5, {}, "has to return a Trainer, but returned a int"),
    ],
)
def test_nonsense_is_refused_in_words(source: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises((ValueError, TypeError), match=words):
        hf_galore.plan(source, **options)


def test_the_card_may_be_given_as_text(tmp_path: Path) -> None:
    found = hf_galore.plan(sft(tmp_path, "adamw_torch"), vram="24GiB")
    assert (found.vram_bytes, found.free_bytes, found.fits_now) == (24 * 2**30, None, None)


def test_the_card_of_this_machine_and_what_is_free_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    present = PresentCard(2 * 2**30, 2**30)
    asked = []

    def present_card(context: int) -> PresentCard:
        asked.append(context)
        return present

    monkeypatch.setattr(planner, "present_card", present_card)
    found = plan(sft(tmp_path, "adamw_torch"))
    assert asked == [OUTSIDE[CONTEXT]]
    assert (found.vram_bytes, found.free_bytes) == present
    assert (found.fits, found.fits_now) == (True, True)
    almost = dataclasses.replace(found, free_bytes=found.needed_bytes)
    assert almost.fits_now is True
    full = dataclasses.replace(found, free_bytes=found.needed_bytes - 1)
    assert (full.fits, full.fits_now) == (True, False)
    assert str(full).endswith("GiB are free")
    assert plan(sft(tmp_path, "adamw_torch"), vram="24GiB").free_bytes is None
    assert asked == [OUTSIDE[CONTEXT]]


def test_what_a_card_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner, "expandable_in_use", lambda: True)
    found = plan(sft(tmp_path, "galore_adamw"))
    assert found.expandable
    assert found.peak_bytes < found.reserved_bytes == found.expandable_bytes
    assert found.needed_bytes == found.reserved_bytes + OUTSIDE_BYTES
    monkeypatch.setattr(planner, "expandable_in_use", lambda: False)
    without = plan(sft(tmp_path, "galore_adamw"))
    assert without.reserved_bytes == without.segmented_bytes == found.segmented_bytes
    assert without.as_dict() | {"seconds": 0.0} == {
        **dataclasses.asdict(without),
        "seconds": 0.0,
        "reserved_bytes": without.segmented_bytes,
        "needed_bytes": without.segmented_bytes + OUTSIDE_BYTES,
        "fits": None,
        "fits_now": None,
        "outside_bytes": dict(OUTSIDE),
    }


def test_the_allocator_of_a_plan_is_that_of_the_real_run(tmp_path: Path) -> None:
    """Where nothing is left out of the plan, storages come and go in the same order."""
    make = sft(tmp_path, "galore_adamw", functools.partial(llama, num_hidden_layers=1))
    planned, measured = plan(make, target="cpu"), measure(make)
    assert planned.expandable_bytes == measured.expandable_bytes
    assert planned.segmented_bytes == measured.segmented_bytes


@pytest.mark.skipif(HEAD_BY_TOKENS, reason="TRL before 1.15 takes two cards")
@pytest.mark.parametrize("optim", ["adamw_torch", "galore_adamw_layerwise"])
def test_a_machine_with_two_cards(optim: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL refuses two cards for one process; a plan is of one."""
    one = plan(sft(tmp_path, optim, use_cpu=False))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="DataParallel"):
        sft(tmp_path, optim, use_cpu=False)()
    two = plan(sft(tmp_path, optim, use_cpu=False))
    assert two.phase_peaks == one.phase_peaks
    assert two.needed_bytes == one.needed_bytes
    with pytest.raises(ValueError, match="DataParallel"):  # what a plan replaces is back
        sft(tmp_path, optim, use_cpu=False)()


def test_the_package_is_its_function_each_time() -> None:
    package: Any = hf_galore
    first, second = package.plan, package.plan
    module: Any = sys.modules["hf_galore.plan"]
    assert first is second
    assert first is module
    assert inspect.signature(first) == inspect.signature(module.plan)
    assert {"plan", "measure", "make_optimizer", "GaLoreAdamW", "__version__"} <= set(dir(hf_galore))


def test_the_package_has_the_planner() -> None:
    assert (hf_galore.measure, hf_galore.MemoryPlan) == (measure, MemoryPlan)
    with pytest.raises(AttributeError, match="no attribute 'plna'"):
        _ = hf_galore.plna
