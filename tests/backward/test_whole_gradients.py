"""Layerwise updates that need the gradient itself: a transient of one layer, and what would keep it is refused."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import GradientState
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from hf_galore import GaLoreAdafactor, GaLoreAdamW, GaLoreAdamW8bit
from hf_galore.backward.gradient import UsedGradient
from hf_galore.backward.linear import ProjectedLinear
from hf_galore.lowrank.residual import Term
from hf_galore.optim import residual, scaled, whole_muon
from hf_galore.optim.optimizer import GaLoreOptimizer
from hf_galore.recipes.checks import galore_config
from tests.backward.test_layerwise import (
    CalledTwice,
    Checkpointed,
    CheckpointedReentrant,
    Net,
    SharedWeight,
    batches,
    loss_of,
    ordinary_step,
)
from tests.optim.test_residual import OPTIONS
from tests.support.helpers import arguments, make_trainer, tiny_llama


@pytest.fixture(autouse=True)
def _closed_windows() -> Iterator[None]:
    GradientState()._set_sync_gradients(True)
    yield
    GradientState()._set_sync_gradients(True)


class Experts(Net):
    """With a stack of matrices, one of which is used once more."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Parameter(torch.randn(3, 8, 12) / 4)

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        y = torch.bmm(x.expand(3, -1, -1), self.experts.mT).sum(0)
        return x + y @ self.experts[1]


def made(net: nn.Module, option: str, cls: type[Any] = GaLoreAdamW, **options: Any) -> GaLoreOptimizer:
    group = {"rank": 3, "update_proj_gap": 4, "scale": 0.5, **OPTIONS[option]}
    targets = {param: group for name, param in net.named_parameters() if param.ndim > 1}
    optimizer = cls(net.parameters(), lr=1e-2, weight_decay=0.1, param_options=targets, module=net, **options)
    assert isinstance(optimizer, GaLoreOptimizer)
    return optimizer


def weights_after(kind: type[Net], option: str, cls: type[Any], **options: Any) -> dict[str, Tensor]:
    torch.manual_seed(0)
    optimizer = made(net := kind(), option, cls, **options)
    for batch in batches(9):
        ordinary_step(net, optimizer, batch)
    return {name: param.detach() for name, param in net.named_parameters()}


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("kind", [Net, CalledTwice, SharedWeight, Checkpointed, Experts])
def test_layerwise_is_plain(option: str, kind: type[Net]) -> None:
    plain, layerwise = (weights_after(kind, option, GaLoreAdamW, layerwise=way) for way in (False, True))
    for name, weight in plain.items():
        assert torch.equal(weight, layerwise[name]), name


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("cls", [GaLoreAdamW8bit, GaLoreAdafactor])
def test_layerwise_is_plain_with_every_optimizer(option: str, cls: type[Any]) -> None:
    plain, layerwise = (weights_after(Net, option, cls, layerwise=way) for way in (False, True))
    for name, weight in plain.items():
        assert torch.equal(weight, layerwise[name]), name


