"""What a plan puts in the place of TRL's offloading of activations keeps on the card what that keeps there."""

from __future__ import annotations

import contextlib
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import trl.models.activation_offloading as of_trl
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.checkpoint import checkpoint

from hf_galore.integrations.trl_offloading import Offloaded, moved_offloading
from hf_galore.plan.planner import plan
from hf_galore.plan.tracking import StorageTracker
from tests.support.planning import llama, sft


def test_trl_has_it_as_we_need_it() -> None:
    """Fails first, and by name, when a new version moves it."""
    assert moved_offloading() == []


def test_what_has_moved_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(of_trl.OffloadActivations, "update_model_params")
    assert moved_offloading() == ["OffloadActivations.update_model_params(self, model) is gone"]


class _Host:
    """A copy that is elsewhere: nothing that is seen."""

    def __init__(self, like: Tensor) -> None:
        self.meta = torch.empty_like(like, device="meta")

    def copy_(self, other: Tensor, non_blocking: bool) -> None:
        with _disable_current_modes():
            self.values = other.clone()

    def to(self, device: str, non_blocking: bool) -> Tensor:
        back = torch.empty_strided(self.meta.shape, self.meta.stride(), dtype=self.meta.dtype)
        with _disable_current_modes():
            return back.copy_(self.values)


class _Stream:
    def __getattr__(self, name: str) -> Any:
        return lambda *args: None


class _Card:
    """A device module whose streams do nothing."""

    Stream = _Stream

    @staticmethod
    def current_stream() -> _Stream:
        return _Stream()

    @staticmethod
    def stream(stream: _Stream) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    @staticmethod
    def empty_cache() -> None:
        pass


class _Torch:
    """The torch that TRL's module is to see: one whose card is the CPU, and whose host is nowhere."""

    accelerator = types.SimpleNamespace(current_accelerator=lambda: types.SimpleNamespace(type="cpu"))

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def get_device_module(device: str) -> type[_Card]:
        return _Card

    @staticmethod
    def empty_like(like: Tensor, pin_memory: bool, device: str) -> _Host:
        return _Host(like)


@pytest.fixture
def trl_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(of_trl, "torch", _Torch())


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(64, 256), nn.Linear(256, 64), nn.LayerNorm(64)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.down(torch.nn.functional.silu(self.up(self.norm(x))))
        return out


def live_bytes(kind: Any, *, checkpointed: bool, streams: bool) -> tuple[list[Any], Tensor]:
    """The peaks of the phases of a step, and a gradient."""
    torch.manual_seed(0)
    model = nn.Sequential(*(Block() for _ in range(6)))
    x, offloading = torch.randn(32, 64), kind(use_streams=streams)
    offloading.update_model_params(model)
    with StorageTracker(torch.device("cpu")) as tracker:
        tracker.label(model.parameters(), "parameters")
        for _ in range(2):
            with offloading:
                y = x
                for block in model:
                    y = checkpoint(block, y, use_reentrant=False) if checkpointed else block(y)
                y.square().mean().backward()
            model.zero_grad()
            del y
    gradient = torch.autograd.grad(model(x).square().mean(), next(model.parameters()))[0]
    return [(peak.phase, peak.nbytes) for peak in tracker.peaks()], gradient


@pytest.mark.usefixtures("trl_on_cpu")
@pytest.mark.parametrize("streams", [True, False])
@pytest.mark.parametrize("checkpointed", [True, False])
def test_what_is_on_the_card_is_the_same(checkpointed: bool, streams: bool) -> None:
    theirs, _ = live_bytes(of_trl.OffloadActivations, checkpointed=checkpointed, streams=streams)
    ours, _ = live_bytes(Offloaded, checkpointed=checkpointed, streams=streams)
    assert ours == theirs


def test_a_plan_has_fewer_activations_with_it(tmp_path: Path) -> None:
    """Of eight layers the inputs of five at most, and not all."""

    def activations(**more: Any) -> int:
        make = sft(
            tmp_path,
            "galore_adamw_layerwise",
            lambda: llama(num_hidden_layers=8),
            per_device_train_batch_size=16,
            activation_checkpointing=True,
            **more,
        )
        return plan(make).phase_peaks["backward"]

    inputs = 8 * 16 * 16 * 64 * 4
    assert activations() - activations(activation_offloading=True) > 0.3 * inputs
