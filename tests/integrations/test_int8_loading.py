"""Models with int8 weights, as transformers loads and saves them: which values, how much memory, what is refused."""

from __future__ import annotations

import copy
import gc
import io
import json
import logging
import pickle
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, load_checkpoint_and_dispatch
from accelerate.utils import set_module_tensor_to_device
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
)
from transformers.quantizers import auto
from transformers.trainer_utils import validate_quantization_for_training

import hf_galore
from hf_galore import Int8Config, quantize_weights_
from hf_galore.int8 import Int8Weight, is_int8
from hf_galore.integrations import int8_quantizer, int8_saving
from hf_galore.integrations.int8_config import METHOD
from hf_galore.integrations.int8_layers import kept_layers, layers_in_int8
from hf_galore.integrations.int8_quantizer import Int8Quantizer
from tests.support.helpers import tiny_llama
from tests.support.int8 import weight_of

IN_INT8 = 14  # matrices of two layers


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ordinary checkpoint in bfloat16, of several files."""
    path = tmp_path_factory.mktemp("model")
    tiny_llama().to(torch.bfloat16).save_pretrained(path, max_shard_size="64KB")
    assert len(list(path.glob("*.safetensors"))) > 3
    return path


def load(path: Path, config: Int8Config | None = None, cls: Any = AutoModelForCausalLM, **options: Any) -> Any:
    return cls.from_pretrained(path, **({} if config is None else {"quantization_config": config}), **options)


def values_of(model: nn.Module) -> dict[str, Tensor]:
    """The state dict with the values of int8 weights."""
    return {
        name: value.dequantized() if isinstance(value, Int8Weight) else value
        for name, value in model.state_dict().items()
    }


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    different = [name for name, value in found.items() if not torch.equal(value, expected[name])]
    assert not different


def live_floats(kinds: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float32)) -> int:
    """Bytes of all storages of floats that are reachable."""
    found: dict[int, int] = {}
    for one in gc.get_objects():
        # Of no subclass: not int8 weights, nor the fakes of a plan that was made in this process.
        if type(one) in (Tensor, nn.Parameter) and one.dtype in kinds and not one.is_meta:
            storage = one.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


# ---- which values


def test_a_checkpoint_is_loaded_into_the_nearest_values_and_computes_as_they_do(folder: Path) -> None:
    plain, model = load(folder), load(folder, Int8Config())
    layers = layers_in_int8(model)
    assert len(layers) == IN_INT8
    expected = {
        name: Int8Weight.from_float(value).dequantized() if name.removesuffix(".weight") in layers else value
        for name, value in plain.state_dict().items()
    }
    assert_same(values_of(model), expected)
    plain.load_state_dict(expected)
    ids = torch.arange(32).view(2, 16)
    torch.testing.assert_close(model(ids, labels=ids).loss, plain(ids, labels=ids).loss, rtol=1e-3, atol=0)
    found, wanted = (one.generate(ids[:1], max_new_tokens=4, do_sample=False) for one in (model, plain))
    assert found.tolist() == wanted.tolist()


def test_in_memory_is_as_loaded_and_the_trainer_takes_both(folder: Path) -> None:
    loaded, made = load(folder, Int8Config()), load(folder)
    converted = quantize_weights_(made)
    assert converted == layers_in_int8(loaded) == layers_in_int8(made)
    assert_same(values_of(made), values_of(loaded))
    for model in (loaded, made):
        assert all(param.requires_grad for param in model.parameters())
        validate_quantization_for_training(model)  # what Trainer.__init__ asks
        assert model.hf_quantizer.is_serializable()
        assert not model.hf_quantizer.is_compileable
    assert quantize_weights_(made) == []  # all are


@pytest.mark.parametrize("save", ["float", "int8"])
def test_saved_and_loaded_again_the_codes_are_the_same(folder: Path, save: str, tmp_path: Path) -> None:
    model = load(folder, Int8Config(save=save))
    model.save_pretrained(tmp_path / "one")
    config = json.loads((tmp_path / "one" / "config.json").read_text())
    again = load(tmp_path / "one", Int8Config() if save == "float" else None)
    assert len(layers_in_int8(again)) == IN_INT8
    for name, value in again.state_dict().items():
        other = model.state_dict()[name]
        if is_int8(value):
            assert torch.equal(value.codes, other.codes)
            assert torch.equal(value.exponents, other.exponents)
        else:
            assert torch.equal(value, other)
    if save == "float":
        # As if there were no hf_galore.
        assert "quantization_config" not in config
        assert config["dtype"] == "bfloat16"
        assert_same(load_file(tmp_path / "one" / "model.safetensors"), values_of(model))
        plain = load(tmp_path / "one")
        assert not layers_in_int8(plain)
        assert_same(plain.state_dict(), values_of(model))
    else:
        assert config["quantization_config"] == {
            "quant_method": METHOD,
            "weight_bits": 8,
            "save": "int8",
            "modules_to_not_convert": None,
        }
        # Saved again it is the same, and as floats where that is asked for.
        again.save_pretrained(tmp_path / "two")
        assert_same(*(load_file(tmp_path / one / "model.safetensors") for one in ("two", "one")))
        again.hf_quantizer.quantization_config.save = "float"
        again.save_pretrained(tmp_path / "two")
        assert_same(load(tmp_path / "two").state_dict(), values_of(model))


def test_dequantized_it_is_an_ordinary_model(folder: Path, tmp_path: Path) -> None:
    model = load(folder, Int8Config())
    expected = values_of(model)
    model.save_pretrained(tmp_path)  # after which the config has the dtype by its name
    assert model.dequantize() is model
    assert not layers_in_int8(model)
    assert not getattr(model, "is_quantized", False)
    assert "save_pretrained" not in vars(model)
    assert not any(module._load_state_dict_pre_hooks for module in model.modules())
    assert_same(model.state_dict(), expected)
    assert all(param.requires_grad for param in model.parameters())


def test_dequantized_each_weight_has_the_dtype_that_it_had(folder: Path) -> None:
    """Not the one that the model was loaded in: what had been trained in float32 would be rounded."""
    model = load(folder, Int8Config()).to(torch.float32)
    with torch.no_grad():
        model.model.norm.weight.add_(1e-5)
        model.lm_head.to(torch.bfloat16)
    expected = values_of(model)
    model.dequantize()
    assert_same(model.state_dict(), expected)
    assert {name: value.dtype for name, value in expected.items()} == {
        name: torch.bfloat16 if name == "lm_head.weight" else torch.float32 for name in expected
    }
    doubles = load(folder, Int8Config()).dequantize(torch.float64)
    assert {param.dtype for param in doubles.parameters()} == {torch.float64}


def test_it_is_freed_where_nobody_has_it() -> None:
    """As other models are, whose memory a card has back at once."""
    gc.collect()
    gc.disable()
    try:
        model = tiny_llama()
        quantize_weights_(model)
        alive = weakref.ref(model)
        del model
        assert alive() is None
    finally:
        gc.enable()


def exchange(model: Any, way: str) -> int:
    """Put a model's weights into 8 bits or back. Returns how many were."""
    if way == "quantized":
        return len(quantize_weights_(model))
    count = len(layers_in_int8(model))
    model.dequantize()
    return count


