"""Optimizers that the Trainer has not made by their name: ready ones, classes with keywords, those of a subclass."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Trainer

from hf_galore import GaLoreAdamW
from hf_galore.integrations.llamafactory import OWN_OPTIMIZERS
from tests.support.helpers import (
    EXACT_ARGS,
    NAMES,
    RANK,
    Counting,
    arguments,
    assert_identical,
    hooks_on,
    logged,
    make_trainer,
    optimizer_of,
    snapshot,
    tiny_llama,
    train,
)
from tests.support.interrupted import AfterTwoSteps, train_until


class OwnGroups(Trainer):
    """Makes its own groups, as many do, without calling `super().create_optimizer()`."""

    optimizer: Any

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            assert self.model is not None
            cls, keywords = Trainer.get_optimizer_cls_and_kwargs(self.args, self.model)
            params = [param for param in self.model.parameters() if param.requires_grad]
            self.optimizer = cls([{"params": params, "weight_decay": 0.1}], **keywords)
        made: torch.optim.Optimizer = self.optimizer
        return made


class DecaysAll(Trainer):
    """The same groups, made by the Trainer."""

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        return [name for name, _ in model.named_parameters()]


# ---- a subclass that makes its own groups


@pytest.mark.parametrize("name", NAMES)
def test_own_groups_train_as_the_trainers(name: str, tmp_path: Path) -> None:
    """Before: no figures were logged, and hooks stayed on the model."""
    runs = []
    for cls in (DecaysAll, OwnGroups):
        model = tiny_llama()
        trainer = train(model, tmp_path, name, cls, weight_decay=0.1, max_steps=5)
        assert logged(trainer, "galore/targets") == [14]
        assert logged(trainer, "galore/refreshes")[0] == 14
        assert hooks_on(model) == 0
        runs.append((snapshot(model), logged(trainer, "loss")))
    assert_identical(runs[1], runs[0])


def test_a_later_optimizer_finds_all_gradients(tmp_path: Path) -> None:
    """Before: 14 of 21 tensors did not move."""
    model = tiny_llama()
    trainer = train(model, tmp_path, "galore_adamw_layerwise", OwnGroups, max_steps=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    before = snapshot(model)
    tokens = torch.arange(32).reshape(2, 16)
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    assert [key for key, param in model.named_parameters() if torch.equal(param, before[key])] == []
    assert trainer.optimizer is not None  # alive


@pytest.mark.parametrize("interrupted", [False, True], ids=["finished", "interrupted"])
@pytest.mark.parametrize("cls", [DecaysAll, OwnGroups])
def test_training_again_puts_the_hooks_back(cls: type[Trainer], interrupted: bool, tmp_path: Path) -> None:
    ends = []
    for name in ("galore_adamw", "galore_adamw_layerwise"):
        model = tiny_llama()
        trainer = make_trainer(model, tmp_path, name, cls, optim_args=EXACT_ARGS, weight_decay=0.1, max_steps=4)
        if interrupted:
            train_until(AfterTwoSteps(), trainer)
        else:
            trainer.train()
        assert hooks_on(model) == 0
        trainer.train()
        assert hooks_on(model) == 0
        ends.append((snapshot(model), logged(trainer, "loss"), logged(trainer, "grad_norm")))
    assert_identical(ends[1][:2], ends[0][:2])
    assert ends[1][2] == pytest.approx(ends[0][2], rel=1e-5)


def test_own_groups_resume(tmp_path: Path) -> None:
    saved: dict[str, Any] = {"save_strategy": "steps", "save_steps": 3}
    whole, begun = tiny_llama(), tiny_llama()
    train(whole, tmp_path / "whole", "galore_adamw_layerwise", OwnGroups, max_steps=6, **saved)
    trainer = make_trainer(begun, tmp_path / "whole", "galore_adamw_layerwise", OwnGroups, max_steps=6, **saved)
    trainer.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert_identical(snapshot(begun), snapshot(whole))
    assert hooks_on(begun) == 0


def test_a_subclass_of_another_optimizer_is_free_of_an_earlier_ones_hooks(tmp_path: Path) -> None:
    """Here the hooks are on because the first trainer has not begun."""
    model, fresh = tiny_llama(), tiny_llama()
    earlier = make_trainer(model, tmp_path, "galore_adamw_layerwise")
    earlier.create_optimizer()

    class OwnAdamW(Trainer):
        optimizer: Any

        def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
            if self.optimizer is None:
                assert self.model is not None
                self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
            made: torch.optim.Optimizer = self.optimizer
            return made

    plain: dict[str, Any] = {"optim_target_modules": None, "optim_args": None, "max_steps": 2}
    for trained in (model, fresh):
        train(trained, tmp_path, "adamw_torch", OwnAdamW, **plain)
    assert_identical(snapshot(model), snapshot(fresh))
    assert earlier.optimizer is not None


@pytest.mark.parametrize("cls", [DecaysAll, OwnGroups])
def test_models_that_are_made_anew_for_each_run_are_free_of_hooks(cls: type[Trainer], tmp_path: Path) -> None:
    """As in a hyperparameter search, whose trials are runs of one trainer."""
    models: list[nn.Module] = []

    def make() -> nn.Module:
        models.append(tiny_llama())
        return models[-1]

    args = arguments(tmp_path, "galore_adamw_layerwise", max_steps=2)
    trainer = cls(model_init=make, args=args, train_dataset=Counting())
    for _ in range(2):
        trainer.train()
        assert logged(trainer, "galore/targets") == [14]
    assert len(models) == 3
    assert [hooks_on(model) for model in models] == [0, 0, 0]
    assert_identical(snapshot(models[1]), snapshot(models[2]))


# ---- classes with keywords, and ready optimizers


def given_class(model: nn.Module, keywords: dict[str, Any]) -> dict[str, Any]:
    return {"optimizer_cls_and_kwargs": (GaLoreAdamW, keywords)}


def given_optimizer(model: nn.Module, keywords: dict[str, Any]) -> dict[str, Any]:
    return {"optimizers": (GaLoreAdamW(model.parameters(), **keywords), None)}


def trainer_with(model: nn.Module, output_dir: Path, optim: str, given: dict[str, Any], **overrides: Any) -> Trainer:
    args = arguments(output_dir, optim, **{"max_steps": 2, **overrides})
    return Trainer(model=model, args=args, train_dataset=Counting(), **given)


@pytest.mark.parametrize("optim", ["galore_adamw", "adamw_torch"])
@pytest.mark.parametrize("give", [given_class, given_optimizer])
def test_targets_that_nobody_reads_are_an_error(give: Any, optim: str, tmp_path: Path) -> None:
    """Before: AdamW, with 0 targets."""
    model = tiny_llama()
    before = snapshot(model)
    trainer = trainer_with(model, tmp_path, optim, give(model, {"lr": 1e-3}))
    with pytest.raises(ValueError, match=r"optim_target_modules is .* projects nothing") as error:
        trainer.train()
    assert [word for word in ("optim='galore_adamw'", "param_options") if word not in str(error.value)] == []
    assert_identical(snapshot(model), before)


@pytest.mark.parametrize("give", [given_class, given_optimizer])
def test_a_refused_optimizer_leaves_no_hooks(give: Any, tmp_path: Path) -> None:
    model = tiny_llama()
    keywords = {"lr": 1e-3, "layerwise": True, "module": model}
    trainer = trainer_with(model, tmp_path, "galore_adamw", give(model, keywords))
    with pytest.raises(ValueError, match="projects nothing"):
        trainer.create_optimizer()
    assert hooks_on(model) == 0


@pytest.mark.parametrize("layerwise", [False, True])
@pytest.mark.parametrize("give", [given_class, given_optimizer])
def test_targets_in_param_options_train(
    give: Any, layerwise: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_llama()
    mlp = {module.weight: {"rank": RANK} for name, module in model.named_modules() if name.endswith("_proj")}
    keywords = {"lr": 1e-3, "param_options": mlp, "layerwise": layerwise, "module": model}
    trainer = trainer_with(model, tmp_path, "galore_adamw", give(model, keywords), optim_args=None)
    trainer.train()
    optimizer: Any = optimizer_of(trainer)
    assert optimizer.memory().targets == 14
    assert logged(trainer, "galore/targets") == [14]
    assert hooks_on(model) == 0
    assert not caplog.records


@pytest.mark.parametrize("optim_args", [None, f"rank={RANK}", "rank=8"])
def test_arguments_that_a_ready_optimizer_does_not_have_are_said(
    optim_args: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_llama()
    options = {model.lm_head.weight: {"rank": RANK}}
    given = given_optimizer(model, {"param_options": options})
    trainer = trainer_with(model, tmp_path, "galore_adamw", given, optim_args=optim_args)
    with caplog.at_level(logging.WARNING, "hf_galore"):
        trainer.train()
    assert len([record for record in caplog.records if "trains as it was made" in record.getMessage()]) == (
        optim_args == "rank=8"
    )


# ---- another optimizer than `optim` asks for


class MakesMuon(Trainer):
    """As LLaMA-Factory's trainers, which make an optimizer by settings of their own, or else let the Trainer do it."""

    optimizer: Any

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        if self.optimizer is None:
            assert self.model is not None
            self.optimizer = torch.optim.Muon([param for param in self.model.parameters() if param.ndim == 2])
        return super().create_optimizer(*args, **kwargs)


