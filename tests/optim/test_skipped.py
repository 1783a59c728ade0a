"""What the host learns of updates that only devices know to be skipped, and how often it asks."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_galore.optim import GaLoreAdamW
from hf_galore.optim.skipped import Skipped, SkippedUpdates


def test_one_read_tells_of_all_parameters_of_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each read of its own would wait for a GPU again: 291 times at each log of a 7B model."""
    params = [torch.zeros(2) for _ in range(5)]
    skipped = SkippedUpdates()
    for step in range(1, 5):
        for index, param in enumerate(params):
            is_skipped = (index == 2 and step >= 3) or index == 4
            skipped.note(param, torch.tensor(math.nan if is_skipped else 1.0), step)
        skipped.count()
    reads = []
    for name in ("item", "tolist"):
        original = getattr(Tensor, name)

        def counted(self: Tensor, original: Any = original) -> Any:
            reads.append(tuple(self.shape))
            return original(self)

        monkeypatch.setattr(Tensor, name, counted)
    assert skipped.read() == {params[2]: 2, params[4]: 4}
    assert reads == [(5, 2)]
    assert skipped.known() == {params[2]: Skipped(2, 3), params[4]: Skipped(4, 1)}
    assert skipped.read() == {}


def test_what_is_skipped_later_is_added() -> None:
    param = torch.zeros(2)
    skipped = SkippedUpdates()
    skipped.note_known(param, 2)
    skipped.note(param, torch.tensor(math.inf), 7)
    assert skipped.read() == {param: 1}
    skipped.note(param, torch.tensor(math.nan), 9)
    assert skipped.read() == {param: 1}
    assert skipped.known() == {param: Skipped(3, 2)}


# ---- counts of steps, where a log comes late


@pytest.fixture
def _only_the_device_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_galore.lowrank.nonfinite._look", lambda norm: None)
    monkeypatch.setattr("hf_galore.lowrank.nonfinite.host_knows", lambda tensor: False)


def _made(moments: str, **way: Any) -> tuple[nn.Linear, GaLoreAdamW]:
    torch.manual_seed(0)
    net = nn.Linear(24, 16)
    groups = [
        {"params": [net.weight], "rank": 4, "update_proj_gap": 5, "moments": moments, "stagger": False},
        {"params": [net.bias]},
    ]
    return net, GaLoreAdamW(groups, lr=1e-2, module=net, **way)


def _step(net: nn.Linear, optimizer: GaLoreAdamW, number: int, factor: float = 1.0) -> None:
    x = torch.randn(32, 24, generator=torch.Generator().manual_seed(number))
    (net(x).square().mean() * factor).backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.usefixtures("_only_the_device_knows")
@pytest.mark.parametrize("way", [{}, {"layerwise": True}, {"layerwise": True, "hold_gradients": True}], ids=str)
@pytest.mark.parametrize("moments", ["keep", "rotate", "reset"])
def test_a_refresh_between_skipped_updates_and_the_log_has_its_place_among_those_made(
    moments: str, way: dict[str, Any]
) -> None:
    """Moments that began anew would else be of fewer than no updates, and the weights NaN."""
    net, optimizer = _made(moments, **way)
    state = optimizer.state[net.weight]
    for number in range(1, 9):
        _step(net, optimizer, number, factor=math.nan if number in (3, 4, 5) else 1.0)
        if number == 6:  # it refreshed, as the sixth by the host's count; two updates had been made
            assert (int(state["refreshed_at"]), int(state["step"]), int(state["refreshes"])) == (2, 3, 2)
    assert set(optimizer.skipped_updates().values()) == {Skipped(3, 3)}
    assert int(state["step"]) == int(optimizer.state[net.bias]["step"]) == 5
    assert net.weight.isfinite().all()


@pytest.mark.usefixtures("_only_the_device_knows")
def test_a_checkpoint_has_the_right_count_of_updates_without_a_log() -> None:
    net, optimizer = _made("keep")
    for number in range(1, 5):
        _step(net, optimizer, number, factor=math.nan if number == 2 else 1.0)
    saved = optimizer.state_dict()
    assert {int(state["step"]) for state in saved["state"].values()} == {3}
    assert set(optimizer.skipped_updates().values()) == {Skipped(1, 2)}


@pytest.mark.usefixtures("_only_the_device_knows")
def test_what_was_skipped_before_a_checkpoint_was_loaded_is_not_taken_from_its_counts() -> None:
    net, optimizer = _made("keep")
    _step(net, optimizer, 1)
    _step(net, optimizer, 2)
    saved = copy.deepcopy(optimizer.state_dict())
    _step(net, optimizer, 3, factor=math.nan)
    optimizer.load_state_dict(saved)
    assert set(optimizer.skipped_updates().values()) == {Skipped(1, 3)}
    assert int(optimizer.state[net.weight]["step"]) == int(optimizer.state[net.bias]["step"]) == 2


@pytest.mark.usefixtures("_only_the_device_knows")
def test_what_was_skipped_of_a_state_that_is_gone_is_counted_nowhere() -> None:
    net, optimizer = _made("keep")
    _step(net, optimizer, 1, factor=math.nan)
    optimizer.state.clear()
    assert set(optimizer.skipped_updates().values()) == {Skipped(1, 1)}
    _step(net, optimizer, 2, factor=math.nan)
    optimizer.state.clear()
    _step(net, optimizer, 3)
    optimizer.skipped_updates()
    assert int(optimizer.state[net.bias]["step"]) == 0  # the host cannot tell; never less than none
