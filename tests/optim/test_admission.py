"""Parameters that GaLore cannot train are refused by name; those that only look like them are not."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from hf_galore import GaLoreAdafactor, GaLoreAdamW, GaLoreAdamW8bit
from hf_galore.optim.admission import check_parameters
from tests.support.helpers import Counting, arguments, hooks_on, make_trainer, tiny_llama, train

# ---- the function


def check(*tensors: Tensor) -> None:
    check_parameters([(name, nn.Parameter(tensor)) for name, tensor in zip("ab", tensors, strict=False)])


BUFFER = torch.zeros(64, 64)
OVERLAPPING = {
    "the same": (BUFFER, BUFFER),
    "one row": (BUFFER[:33], BUFFER[32:]),
    "one column": (BUFFER[:, :33], BUFFER[:, 32:]),
    "transposed": (BUFFER, BUFFER.T),
    "a row and a column": (BUFFER[3], BUFFER[:, 4]),
    "of another type": (BUFFER, BUFFER.view(torch.bfloat16)),
}
APART = {
    "rows": (BUFFER[:32], BUFFER[32:]),
    "columns": (BUFFER[:, :32], BUFFER[:, 32:]),
    "every other": (BUFFER.view(-1)[::2], BUFFER.view(-1)[1::2]),
    "empty": (BUFFER[:0], BUFFER),
    "copies": (BUFFER, BUFFER.clone()),
}


@pytest.mark.parametrize("pair", OVERLAPPING.values(), ids=list(OVERLAPPING))
def test_two_parameters_in_the_same_memory(pair: tuple[Tensor, Tensor]) -> None:
    with pytest.raises(ValueError, match=r"(a and b|b and a) are two parameters in the same memory.*\.clone\(\)"):
        check(*pair)


@pytest.mark.parametrize("pair", APART.values(), ids=list(APART))
def test_parts_of_one_buffer_may_be_parameters(pair: tuple[Tensor, Tensor]) -> None:
    check(*pair)


def test_a_large_one_around_two_small_ones_is_seen() -> None:
    named = [("a", BUFFER[:1]), ("whole", BUFFER), ("b", BUFFER[40:])]
    with pytest.raises(ValueError, match="same memory"):
        check_parameters([(name, nn.Parameter(tensor)) for name, tensor in named])


def test_one_parameter_under_two_names_is_one() -> None:
    shared = nn.Parameter(BUFFER)
    check_parameters([("a", shared), ("b", shared)])


def test_what_is_frozen_is_passed_over() -> None:
    frozen = [BUFFER, BUFFER, torch.zeros(3, dtype=torch.complex64), torch.zeros(3, device="meta")]
    named = [(str(i), nn.Parameter(tensor, requires_grad=False)) for i, tensor in enumerate(frozen)]
    check_parameters([*named, ("trained", nn.Parameter(BUFFER))])


def test_all_on_meta_is_for_counting_only() -> None:
    with torch.device("meta"):
        model = tiny_llama()
    check_parameters(model.named_parameters(), model)
    with pytest.raises(ValueError, match=r"On the meta device, .*: model\.embed_tokens\.weight and 20 other"):
        check_parameters(model.named_parameters(), model, on_meta=False)
    model.lm_head = nn.Linear(4, 4)
    with pytest.raises(ValueError, match="On the meta device"):
        check_parameters(model.named_parameters(), model)


def test_fakes_pass() -> None:
    """A plan trains with them, and they have no address."""
    with FakeTensorMode():
        model = tiny_llama()
    check_parameters(model.named_parameters(), model, on_meta=False)


def test_tied_weights_and_ordinary_models_pass() -> None:
    for tie in (False, True):
        model = tiny_llama(tie_word_embeddings=tie)
        check_parameters(model.named_parameters(remove_duplicate=False), model, on_meta=False)


# ---- under a Trainer


def complex_parameter(model: Any) -> str:
    model.phase = nn.Parameter(torch.zeros(4, dtype=torch.complex64))
    return "phase is torch.complex64"


def offloaded_layer(model: Any) -> str:
    model.model.layers[1].mlp.to("meta")
    return "On the meta device, so that there is nothing to train: model.layers.1.mlp.gate_proj.weight and 2 other"


def same_memory(model: Any) -> str:
    first, second = (layer.mlp.up_proj.weight for layer in model.model.layers)
    second.data = first.data
    names = " and ".join(f"model.layers.{i}.mlp.up_proj.weight" for i in (0, 1))
    return f"{names} are two parameters in the same memory"


def sparse_embedding(model: Any) -> str:
    model.model.embed_tokens.sparse = True
    return "model.embed_tokens is an embedding with sparse=True"


SPOILED = [complex_parameter, offloaded_layer, same_memory, sparse_embedding]


@pytest.mark.parametrize("name", ["galore_adamw", "galore_adamw_8bit", "galore_adamw_layerwise", "galore_adafactor"])
@pytest.mark.parametrize("spoil", SPOILED)
def test_refused_before_the_first_step(spoil: Any, name: str, tmp_path: Path) -> None:
    """Before: trained wrongly, or a raw error in some step."""
    model = tiny_llama()
    trainer = make_trainer(model, tmp_path, name)
    words = spoil(model)  # not before: the Trainer would move it to the device, which an offloaded model does not allow
    with pytest.raises(ValueError, match=re.escape(words)):
        trainer.train()
    assert hooks_on(model) == 0


@pytest.mark.parametrize("spoil", [same_memory, sparse_embedding])
def test_a_ready_optimizer_is_refused_too(spoil: Any, tmp_path: Path) -> None:
    from transformers import Trainer

    model = tiny_llama()
    optimizer = GaLoreAdamW([{"params": model.lm_head.parameters(), "rank": 8}, {"params": model.model.parameters()}])
    words = spoil(model)
    args = arguments(tmp_path, "adamw_torch", optim_target_modules=None, optim_args=None)
    trainer = Trainer(model=model, args=args, train_dataset=Counting(), optimizers=(optimizer, None))
    with pytest.raises(ValueError, match=re.escape(words)):
        trainer.train()


def test_a_frozen_sparse_embedding_trains(tmp_path: Path) -> None:
    model = tiny_llama()
    sparse_embedding(model)
    model.model.embed_tokens.requires_grad_(False)
    train(model, tmp_path, "galore_adamw_layerwise", max_steps=1)


def test_other_optimizers_are_not_looked_at(tmp_path: Path) -> None:
    model = tiny_llama()
    same_memory(model)
    train(model, tmp_path, "adamw_torch", max_steps=1, optim_target_modules=None, optim_args=None)


# ---- what is said


@pytest.mark.parametrize("cls", [GaLoreAdamW, GaLoreAdamW8bit, GaLoreAdafactor])
def test_an_optimizer_that_projects_nothing_says_so(cls: Any, caplog: pytest.LogCaptureFixture) -> None:
    """As a program makes one that is told the class, by an option of its own."""
    net = nn.Linear(64, 64)
    cls(net.parameters(), lr=1e-3)
    (said,) = (record.getMessage() for record in caplog.records)
    assert said.startswith(f"{cls.__name__} projects nothing")
    assert "make_optimizer" in said
    caplog.clear()
    cls([{"params": [net.bias]}, {"params": [net.weight], "rank": 8}], lr=1e-3)
    cls(net.parameters(), lr=1e-3, param_options={net.weight: {"rank": 8}})
    assert not caplog.records
