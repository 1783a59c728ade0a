"""What a config says of its model without weights: its matrices, how many positions it knows."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    RobertaConfig,
)

from hf_galore.errors import UserError
from hf_galore.recipes.model_checks import check_length, check_weight_files, model_on_meta

SMALL: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 32}


def made(config: Any, auto_class: Any = AutoModelForCausalLM) -> nn.Module:
    model = model_on_meta(config, auto_class)
    assert model is not None
    return model


# With the last position that each has a vector for.
LEARNED = {
    "GPT-2": (GPT2Config(n_layer=1, n_head=2, n_embd=16, n_positions=32), AutoModelForCausalLM, 32),
    "OPT": (OPTConfig(**SMALL, ffn_dim=16, max_position_embeddings=32), AutoModelForCausalLM, 32),
    "BERT": (BertConfig(**SMALL, max_position_embeddings=32), AutoModelForSequenceClassification, 32),
    "RoBERTa": (RobertaConfig(**SMALL, max_position_embeddings=34), AutoModelForSequenceClassification, 32),
}


@pytest.mark.parametrize(("config", "auto_class", "last"), LEARNED.values(), ids=list(LEARNED))
def test_more_positions_than_a_model_has_vectors_for(config: Any, auto_class: Any, last: int) -> None:
    model = made(config, auto_class)
    check_length(model, config, last)
    check_length(model, config, None)
    with pytest.raises(
        UserError, match=rf"^max_length {last + 1} is more than the {last} positions that the model has"
    ):
        check_length(model, config, last + 1)
    # That it is so, in the model itself.
    real = auto_class.from_config(config).eval()
    real(input_ids=torch.full((1, last), 5))
    with pytest.raises((IndexError, RuntimeError)):
        real(input_ids=torch.full((1, last + 1), 5))


def test_more_positions_than_a_model_was_trained_with(caplog: pytest.LogCaptureFixture) -> None:
    config = LlamaConfig(**SMALL, intermediate_size=16, max_position_embeddings=32)
    with caplog.at_level(logging.WARNING, logger="hf_galore"):
        check_length(made(config), config, 32)
        assert caplog.records == []
        check_length(made(config), config, 33)
    assert "max_length 33 is more than the 32 positions that the model was trained with" in caplog.text


def test_a_model_is_made_without_numbers_and_only_by_those_who_can() -> None:
    config = LlamaConfig(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64)
    model = model_on_meta(config, AutoModelForCausalLM, torch.bfloat16)
    assert model is not None
    assert {param.device.type for param in model.parameters()} == {"meta"}
    assert {param.dtype for param in model.parameters()} == {torch.bfloat16}
    assert model_on_meta(config) is None  # it names no class
    assert model_on_meta(LlamaConfig(architectures=["SomebodysForCausalLM"])) is None
    assert model_on_meta(RobertaConfig(**SMALL, architectures=["RobertaForMaskedLM"])) is not None
    assert model_on_meta(OPTConfig(**SMALL), AutoModelForSequenceClassification) is not None


def test_files_beside_the_weights_are_nobodys_business(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    (tmp_path / "optimizer.bin").touch()
    check_weight_files(str(tmp_path))
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"pytorch_model\.bin is cut off"):
        check_weight_files(str(tmp_path))


def test_weights_of_a_variant(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "model.fp16.safetensors")
    check_weight_files(str(tmp_path), "fp16")
    with pytest.raises(UserError, match=r"holds no model\.safetensors"):
        check_weight_files(str(tmp_path))