@pytest.mark.parametrize("option", OPTIONS)
def test_no_two_gradients_are_alive_at_a_time(option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the term that is added takes the place of the gradient."""
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(16, 16, bias=False) for _ in range(4)))
    optimizer = made(net, option, layerwise=True)
    weights, alive = {id(param) for param in net.parameters()}, []

    def look(original: Any) -> Any:
        def counted(*args: Any, **kwargs: Any) -> Any:
            made = original(*args, **kwargs)
            storages = {
                tensor.untyped_storage().data_ptr()
                for tensor in gc.get_objects()
                if type(tensor) in (Tensor, nn.Parameter) and tensor.shape == (16, 16) and id(tensor) not in weights
            }
            kept = [state["residual_momentum"] for state in optimizer.state.values() if "residual_momentum" in state]
            alive.append(len(storages - {one.untyped_storage().data_ptr() for one in (*net.parameters(), *kept)}))
            return made

        return counted

    # What comes last before the weight moves.
    for module in (residual, scaled, whole_muon):
        monkeypatch.setattr(module, "Term", look(Term))
    for batch in torch.randn(3, 20, 16):
        net(batch).square().mean().backward()
        for param in net.parameters():
            assert isinstance(param.grad, UsedGradient)
        optimizer.step()
        optimizer.zero_grad()
    assert alive == 12 * [1]


def test_other_targets_keep_their_projected_backward() -> None:
    layers = [nn.Linear(16, 16), nn.Linear(16, 16)]
    net, weights = nn.Sequential(*layers), [layer.weight for layer in layers]
    groups = [
        {"params": [weights[0]], "rank": 4},
        {"params": [weights[1]], "rank": 4, "residual": "fira"},
        {"params": [layer.bias for layer in layers]},
    ]
    optimizer = GaLoreAdamW(groups, lr=1e-2, module=net, layerwise=True)
    assert [isinstance(layer, ProjectedLinear) for layer in net] == [True, False]
    before = [weight.detach().clone() for weight in weights]
    net(torch.randn(5, 16)).square().mean().backward()
    assert not any(torch.equal(weight, old) for weight, old in zip(weights, before, strict=True))
    optimizer.step()
    # Where all targets need gradients there is no projected backward.
    optimizer = GaLoreAdamW(groups[1:], lr=1e-2, module=net, layerwise=True)
    assert optimizer.hooks is not None
    assert not optimizer.hooks.projected_backward


@pytest.mark.parametrize("option", OPTIONS)
def test_the_norm_is_that_of_the_gradient(option: str) -> None:
    norms = []
    for layerwise in (False, True):
        torch.manual_seed(0)
        optimizer = made(net := Net(), option, layerwise=layerwise)
        loss_of(net, batches(1)[0]).backward()
        norm = optimizer.grad_norm()
        assert norm is not None
        norms.append(norm.item())
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)


# ---- what is refused


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"layerwise": True, "hold_gradients": True}, "hold_gradients=True holds gradients until the step"),
        ({"projected_backward": True}, "projected_backward=True never builds"),
        ({"layerwise": True, "projected_backward": True}, "projected_backward=True never builds"),
        ({"exchange": "low_rank"}, "exchange='low_rank' reduces low-rank ones only"),
        ({"layerwise": True, "exchange": "low_rank"}, "exchange='low_rank' reduces low-rank ones only"),
    ],
)
@pytest.mark.parametrize("option", ["fira", "tensor"])
def test_what_has_no_gradients_or_keeps_them_is_refused(option: str, options: dict[str, Any], words: str) -> None:
    net = Net()
    name = next(f"{key}={value}" for key, value in OPTIONS[option].items() if key in ("residual", "scaling"))
    with pytest.raises(ValueError, match=words) as refused:
        made(net, option, **options)
    assert name in str(refused.value)
    assert not any(isinstance(module, ProjectedLinear) for module in net.modules())


def test_holding_gradients_later_is_refused() -> None:
    optimizer = made(Net(), "fira", layerwise=True)
    assert optimizer.hooks is not None
    with pytest.raises(ValueError, match=r"residual=fira of enter\.weight needs them whole"):
        optimizer.hooks.hold_gradients = True
    assert not optimizer.hooks.hold_gradients


@pytest.mark.parametrize(
    "options", [{"layerwise": True, "hold_gradients": True}, {"projected_backward": True}, {"exchange": "low_rank"}]
)
def test_a_group_that_comes_later_is_refused(options: dict[str, Any]) -> None:
    net = Net()
    optimizer = GaLoreAdamW([{"params": [net.down.weight], "rank": 3}], lr=1e-2, module=net, **options)
    with pytest.raises(ValueError, match=r"scaling=channel of up\.weight needs"):
        optimizer.add_param_group({"params": [net.up.weight], "rank": 3, "scaling": "channel"})
    assert len(optimizer.param_groups) == len(optimizer.targets()) == 1
    ordinary_step(net, optimizer, batches(1)[0])


@pytest.mark.parametrize("option", [{"gradient_bits": 8}, {"norm_probes": 0}], ids=str)
def test_what_is_for_held_low_rank_gradients_is_refused(option: dict[str, int]) -> None:
    net = nn.Linear(16, 16)
    group = {"params": [net.weight], "rank": 4, **option, **OPTIONS["fira"]}
    said = ", ".join(f"{key}={value}" for key, value in option.items())
    with pytest.raises(ValueError, match=f"{said} would do nothing"):
        GaLoreAdamW([group], lr=1e-2, module=net, layerwise=True)


@pytest.mark.parametrize("option", ["fira", "channel"])
def test_an_accumulation_is_refused_at_its_first_micro_batch(option: str) -> None:
    optimizer = made(net := Net(), option, layerwise=True)
    before = {name: param.detach().clone() for name, param in net.named_parameters() if param.ndim > 1}
    GradientState()._set_sync_gradients(False)
    with pytest.raises(RuntimeError, match="this step has several micro-batches"):
        loss_of(net, batches(1)[0]).backward()
    assert all(torch.equal(net.get_parameter(name), weight) for name, weight in before.items())
    del optimizer


def test_a_weight_of_several_reentrant_checkpoints_is_refused() -> None:
    optimizer = made(net := CheckpointedReentrant(), "fira", layerwise=True)
    with pytest.raises(RuntimeError, match="several reentrant checkpoints use the weight"):
        loss_of(net, batches(1)[0]).backward()
    del optimizer


def test_a_second_backward_and_clipping_are_refused() -> None:
    """And what they advise is not what is refused next."""
    optimizer = made(net := Net(), "fira", layerwise=True)
    loss_of(net, batches(1)[0]).backward()
    with pytest.raises(RuntimeError, match=r"second gradient arrived .* Make the optimizer with layerwise=False"):
        loss_of(net, batches(1)[0]).backward()
    with pytest.raises(RuntimeError, match=r"cannot be clipped.* Make the optimizer with layerwise=False"):
        optimizer.clip_grad_norm_(1.0)
    with pytest.raises(RuntimeError, match=r"comes too late.* make the optimizer with layerwise=False"):
        nn.utils.clip_grad_norm_([net.up.weight], 1e-9)


def test_options_that_change_under_hooks_are_refused() -> None:
    optimizer = made(net := Net(), "sign", layerwise=True)
    for group in optimizer.param_groups:
        if "rank" in group:
            group["residual"] = "none"
    with pytest.raises(RuntimeError, match=r"were made for its whole gradient.* Make the optimizer anew"):
        loss_of(net, batches(1)[0]).backward()


def test_a_residual_under_accumulation_is_that_of_the_sum() -> None:
    """Plain: two micro-batches are one batch."""
    weights = []
    for parts in (1, 4):
        torch.manual_seed(0)
        optimizer = made(net := Net().double(), "fira")
        for batch in batches(9, rows=16):
            for part in batch.double().chunk(parts):
                (loss_of(net, part) / parts).backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad()
        weights.append({name: param.detach() for name, param in net.named_parameters()})
    for name, weight in weights[0].items():
        assert torch.allclose(weight, weights[1][name], rtol=0, atol=1e-9), name


class Early(TrainerCallback):
    """One that may drop gradients."""

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing."""


FIRA = "rank=4, residual=fira"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"max_grad_norm": 1.0}, "max_grad_norm=1 would have it keep.* Set max_grad_norm to 0"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps=2 would have it keep"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size=True would have it keep"),
    ],
)
def test_a_trainers_arguments_are_refused_before_training(settings: dict[str, Any], words: str, tmp_path: Path) -> None:
    args = arguments(tmp_path, "galore_adamw_layerwise", optim_args=FIRA, **settings)
    with pytest.raises(ValueError, match=words):
        Trainer.get_optimizer_cls_and_kwargs(args, tiny_llama())
    with pytest.raises(ValueError, match=words):
        galore_config(args)  # a recipe, before anything is loaded
    # Of an optimizer that somebody else has made, too; and the plain one takes all of them.
    trainer = make_trainer(model := tiny_llama(), tmp_path, "adamw_torch", optim_target_modules=None, **settings)
    trainer.optimizer = made(model, "fira", layerwise=True)
    with pytest.raises(ValueError, match=words.split(" would", maxsplit=1)[0]):
        trainer.train()
    plain = arguments(tmp_path, "galore_adamw", optim_args=FIRA, **settings)
    assert Trainer.get_optimizer_cls_and_kwargs(plain, tiny_llama())


def test_a_callback_before_the_step_is_refused(tmp_path: Path) -> None:
    trainer = make_trainer(tiny_llama(), tmp_path, "galore_adamw_layerwise", optim_args=FIRA)
    trainer.add_callback(Early())
    with pytest.raises(ValueError, match="the callback Early is called before the optimizer's step"):
        trainer.train()


def test_a_change_of_options_that_hooks_do_not_know_is_refused() -> None:
    net = nn.Linear(16, 16, bias=False)
    optimizer = GaLoreAdamW([{"params": [net.weight], "rank": 4}], lr=1e-2, module=net, layerwise=True)
    optimizer.param_groups[0]["residual"] = "sign"
    with pytest.raises(RuntimeError, match="Make the optimizer anew"):
        net(torch.randn(4, 16)).sum().backward()