def backward(model: Any) -> None:
    ids = torch.arange(32).view(2, 16)
    model(ids, labels=ids).loss.backward()


WAYS = ["quantized", "dequantized"]


@pytest.mark.parametrize("layerwise", [False, True], ids=["plain", "layerwise"])
@pytest.mark.parametrize("way", WAYS)
def test_an_optimizer_that_was_made_before_is_refused(way: str, layerwise: bool) -> None:
    """It would train weights that the model no longer has: with gradients of before, with none, and with zeros."""
    name = "galore_adamw_layerwise" if layerwise else "galore_adamw"
    for before in ("none", "gradients", "zeros"):
        model: Any = tiny_llama()
        if way == "dequantized":
            quantize_weights_(model)
        optimizer = hf_galore.make_optimizer(model, optim=name, optim_args="rank=4", hold_gradients=layerwise)
        if before != "none":
            backward(model)
        if before == "zeros":
            optimizer.zero_grad(set_to_none=False)
        if layerwise and way == "quantized":
            with pytest.raises(ValueError, match=r"hooks are on model.layers.0.self_attn.q_proj.*optimizer.close\(\)"):
                exchange(model, way)
            assert not layers_in_int8(model)
            optimizer.close()
        count = exchange(model, way)
        backward(model)
        with pytest.raises(RuntimeError, match=rf"q_proj.weight and {count - 1} other parameter.* of this GaLoreAdamW"):
            optimizer.step()
        # Made anew it trains what there is.
        optimizer = hf_galore.make_optimizer(model, optim=name, optim_args="rank=4")
        start = values_of(model)["model.layers.0.mlp.up_proj.weight"].clone()
        backward(model)
        optimizer.step()
        optimizer.close()
        assert not torch.equal(values_of(model)["model.layers.0.mlp.up_proj.weight"], start)


