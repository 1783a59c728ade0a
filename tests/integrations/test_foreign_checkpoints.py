"""Resuming from what another optimizer wrote: who it was, and what can be done with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

import hf_galore
from hf_galore.optim.groups import check_plain_state
from tests.support.helpers import OPTIM_ARGS, hooks_on, logged, make_trainer, tiny_llama, train

SAVED: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2}


@pytest.fixture(scope="module")
def built_in(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of transformers' own `galore_adamw` and of its layerwise one."""
    folder = tmp_path_factory.mktemp("built_in")
    hf_galore.unregister()
    try:
        for name in ("galore_adamw", "galore_adamw_layerwise"):
            train(tiny_llama(), folder / name, name, max_steps=2, optim_args="rank=16", **SAVED)
    finally:
        hf_galore.register()
    return folder


@pytest.mark.parametrize("name", ["galore_adamw", "galore_adamw_8bit", "galore_adamw_layerwise"])
def test_a_checkpoint_of_the_built_in_says_who_wrote_it(name: str, built_in: Path, tmp_path: Path) -> None:
    """Before: `UnpicklingError`, with the advice to load it unsafely."""
    checkpoint = built_in / "galore_adamw" / "checkpoint-2"
    model = tiny_llama()
    trainer = make_trainer(model, tmp_path, name)
    with pytest.raises(ValueError, match="written by the GaLore of galore_torch") as error:
        trainer.train(resume_from_checkpoint=str(checkpoint))
    message = str(error.value)
    assert message.startswith(str(checkpoint))
    assert "from_pretrained" in message
    assert "weights_only" not in message
    assert error.value.__suppress_context__, "the advice to load it unsafely is not shown"
    assert hooks_on(model) == 0


def test_its_weights_can_be_trained_on_as_the_message_says(built_in: Path, tmp_path: Path) -> None:
    model: nn.Module = LlamaForCausalLM.from_pretrained(built_in / "galore_adamw" / "checkpoint-2")
    assert len(logged(train(model, tmp_path, "galore_adamw", max_steps=2), "loss")) == 2


def test_state_of_the_built_in_layerwise_is_told_apart(built_in: Path) -> None:
    state = torch.load(built_in / "galore_adamw_layerwise" / "checkpoint-2" / "optimizer.pt", weights_only=True)
    with pytest.raises(ValueError, match="layerwise optimizer of transformers"):
        check_plain_state(state)
    state = torch.load(built_in / "galore_adamw" / "checkpoint-2" / "optimizer.pt", weights_only=False)
    with pytest.raises(ValueError, match="galore_torch"):
        check_plain_state(state)


class Odd:
    """What an optimizer may keep in its state."""


def spoiled(folder: Path, **entries: Any) -> Path:
    """A checkpoint of ours with other things in its optimizer state."""
    train(tiny_llama(), folder, "galore_adamw", max_steps=2, **SAVED)
    file = folder / "checkpoint-2" / "optimizer.pt"
    state = torch.load(file, weights_only=True)
    state["state"][0].update(entries)
    torch.save(state, file)
    return file.parent


def test_a_checkpoint_with_other_objects_names_them(tmp_path: Path) -> None:
    checkpoint = spoiled(tmp_path, odd=Odd())
    with pytest.raises(
        ValueError, match=r"holds Python objects \(tests\.integrations\.test_foreign_checkpoints\.Odd\)"
    ):
        make_trainer(tiny_llama(), tmp_path, "galore_adamw").train(resume_from_checkpoint=str(checkpoint))


def test_other_optimizers_hear_what_they_heard(tmp_path: Path) -> None:
    import pickle

    checkpoint = spoiled(tmp_path, odd=Odd())
    trainer = make_trainer(tiny_llama(), tmp_path, "adamw_torch", optim_target_modules=None, optim_args=None)
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        trainer.train(resume_from_checkpoint=str(checkpoint))


def test_a_broken_scheduler_file_is_not_blamed_on_the_optimizer(tmp_path: Path) -> None:
    import pickle

    checkpoint = spoiled(tmp_path)
    torch.save({"odd": Odd()}, checkpoint / "scheduler.pt")
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        make_trainer(tiny_llama(), tmp_path, "galore_adamw").train(resume_from_checkpoint=str(checkpoint))


def test_an_ordinary_checkpoint_resumes(tmp_path: Path) -> None:
    checkpoint = spoiled(tmp_path)
    trainer = make_trainer(tiny_llama(1), tmp_path, "galore_adamw", max_steps=4, optim_args=OPTIM_ARGS)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert trainer.state.global_step == 4