def test_another_optimizer_than_asked_for_is_an_error_each_time(tmp_path: Path) -> None:
    """Before: it trained, and said nothing."""
    model = tiny_llama()
    before = snapshot(model)
    trainer = make_trainer(model, tmp_path, "galore_adamw_layerwise", MakesMuon, max_steps=2)
    for _ in range(2):
        with pytest.raises(
            ValueError,
            match=r"^optim='galore_adamw_layerwise' was asked for, but MakesMuon\.create_optimizer .* Muon\.",
        ):
            trainer.train()
    assert_identical(snapshot(model), before)
    train(model, tmp_path, "adamw_torch", MakesMuon, max_steps=2, optim_target_modules=None, optim_args=None)


@pytest.mark.parametrize("setting", OWN_OPTIMIZERS)
def test_the_setting_of_llamafactory_that_makes_it_is_named(
    setting: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MakesMuon, "__module__", "llamafactory.train.sft.trainer")
    trainer: Any = make_trainer(tiny_llama(), tmp_path, "galore_adamw", MakesMuon, max_steps=2)
    unset = dict.fromkeys(OWN_OPTIMIZERS, False) | {"loraplus_lr_ratio": None}
    trainer.finetuning_args = SimpleNamespace(**unset | {setting: 16.0 if setting == "loraplus_lr_ratio" else True})
    with pytest.raises(ValueError, match=rf" Muon\. LLaMA-Factory does so for {setting}\. Leave that out; or, "):
        trainer.train()