@pytest.mark.parametrize("way", WAYS)
def test_other_optimizers_do_not_mind_an_exchange(way: str) -> None:
    """Of another model, of what stayed, and of what was frozen; and one whose model has the parameters still."""
    model, other = tiny_llama(), tiny_llama()
    if way == "dequantized":
        quantize_weights_(model)
    frozen = model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    groups: list[Any] = [{"params": [model.model.norm.weight, frozen]}]
    optimizers = [
        hf_galore.make_optimizer(other, optim_args="rank=4"),
        hf_galore.optim.GaLoreAdamW(groups, lr=1e-2),
    ]
    kept = nn.ModuleList([model.model.layers[1].mlp.up_proj, model.model.norm])
    shared = nn.ModuleList([nn.Linear(1, 1), model.model.norm])
    shared[0].weight = kept[0].weight  # which `kept` loses, and `shared` does not
    optimizers.append(hf_galore.optim.GaLoreAdamW(shared.parameters(), lr=1e-2, module=shared))
    start = model.model.norm.weight.detach().clone()
    exchange(model, way)
    for each in (model, other):
        backward(each)
    for optimizer in optimizers:
        optimizer.step()
    assert not torch.equal(model.model.norm.weight, start)


def test_an_exchange_that_fails_half_way_is_known_to_the_optimizer() -> None:
    model = tiny_llama()
    optimizer = hf_galore.make_optimizer(model, optim_args="rank=4")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj\.weight has values that are not finite"):
        quantize_weights_(model)
    assert layers_in_int8(model)
    with pytest.raises(RuntimeError, match=r"q_proj.weight and .* were exchanged for others"):
        optimizer.step()


def test_parts_of_layers_that_are_not_there_are_named() -> None:
    model: Any = tiny_llama()
    quantize_weights_(model)
    weight = model.model.layers[0].mlp.up_proj.weight
    state = {
        f"model.layers.77.mlp.up_proj{end}": part
        for end, part in zip((int8_saving.CODES, int8_saving.EXPONENTS), weight.blocks, strict=True)
    }
    assert set(model.load_state_dict(dict(state), strict=False).unexpected_keys) == set(state)
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\) in state_dict.*layers.77.mlp.up_proj.weight_codes"):
        model.load_state_dict(dict(state))


def test_copied_moved_and_pickled_it_is_itself(folder: Path, tmp_path: Path) -> None:
    model: Any = load(folder, Int8Config())
    other = copy.deepcopy(model)
    assert_same(values_of(other), values_of(model))
    weight, copied = (one.model.layers[0].mlp.up_proj.weight for one in (model, other))
    assert copied.codes.data_ptr() != weight.codes.data_ptr()
    assert copied.requires_grad
    assert isinstance(copied, nn.Parameter)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        other.model.norm.weight.fill_(7.0)
    for one in (other, pickle.loads(pickle.dumps(other))):  # each saves itself
        one.save_pretrained(tmp_path)
        assert_same(load(tmp_path).state_dict(), values_of(other))
    with torch.no_grad():
        other.model.norm.weight.copy_(model.model.norm.weight)

    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    with torch.no_grad():
        copied.zero_()
    other.load_state_dict(torch.load(file, weights_only=True))
    assert_same(values_of(other), values_of(model))
    assert other.to(torch.float32).model.layers[0].mlp.up_proj.weight.dtype == torch.float32
    assert len(layers_in_int8(other)) == IN_INT8
    assert_same(values_of(other.to(torch.bfloat16)), values_of(model))


