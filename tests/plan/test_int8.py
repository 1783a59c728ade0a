"""Plans of models whose weights are kept in 8 bits: byte for byte those of the real run, as of others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaForCausalLM, PreTrainedModel

from hf_galore import Int8Config, quantize_weights_
from hf_galore.int8 import BLOCK, products
from hf_galore.plan.planner import plan
from hf_galore.plan.processes import check_no_int8
from hf_galore.plan.tracking import GRANULE, StorageTracker
from tests.plan.test_planner import SETTINGS, assert_plan_is_measured
from tests.support.planning import OPTIM_ARGS, llama, sft


@pytest.fixture(autouse=True)
def _many_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of which a plan leaves out those in the middle."""
    monkeypatch.setattr(products, "TILE_ELEMENTS", 2**11)


@pytest.fixture(autouse=True)
def _without_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written becomes float in the host's memory, a file at a time: on a CPU that counts, and on a card not."""
    monkeypatch.setattr(PreTrainedModel, "save_pretrained", lambda *args, **kwargs: None)


def int8_llama() -> LlamaForCausalLM:
    model = llama().to(torch.bfloat16)
    quantize_weights_(model)
    return model


@pytest.mark.parametrize(
    ("optim", "setting"),
    [*(("galore_adamw_8bit_layerwise", setting) for setting in SETTINGS), ("galore_adamw", "accumulated")],
)
def test_every_way_to_train(optim: str, setting: str, tmp_path: Path) -> None:
    assert_plan_is_measured(sft(tmp_path, optim, int8_llama, **SETTINGS[setting]))


@pytest.mark.parametrize("options", ["residual=fira", "scaling=channel"])
def test_options_that_need_gradients(options: str, tmp_path: Path) -> None:
    optim_args = f"{OPTIM_ARGS}, {options}"
    assert_plan_is_measured(sft(tmp_path, "galore_adamw_8bit_layerwise", int8_llama, optim_args=optim_args))


def test_parameters_are_codes_and_exponents(tmp_path: Path) -> None:
    planned = plan(sft(tmp_path, "galore_adamw_8bit_layerwise", int8_llama))
    model = llama()
    in_8_bits = {f"{name}.weight" for name in quantize_weights_(model)}
    assert len(in_8_bits) == 2 * 7
    nbytes = sum(buffer.nbytes for buffer in model.buffers())
    for name, param in model.named_parameters():
        parts = [param.numel(), param.numel() // BLOCK] if name in in_8_bits else [2 * param.numel()]
        nbytes += sum(-(-part // GRANULE) * GRANULE for part in parts)
    assert 0 <= planned.breakdown["parameters"] - nbytes < 4 * GRANULE  # of two buffers
    assert planned.parameters == sum(param.numel() for param in model.parameters())


def test_no_weight_is_there_in_more_than_a_tile(tmp_path: Path) -> None:
    """What training takes less than with weights in bfloat16 is what the weights take less."""
    make = [sft(tmp_path, "galore_adamw_8bit_layerwise", model) for model in (int8_llama, lambda: llama().bfloat16())]
    in_8, in_16 = (plan(one) for one in make)
    less = in_16.breakdown["parameters"] - in_8.breakdown["parameters"]
    tile = 4 * products.TILE_ELEMENTS
    for phase in ("forward", "backward"):
        assert in_16.phase_peaks[phase] - in_8.phase_peaks[phase] >= less - 3 * tile


def test_a_model_that_is_loaded_in_8_bits(tmp_path: Path) -> None:
    """By the quantization config that says so, an object or what config.json has of one."""
    folder = tmp_path / "model"
    model = llama().to(torch.bfloat16)
    model.config.save_pretrained(folder)
    asked = Int8Config(modules_to_not_convert=["o_proj", "lm_head"])

    def loaded(**more: Any) -> Any:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **more)

    def converted() -> LlamaForCausalLM:
        model = llama().to(torch.bfloat16)
        quantize_weights_(model, ["o_proj", "lm_head"])
        return model

    optim = "galore_adamw_8bit_layerwise"
    expected = plan(sft(tmp_path, optim, converted))
    assert plan(sft(tmp_path, optim, lambda: loaded(quantization_config=asked))).phase_peaks == expected.phase_peaks
    model.config.quantization_config = asked.to_dict()
    model.config.save_pretrained(folder)
    assert plan(sft(tmp_path, optim, loaded)).phase_peaks == expected.phase_peaks
    bits4 = BitsAndBytesConfig(load_in_4bit=True)
    with pytest.raises(ValueError, match=r"cannot be planned, unless they are in 8 bits and train \(weight_bits: 8\)"):
        plan(sft(tmp_path, optim, lambda: loaded(quantization_config=bits4)))


def test_a_weight_is_seen_by_what_it_holds() -> None:
    model = llama().to(torch.bfloat16)
    quantize_weights_(model)
    weight = model.model.layers[0].mlp.up_proj.weight
    with StorageTracker(torch.device("cpu")) as tracker:
        tracker.label([weight], "parameters")
        detached = weight.detach()
        assert tracker.live_bytes == weight.codes.nbytes + weight.exponents.nbytes
        copied = detached.clone()
        assert tracker.live_bytes == 2 * (weight.codes.nbytes + weight.exponents.nbytes)
        del copied
        assert tracker.breakdown() == {"parameters": weight.codes.nbytes + weight.exponents.nbytes}


def test_a_plan_of_shards_is_refused_by_name() -> None:
    model = llama().to(torch.bfloat16)
    check_no_int8(model)
    quantize_weights_(model)
    with pytest.raises(ValueError, match=r"FSDP2 does not shard weights in 8 bits, and those of model\.layers.*are"):
        check_no_int8(model)