def test_a_class_without_a_model_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = arguments(tmp_path, "galore_adamw")
    with pytest.raises(
        ValueError, match=r"needs the model.* Call Trainer\.get_optimizer_cls_and_kwargs\(args, model\)\.$"
    ):
        Trainer.get_optimizer_cls_and_kwargs(args)
    monkeypatch.setattr(type(args), "__module__", "llamafactory.hparams.training_args")
    with pytest.raises(ValueError, match=r"LLaMA-Factory asks without it .*\(use_galore, .*use_muon\); or, to train"):
        Trainer.get_optimizer_cls_and_kwargs(args)


@pytest.mark.parametrize("ready", [False, True])
def test_another_optimizer_that_was_given_trains_and_is_said(
    ready: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ends = []
    for optim in ("galore_adamw", "adamw_torch"):
        model = tiny_llama()
        pair = (torch.optim.AdamW, {"lr": 1e-2})
        given: dict[str, Any] = {"optimizer_cls_and_kwargs": pair}
        if ready:
            given = {"optimizers": (torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0), None)}
        unused = {} if optim == "galore_adamw" else {"optim_args": None, "optim_target_modules": None}
        with caplog.at_level(logging.WARNING, "hf_galore"):
            trainer_with(model, tmp_path, optim, given, **unused).train()
        ends.append(snapshot(model))
    assert [record.getMessage() for record in caplog.records] == [
        "optim='galore_adamw' is not used: this Trainer was given an optimizer, and trains with that AdamW."
    ]
    assert_identical(ends[0], ends[1])


def test_what_the_trainer_itself_returns_trains(tmp_path: Path) -> None:
    """`get_optimizer_cls_and_kwargs` reads the targets, so that they are not asked for in vain."""
    runs = []
    for given in (False, True):
        model = tiny_llama()
        args = arguments(tmp_path, "galore_adamw_layerwise", max_steps=3)
        pair = Trainer.get_optimizer_cls_and_kwargs(args, model)
        trainer = trainer_with(
            model, tmp_path, "galore_adamw_layerwise", {"optimizer_cls_and_kwargs": pair} if given else {}, max_steps=3
        )
        trainer.train()
        runs.append(snapshot(model))
    assert_identical(runs[1], runs[0])


def test_a_ready_optimizer_with_hooks_is_refused_where_hooks_are(tmp_path: Path) -> None:
    """Before: only where the Trainer makes it by its name."""
    model = tiny_llama()
    options = {model.lm_head.weight: {"rank": RANK}}
    given = given_optimizer(model, {"param_options": options, "layerwise": True, "module": model})
    trainer = trainer_with(model, tmp_path, "adamw_torch", given, optim_target_modules=None, optim_args=None)
    trainer.args.fp16 = True  # the constructor would refuse it on a CPU
    with pytest.raises(ValueError, match=r"GaLoreAdamW with layerwise=True .* does not work with fp16"):
        trainer.train()
    assert hooks_on(model) == 0