def test_ordinary_weights_are_loaded_into_int8_parameters(folder: Path) -> None:
    """As the Trainer does with a checkpoint, and with the best of them at the end."""
    model = load(folder, Int8Config())
    state = {name: value.clone() for name, value in values_of(model).items()}
    codes = model.model.layers[1].self_attn.q_proj.weight.codes.clone()
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight.zero_()
    model.load_state_dict(state)
    assert torch.equal(model.model.layers[1].self_attn.q_proj.weight.codes, codes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_weights_that_are_assigned_are_taken_into_8_bits(folder: Path, dtype: torch.dtype) -> None:
    """`load_state_dict(assign=True)` puts what it is given in the place of parameters: layers became floats."""
    model, made = load(folder, Int8Config()), nn.Sequential(nn.Linear(40, 24), nn.Linear(24, 8))
    quantize_weights_(made)
    for one, count in ((model, IN_INT8), (copy.deepcopy(model), IN_INT8), (pickle.loads(pickle.dumps(made)), 2)):
        torch.manual_seed(3)
        one.requires_grad_(False)
        given = {name: torch.randn(value.shape).to(dtype) for name, value in one.state_dict().items()}
        one.load_state_dict(given, assign=True)
        layers = layers_in_int8(one)
        assert len(layers) == count
        assert not any(param.requires_grad for param in one.parameters())
        assert {param.dtype for param in one.parameters()} == {dtype}
        expected = {
            name: Int8Weight.from_float(value).dequantized() if name.removesuffix(".weight") in layers else value
            for name, value in given.items()
        }
        assert_same(values_of(one), expected)
        assert not any(is_int8(value) for value in given.values())
    part = made[1]  # of a model, by itself
    part.load_state_dict({"weight": torch.ones(8, 24), "bias": torch.ones(8)}, assign=True)
    assert weight_of(part).dequantized().eq(1).all()
    other = copy.deepcopy(made).to("meta")
    other.load_state_dict(values_of(made), assign=True)
    assert layers_in_int8(other) == ["0", "1"]
    assert_same(values_of(other), values_of(made))


def test_weights_that_cannot_be_assigned_are_named(folder: Path) -> None:
    model: Any = load(folder, Int8Config())
    given = {name: value.half() for name, value in values_of(model).items()}
    with pytest.raises(ValueError, match=r"q_proj.weight is kept in 8 bits.*one of torch.float16.*values in bfloat16"):
        model.load_state_dict(given, assign=True)
    model.load_state_dict(given)  # without it they are taken
    name = "model.layers.0.mlp.up_proj.weight"
    with pytest.raises(RuntimeError, match=f"size mismatch for {name}"):
        model.load_state_dict({**values_of(model), name: torch.ones(3, 3)}, assign=True)
    assert len(layers_in_int8(model)) == IN_INT8


@pytest.mark.parametrize("assign", [False, True])
def test_codes_and_exponents_are_loaded_into_int8_parameters(folder: Path, assign: bool) -> None:
    """Of a whole model, of a part of it, and where the numbers are nowhere yet."""
    model: Any = load(folder, Int8Config())
    given = int8_saving.unwritten(model.state_dict(), "int8")
    expected = values_of(model)
    other: Any = copy.deepcopy(model)
    with torch.no_grad():
        for param in other.parameters():
            param.zero_()
    if assign:
        other.to("meta")
    start = "model.layers.1.mlp."
    part = {name.removeprefix(start): value for name, value in given.items() if name.startswith(start)}
    other.model.layers[1].mlp.load_state_dict(part, assign=assign)
    found = other.model.layers[1].mlp.down_proj.weight
    assert torch.equal(found.dequantized(), expected[f"{start}down_proj.weight"])
    layer = other.model.layers[0].mlp.down_proj
    own = {f"weight_{end}": given[f"model.layers.0.mlp.down_proj.weight_{end}"] for end in ("codes", "exponents")}
    layer.load_state_dict(own, assign=assign)
    assert torch.equal(layer.weight.dequantized(), expected["model.layers.0.mlp.down_proj.weight"])
    other.load_state_dict(given, assign=assign)
    assert len(layers_in_int8(other)) == IN_INT8
    assert_same(values_of(other), expected)


@pytest.mark.parametrize("function", [None, get_ema_avg_fn(0.9)], ids=["mean", "exponential"])
def test_an_average_is_kept_in_floats(function: Any, folder: Path) -> None:
    """As docs/int8.md has it: of steps so small that a copy in 8 bits would not move."""
    model: Any = load(folder, Int8Config(), dtype=torch.float32)
    averaged: Any = AveragedModel(model, avg_fn=function)
    averaged.module.dequantize(torch.float32)
    assert len(layers_in_int8(model)) == IN_INT8
    name = "model.layers.0.mlp.up_proj.weight"
    seen = []
    for step in range(8):
        with torch.no_grad():
            noise = torch.randn(256, 64, generator=torch.Generator().manual_seed(step))
            model.get_parameter(name).copy_(model.get_parameter(name).dequantized() + 1e-3 * noise)
        averaged.update_parameters(model)
        seen.append(values_of(model)[name])
    expected = torch.stack(seen).mean(0)
    if function is not None:
        expected = seen[0]
        for value in seen[1:]:
            expected = 0.9 * expected + 0.1 * value
    torch.testing.assert_close(averaged.module.get_parameter(name), nn.Parameter(expected), rtol=1e-5, atol=1e-7)
    in_8_bits = Int8Weight.from_float(expected).dequantized()
    assert (in_8_bits - expected).abs().max() > 1e-4  # what the average would have lost


# ---- how much memory


def test_a_checkpoint_is_never_whole_in_floats(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At no time is there more than what stays float, and one weight."""
    gc.collect()
    before, peak, seen = live_floats(), [0], []
    convert = Int8Quantizer.convert

    def counting(self: Int8Quantizer, name: str, value: Tensor, layer_weight: Tensor) -> Tensor:
        made = convert(self, name, value, layer_weight)
        peak[0] = max(peak[0], live_floats() - before)
        seen.append(name)
        return made

    monkeypatch.setattr(Int8Quantizer, "convert", counting)
    model = load(folder, Int8Config())
    assert len(seen) == IN_INT8
    stays = sum(param.nbytes for param in model.parameters() if not is_int8(param))
    largest = max(param.nbytes for param in model.parameters() if is_int8(param))
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    whole = sum(2 * param.numel() for param in model.parameters())
    assert peak[0] <= stays + buffers + largest < whole / 2


def test_what_is_reserved_on_a_card_before_loading_is_for_int8_weights(folder: Path) -> None:
    """`caching_allocator_warmup`: 33/32 of a byte an element."""
    with torch.device("meta"):
        model = tiny_llama().to(torch.bfloat16)
    quantizer = Int8Quantizer(Int8Config(), pre_quantized=False)
    quantizer._process_model_before_weight_loading(model)
    total = sum(
        quantizer.param_element_size(model, name, param) * param.numel() for name, param in model.named_parameters()
    )
    real = load(folder, Int8Config())
    blocks = sum(part.nbytes for param in real.parameters() if is_int8(param) for part in param.blocks)
    assert total == blocks + sum(param.nbytes for param in real.parameters() if not is_int8(param))


@pytest.mark.parametrize(("rank", "place"), [(None, 1), ("0", 0), ("2", 2), ("7", 1)])
def test_a_process_loads_onto_its_own_card(rank: str | None, place: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not into the host's memory, which may be smaller. Where a launcher shows each process one card, onto that."""
    quantizer = Int8Quantizer(Int8Config(), pre_quantized=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert quantizer.update_device_map(None) is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("LOCAL_RANK", rank)
    assert quantizer.update_device_map(None) == {"": place}
    assert quantizer.update_device_map("auto") == "auto"


def test_saving_makes_floats_of_one_file_at_a_time(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(folder, Int8Config())
    gc.collect()
    before, peak = live_floats(), [0]
    values = int8_saving.Unwritten.values

    def counting(self: int8_saving.Unwritten) -> Tensor:
        made = values(self)
        peak[0] = max(peak[0], live_floats() - before)
        return made

    monkeypatch.setattr(int8_saving.Unwritten, "values", counting)
    model.save_pretrained(tmp_path, max_shard_size="80KB")
    files = list(tmp_path.glob("*.safetensors"))
    assert len(files) > 2
    assert all(file.stat().st_size < 85_000 for file in files)
    # And the last tensor of the file before, which transformers has a name for still.
    assert 0 < peak[0] <= 80_000 + max(2 * param.numel() for param in model.parameters())
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(2 * param.numel() for param in model.parameters())
    assert_same(load(tmp_path).state_dict(), values_of(model))


@pytest.mark.parametrize("loaded", [True, False], ids=["loaded", "in memory"])
def test_files_are_small_without_being_told(
    folder: Path, tmp_path: Path, loaded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers' own default is 50 GB: one file, all of it floats in the host's memory."""
    monkeypatch.setattr(int8_saving, "SHARD", "64KB")
    model = load(folder, Int8Config() if loaded else None)
    if not loaded:
        quantize_weights_(model)
    model.save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    model.save_pretrained(tmp_path, max_shard_size="1GB")
    assert len(list(tmp_path.glob("*.safetensors"))) == 1


# ---- which layers


def test_heads_embeddings_and_tied_weights_stay_and_a_line_says_so(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "hf_galore"):
        model = load(folder, Int8Config())
    (said,) = [message for message in caplog.messages if "kept in 8 bits" in message]
    assert "embeddings: model.embed_tokens; output head: lm_head" in said
    assert not is_int8(model.lm_head.weight)

    model = load(folder, Int8Config(modules_to_not_convert=["down_proj", "model.layers.0"]))
    assert not is_int8(model.lm_head.weight)
    assert layers_in_int8(model) == [
        *(f"model.layers.1.self_attn.{name}_proj" for name in "qkvo"),
        *(f"model.layers.1.mlp.{name}_proj" for name in ("gate", "up")),
    ]
    tied = tiny_llama(tie_word_embeddings=True)
    assert "lm_head" not in quantize_weights_(tied, [])
    assert kept_layers(tied, []) == {"lm_head": "tied to another"}
    with torch.no_grad():
        tied.lm_head.weight.zero_()
    assert not tied.model.embed_tokens.weight.any()


def test_a_head_that_the_checkpoint_lacks_is_made_and_stays(folder: Path) -> None:
    model = load(folder, Int8Config(), AutoModelForSequenceClassification, num_labels=3)
    assert len(layers_in_int8(model)) == IN_INT8
    assert not is_int8(model.score.weight)
    assert bool(model.score.weight.isfinite().all())


def test_a_layer_that_the_checkpoint_lacks_is_made_in_8_bits(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    state = {name: value.contiguous() for name, value in load(folder).state_dict().items()}
    name = "model.layers.1.mlp.up_proj.weight"
    del state[name]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model = load(tmp_path, Int8Config())
    assert len(layers_in_int8(model)) == IN_INT8
    made = model.get_parameter(name).dequantized()
    assert 0.01 < float(made.std()) < 0.03  # by the config's initializer_range, 0.02


def test_stacks_of_experts_and_conv1d_stay(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    size = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    experts = MixtralForCausalLM(
        MixtralConfig(**size, intermediate_size=64, num_key_value_heads=2, num_local_experts=2, num_experts_per_tok=1)
    ).to(torch.bfloat16)
    experts.save_pretrained(tmp_path)
    with caplog.at_level(logging.INFO, "hf_galore"):
        model = load(tmp_path, Int8Config())
        assert layers_in_int8(model) == [f"model.layers.0.self_attn.{name}_proj" for name in "qkvo"]
        # Experts are merged as they are read, and divided as they are saved.
        model.save_pretrained(tmp_path / "saved")
        assert_same(load(tmp_path / "saved").state_dict(), values_of(model))
        old, new = (safe_open(path / "model.safetensors", "pt") for path in (tmp_path, tmp_path / "saved"))
        assert set(old.keys()) == set(new.keys())
        gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2, n_positions=16))
        with pytest.raises(
            ValueError, match=r"no linear layer whose weight could be kept.*lm_head \(tied to another\)"
        ):
            quantize_weights_(gpt2)
    assert "stacks of matrices (experts, convolutions): model.layers.0.mlp.experts" in caplog.text


def test_a_plain_module_keeps_its_layers_with_a_computation_of_their_own() -> None:
    class Halved(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight.mT / 2

    model = nn.Sequential(nn.Linear(32, 8), Halved(8, 8), nn.Embedding(4, 8))
    assert quantize_weights_(model) == ["0"]
    assert not hasattr(model, "hf_quantizer")
    assert is_int8(model[0].weight)
    assert not is_int8(model[1].weight)


class Around(nn.Module):
    """A program's own module around a model."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, ids: Tensor) -> Any:
        return self.inner(ids)


AROUND: dict[str, Any] = {
    "a module": Around,
    "torch.compile": lambda model: torch.compile(model, backend="eager"),
    "adapters": lambda model: get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"])),
}


@pytest.mark.parametrize("way", AROUND)
def test_a_model_inside_another_is_quantized_as_it_is_by_itself(way: str, tmp_path: Path) -> None:
    """It could not be saved, nor dequantized; its head for classes, and adapters, were put into 8 bits too."""
    alone, inner = (LlamaForSequenceClassification(tiny_llama().config) for _ in range(2))
    inner.load_state_dict(alone.state_dict())
    quantize_weights_(alone, ["up_proj"])
    around = AROUND[way](inner)
    assert len(quantize_weights_(around, ["up_proj"])) == IN_INT8 - 2
    assert len(layers_in_int8(around)) == IN_INT8 - 2
    adapters = [param for name, param in around.named_parameters() if "lora_" in name]
    assert len(adapters) == (4 if way == "adapters" else 0)
    assert not any(map(is_int8, adapters))
    ids = torch.arange(16).view(1, 16)
    assert torch.equal(around(ids).logits, alone(ids).logits)  # adapters begin with zeros
    for save in ("float", "int8") if way != "adapters" else ():
        inner.hf_quantizer.quantization_config.save = save
        inner.save_pretrained(tmp_path)
        again = load(tmp_path, None, AutoModelForSequenceClassification)
        assert len(layers_in_int8(again)) == (IN_INT8 - 2 if save == "int8" else 0)
        assert_same(values_of(again), values_of(alone))
    inner.dequantize()
    assert not layers_in_int8(around)
    assert torch.equal(around(ids).logits, alone(ids).logits)


def test_torchs_attention_keeps_its_output_layer() -> None:
    """Which it multiplies with by itself; a layer of torch's transformer computes alike in both of its ways."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, dropout=0.0)
    assert quantize_weights_(layer) == ["linear1", "linear2"]
    x = torch.randn(2, 5, 32)
    expected = layer(x)
    with torch.no_grad():
        torch.testing.assert_close(layer.eval()(x), expected)


# ---- what is refused


def test_a_part_of_a_model_is_not_saved_by_itself(tmp_path: Path) -> None:
    model: Any = tiny_llama()
    quantize_weights_(model)
    with pytest.raises(TypeError, match="Save a transformers model, all of it, by save_pretrained"):
        model.model.save_pretrained(tmp_path)


@pytest.mark.parametrize("way", ["set", "offload", "load"])
def test_accelerates_ways_to_set_weights_are_refused(way: str, tmp_path: Path) -> None:
    """They make a parameter of its class and values."""
    tiny_llama(seed=3).save_pretrained(tmp_path)
    model: Any = tiny_llama()
    quantize_weights_(model)
    name, before = "model.layers.0.mlp.up_proj.weight", values_of(model)
    ways = {
        "set": lambda: set_module_tensor_to_device(model, name, "cpu", value=torch.ones(256, 64)),
        "offload": lambda: cpu_offload(model, execution_device=torch.device("cpu")),
        "load": lambda: load_checkpoint_and_dispatch(model, tmp_path, device_map={"": "cpu"}),
    }
    with pytest.raises(TypeError, match=r"load by from_pretrained or load_state_dict, without offloading"):
        ways[way]()
    assert is_int8(model.get_parameter(name))
    assert torch.equal(model.get_parameter(name).dequantized(), before[name])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(folder: Path, tmp_path: Path, value: float) -> None:
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    state = {name: one.contiguous() for name, one in load(folder).state_dict().items()}
    state["model.layers.1.mlp.up_proj.weight"][3, 40] = value
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj\.weight has values that are not finite"):
        load(tmp_path, Int8Config())
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj\.weight has values that are not finite"):
        quantize_weights_(load(tmp_path))


def test_an_int8_checkpoint_is_checked_as_well(folder: Path, tmp_path: Path) -> None:
    model = load(folder, Int8Config(save="int8"))
    model.model.layers[0].self_attn.k_proj.weight.exponents[0, 0] = 255
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.k_proj\.weight has values that are not finite"):
        load(tmp_path)


def test_a_weight_of_another_shape_is_named(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"down_proj\.weight is 64×256 in the checkpoint and 64×224 in the model"):
        load(folder, Int8Config(), intermediate_size=224)


def test_float16_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"torch\.float16\. Load it with dtype=torch\.bfloat16"):
        load(folder, Int8Config(), dtype=torch.float16)
    with pytest.raises(ValueError, match=r"q_proj\.weight is of torch\.float16; bfloat16 and float32 can be"):
        quantize_weights_(tiny_llama().to(torch.float16))


@pytest.mark.parametrize("places", [{"model": 0, "lm_head": "disk"}, {"model": 0, "lm_head": "cpu"}])
def test_a_model_that_is_partly_elsewhere_is_refused(folder: Path, places: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"device_map puts it on 0, (cpu|disk)\): that is not possible\. Give a"):
        load(folder, Int8Config(), device_map=places)


MISTAKES: list[tuple[str, Any, type[Exception], str]] = [
    *(
        ("weight_bits", value, ValueError, rf"weight_bits has to be the whole number 8, but is {value!r}\. For 16,")
        for value in (4, 16, 8.0, True, "8", None)
    ),
    *(
        ("save", value, ValueError, r"save has to be one of 'float', 'int8', but is")
        for value in ("bf16", None, True, ["int8"], b"int8")
    ),
    *(
        ("modules_to_not_convert", value, TypeError, r"has to be a list of names of layers, but is")
        for value in ("lm_head", {"lm_head"}, [1], True, nn.Linear(1, 1))
    ),
    ("modules_to_not_convert", ["lm_head", ""], ValueError, "has an empty name, which every layer ends in"),
    ("modules_to_not_convert", ["["], ValueError, r"has '\[', which is no regular expression"),
    ("quant_method", "bitsandbytes", ValueError, r"is 'hf_galore_int8', but is 'bitsandbytes'\. Leave it out"),
]


@pytest.mark.parametrize(("field", "value", "error", "said"), MISTAKES)
def test_mistakes_in_the_config_are_said(field: str, value: Any, error: type[Exception], said: str) -> None:
    """When it is made, read from a `config.json`, or changed: `save` may be, later."""
    with pytest.raises(error, match=said):
        Int8Config(**{field: value})
    with pytest.raises(error, match=said):
        Int8Config.from_dict({"quant_method": METHOD, field: value})
    config = Int8Config()
    with pytest.raises(error, match=said):
        setattr(config, field, value)
    assert config.to_dict() == Int8Config().to_dict()


def test_what_the_config_and_the_conversion_take() -> None:
    given = Int8Config(8, ("up_proj",), "int8").to_dict()  # type: ignore[arg-type]  # a tuple is as good as a list
    assert given == {
        "quant_method": METHOD,
        "weight_bits": 8,
        "modules_to_not_convert": ["up_proj"],
        "save": "int8",
    }
    assert Int8Config.from_dict(given).to_dict() == given
    with pytest.raises(ValueError, match=r"has no skip\. It takes weight_bits, modules_to_not_convert and save"):
        Int8Config(skip=1)
    with pytest.raises(TypeError, match=r"takes a model, an nn.Module, but was given a dict"):
        quantize_weights_({})  # type: ignore[arg-type]
    model: Any = tiny_llama()
    quantize_weights_(model)
    for dtype in ("int8", "nothing", torch.int8):
        with pytest.raises(ValueError, match=rf"to {dtype}, which is no floating-point dtype"):
            model.dequantize(dtype)
    assert len(layers_in_int8(model)) == IN_INT8
    assert model.dequantize("float32").dtype == torch.float32


@pytest.mark.parametrize("name", ["c_attn", "layers.0"])
def test_a_name_that_is_of_no_layer_is_refused(folder: Path, name: str) -> None:
    """transformers takes the names of blocks in full."""
    with pytest.raises(ValueError, match=rf"modules_to_not_convert has '{name}', which matches no layer of the model"):
        load(folder, Int8Config(modules_to_not_convert=["lm_head", "embed_tokens", name]))


def test_a_model_that_is_quantized_otherwise_is_refused() -> None:
    model: Any = tiny_llama()
    model.hf_quantizer = type("Other", (), {"quantization_config": type("Config", (), {"quant_method": "bnb"})})()
    with pytest.raises(ValueError, match=r"quantized already, with bnb\. Load it without that"):
        quantize_weights_(model)


# ---- registering


def test_the_method_is_there_while_hf_galore_is_registered() -> None:
    hf_galore.register()
    assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] is Int8Config
    assert auto.AUTO_QUANTIZER_MAPPING[METHOD] is Int8Quantizer
    try:
        hf_galore.unregister()
        assert METHOD not in auto.AUTO_QUANTIZATION_CONFIG_MAPPING
        assert METHOD not in auto.AUTO_QUANTIZER_MAPPING
    finally:
        hf_galore.register()
        hf_galore.register()
        int8_quantizer.register_int8()
    assert auto.AUTO_QUANTIZER_MAPPING[METHOD] is Int8Quantizer


def test_what_transformers_does_unasked_is_as_it_was_when_this_was_written(folder: Path) -> None:
    """Private names that loading and saving rest on."""
    model = load(folder, Int8Config())
    assert isinstance(model._weight_conversions, list)
    assert isinstance(model, LlamaForCausalLM)
    assert hasattr(model, "_keep_in_fp32_modules")
    assert hasattr(model, "_keep_in_fp32_modules_strict")
