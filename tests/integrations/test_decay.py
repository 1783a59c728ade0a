"""Which parameters are decayed: transformers' own rule, asked without a Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, Trainer

from hf_galore.integrations.decay import decayed_names
from hf_galore.integrations.signatures import signature_of
from tests.support.helpers import make_trainer, tiny_llama


def test_transformers_is_as_we_need_it() -> None:
    signature = signature_of(Trainer.get_decay_parameter_names)
    assert signature == "(self, model)", f"Trainer.get_decay_parameter_names(self, model) is now {signature}"
    try:
        decayed_names(nn.Linear(2, 2))
    except AttributeError as error:
        pytest.fail(
            f"Trainer.get_decay_parameter_names makes use of its Trainer now, and is called without one: {error}"
        )


def gpt2() -> Any:
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=1, n_head=2))


@pytest.mark.parametrize("make", [tiny_llama, gpt2])
def test_names_are_those_of_a_trainer(make: type[nn.Module], tmp_path: Path) -> None:
    model = make()
    trainer = make_trainer(model, tmp_path, "adamw_torch", optim_target_modules=None, optim_args=None)
    names = decayed_names(model)
    assert names == set(trainer.get_decay_parameter_names(model))
    undecayed = {name for name, _ in model.named_parameters()} - names
    assert undecayed
    assert all(param.ndim == 1 for name, param in model.named_parameters() if name in undecayed)


def test_any_module_has_them() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2), nn.Linear(2, 2, bias=False))
    model.register_parameter("own", nn.Parameter(torch.zeros(1)))
    assert decayed_names(model) == {"0.weight", "2.weight", "own"}
