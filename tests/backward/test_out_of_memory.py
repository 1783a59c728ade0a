"""A backward pass that runs out of memory half way: what stays, what is said, and that training goes on."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hf_galore import make_optimizer
from hf_galore.optim.optimizer import GaLoreOptimizer
from hf_galore.optim.target import Target
from tests.support.helpers import (
    LAYERWISE,
    Counting,
    assert_identical,
    copied,
    hooks_on,
    make_trainer,
    snapshot,
    tiny_llama,
)

ARGS = "rank=16, update_proj_gap=3, scale=0.5"
UNTIL = 3  # steps before; the next has refreshes


class Full(nn.Module):
    """A card that is full in the backward pass of more rows than fit."""

    def __init__(self, model: Any, fit: int) -> None:
        super().__init__()
        self.fit, self.rows, self.times = fit, 0, 0
        model.register_forward_pre_hook(self.see, with_kwargs=True)
        model.model.layers[1].register_full_backward_hook(self.check)

    def see(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.rows = len(kwargs["input_ids"])

    def check(self, *args: Any) -> None:
        if self.rows > self.fit:
            self.times += 1
            raise torch.OutOfMemoryError("CUDA out of memory.")


def make(model: nn.Module, optim: str, *, hold: bool = False) -> GaLoreOptimizer:
    return make_optimizer(model, ["attn", "mlp"], optim=optim, optim_args=ARGS, lr=1e-2, hold_gradients=hold)


def backward(model: Any, rows: int) -> float:
    tokens = torch.stack([row["input_ids"] for row in Counting(rows)])  # type: ignore[attr-defined]
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    return float(loss.detach())


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int, rows: int = 2) -> list[float]:
    losses = []
    for _ in range(count):
        losses.append(backward(model, rows))
        optimizer.step()
        optimizer.zero_grad()
    return losses


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("drop", ["optimizer.zero_grad", "model.zero_grad"])
@pytest.mark.parametrize("optim", LAYERWISE)
def test_a_smaller_batch_trains_on_and_one_warning_says_what_stays(
    optim: str, drop: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_llama()
    optimizer = make(model, optim)
    losses = steps(model, optimizer, UNTIL)
    before = snapshot(model)
    full = Full(model, fit=2)
    for _ in range(2):
        with pytest.raises(torch.OutOfMemoryError):
            backward(model, rows=4)
        (optimizer if drop == "optimizer.zero_grad" else model).zero_grad()
        assert [name for name, param in model.named_parameters() if param.grad is not None] == []
        assert optimizer.hooks is not None
        assert optimizer.hooks.held() == []
    moved = {name for name, param in model.named_parameters() if not torch.equal(param, before[name])}
    assert "model.layers.1.mlp.up_proj.weight" in moved
    assert "model.layers.0.mlp.up_proj.weight" not in moved
    losses += steps(model, optimizer, 8)
    assert full.times == 2
    assert losses[-1] < losses[0] / 2
    (said,) = warnings_of(caplog)
    assert "had updated weights with them already" in said
    assert "hold_gradients=True" in said


@pytest.mark.parametrize("optim", LAYERWISE)
def test_where_gradients_are_held_it_never_happened(optim: str, caplog: pytest.LogCaptureFixture) -> None:
    """Nor did the refreshes that were due."""
    model = tiny_llama()
    alone = copy.deepcopy(model)
    ends = []
    for net, runs_out in ((model, True), (alone, False)):
        optimizer = make(net, optim, hold=True)
        steps(net, optimizer, UNTIL)
        if runs_out:
            full = Full(net, fit=2)
            with pytest.raises(torch.OutOfMemoryError):
                backward(net, rows=4)
            optimizer.zero_grad()
            assert full.times == 1
            assert optimizer.hooks is not None
            assert optimizer.hooks.held() == []
        steps(net, optimizer, 5)
        ends.append((snapshot(net), copied(optimizer.state_dict()["state"])))
    assert_identical(ends[0], ends[1])
    assert warnings_of(caplog) == []


@pytest.mark.parametrize("moments", ["keep", "rotate", "reset"])
@pytest.mark.parametrize("where", ["new_basis", "update"])
def test_full_in_the_update_itself(where: str, moments: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is where a refresh takes the most."""
    model = tiny_llama()
    optimizer = make_optimizer(
        model, ["attn", "mlp"], optim="galore_adamw_layerwise", optim_args=f"{ARGS}, moments={moments}", lr=1e-2
    )
    losses = steps(model, optimizer, UNTIL)
    original: Callable[..., Any] = getattr(Target, where)
    calls = 0

    def once(self: Target, *args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Target, where, once)
    with pytest.raises(torch.OutOfMemoryError):
        steps(model, optimizer, 3)  # a refresh is due in one of them
    optimizer.zero_grad()
    assert optimizer.hooks is not None
    assert optimizer.hooks.held() == []
    losses += steps(model, optimizer, 10)
    assert losses[-1] < losses[0] / 2


@pytest.mark.parametrize("optim", LAYERWISE)
def test_auto_find_batch_size_goes_on_from_the_weights_before_the_batch(optim: str, tmp_path: Path) -> None:
    """So it holds gradients where nothing else would: plain and layerwise end alike."""
    ends = []
    for name in (optim, optim.removesuffix("_layerwise")):
        model = tiny_llama()
        trainer = make_trainer(
            model,
            tmp_path,
            name,
            optim_args=f"{ARGS}, proj_bits=16, projected_backward=false",
            max_steps=4,
            auto_find_batch_size=True,
        )
        full = Full(model, fit=3)
        trainer.train()
        assert full.times == 1
        assert trainer.state.global_step == 4
        assert hooks_on(model) == 2  # this test's
        ends.append(snapshot(model))
    assert_identical(ends[0], ends[1])
