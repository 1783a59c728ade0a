"""Private parts of a Trainer: where plans and recorded runs look for them, and what comes by there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import MixtralConfig, MixtralForCausalLM, Trainer, TrainerCallback

from hf_galore.integrations.trainer_parts import (
    TrainerParts,
    micro_batches,
    moved_parts,
    state_with_host_stacks,
    wrapped_methods,
)
from tests.integrations.test_trainer import make_sft_trainer
from tests.support.helpers import Counting, arguments, assert_identical, make_trainer, tiny_llama


def test_transformers_is_as_we_need_it() -> None:
    """Fails first, and by name, when a new transformers moves something."""
    assert moved_parts() == []


def test_a_part_that_is_gone_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(Trainer, "_get_output_dir")
    assert moved_parts() == ["Trainer._get_output_dir(self, trial) is gone"]


def test_trl_counts_tokens_where_we_look(tmp_path: Path) -> None:
    trainer = make_sft_trainer(tiny_llama(), tmp_path, "galore_adamw", max_steps=2)
    trainer.train()
    counted = getattr(trainer, "_total_train_tokens", None)
    assert counted, f"SFTTrainer._total_train_tokens is {counted!r} after two steps"
    assert trainer.state.log_history[-2]["num_tokens"] == counted


def test_wrapped_methods_are_what_the_trainer_calls(tmp_path: Path) -> None:
    trainer = make_trainer(
        tiny_llama(), tmp_path, "adamw_torch", optim_target_modules=None, optim_args=None, max_steps=2,
        eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2, gradient_accumulation_steps=2,
    )  # fmt: skip
    called: list[str] = []

    def counting(name: str) -> Callable[[Any], Any]:
        def wrap(method: Any) -> Any:
            def call(*args: Any, **kwargs: Any) -> Any:
                called.append(name)
                return method(*args, **kwargs)

            return call

        return wrap

    before = dict(vars(trainer))
    names = ("training_step", "evaluate", "save_checkpoint")
    with wrapped_methods(trainer, **{name: counting(name) for name in names}):
        trainer.train()
    assert called == ["training_step"] * 4 + ["evaluate", "save_checkpoint"]
    assert not set(vars(trainer)) - set(before) & {"training_step", "evaluate", "_save_checkpoint"}
    assert (tmp_path / "checkpoint-2").is_dir()


def test_micro_batches_of_the_last_step_are_those_that_are_left(tmp_path: Path) -> None:
    found: list[int] = []

    class Look(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            found.append(micro_batches(trainer))

    args = arguments(
        tmp_path, "adamw_torch", optim_target_modules=None, optim_args=None, max_steps=-1, num_train_epochs=1,
        gradient_accumulation_steps=3,
    )  # fmt: skip
    trainer = Trainer(model=tiny_llama(), args=args, train_dataset=Counting(16), callbacks=[Look()])
    trainer.train()
    assert found == [3, 1]  # 16 rows are 4 batches


class Noting(TrainerParts, Trainer):
    """Notes what is in the folder when a checkpoint begins."""

    seen: list[tuple[Path, bool]]

    def before_checkpoint(self, folder: Path) -> None:
        self.seen.append((folder, folder.exists()))


def test_before_a_checkpoint_its_folder_is_named(tmp_path: Path) -> None:
    saved: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    trainer = make_trainer(tiny_llama(), tmp_path, "galore_adamw", Noting, **saved)
    assert isinstance(trainer, Noting)
    trainer.seen = []
    trainer.train()
    assert trainer.seen == [(tmp_path / f"checkpoint-{step}", False) for step in (1, 2)]
    assert all(folder.is_dir() for folder, _ in trainer.seen)
    assert trainer.trained_tokens == 0  # no trainer of TRL's
    trainer.trained_tokens = 5
    assert trainer.trained_tokens == trainer._total_train_tokens == 5


def test_experts_are_copied_on_the_host_to_be_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what is written is what would be written without."""
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=4, tie_word_embeddings=True,
    )  # fmt: skip
    trainer = OwnParts(model=MixtralForCausalLM(config), args=arguments(tmp_path / "run", "adamw_torch"))
    assert state_with_host_stacks(trainer.model) is None  # which is on no card
    trainer.save_model(str(tmp_path / "plain"))
    monkeypatch.setattr("hf_galore.integrations.trainer_parts.is_on_card", lambda tensor: True)
    copied: list[torch.Size] = []

    def cpu(tensor: torch.Tensor) -> torch.Tensor:
        copied.append(tensor.shape)
        return tensor.clone()

    monkeypatch.setattr(torch.Tensor, "cpu", cpu)
    trainer.save_model(str(tmp_path / "by_host"))
    assert sorted(copied) == [(4, 32, 48), (4, 96, 32)]
    plain, by_host = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "by_host"))
    assert any("experts.3.w1.weight" in name for name in plain), "experts are not written as on the Hub"
    assert_identical(by_host, plain)


class OwnParts(TrainerParts, Trainer):  # type: ignore[misc, unused-ignore]
    """A Trainer with these parts."""
