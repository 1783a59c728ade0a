"""The norm of gradients of which only low-rank ones are held is nearly theirs, in every way of training."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import GradientState
from torch import Tensor, nn

from hf_galore import GaLoreAdamW, GaLoreAdamW8bit, GaLoreConfig, make_optimizer
from hf_galore.backward.gradient import LowRankGradient
from hf_galore.optim.optimizer import GaLoreOptimizer
from hf_galore.recipes.checks import galore_config
from tests.backward.test_experts import SERVED, Experts, batch, made
from tests.support.helpers import OPTIM_ARGS, Counting, arguments, assert_same_path, snapshot, target_of, tiny_llama

MICRO_BATCHES, ROWS = 3, 4

# How gradients come, and whether the window has several micro-batches.
WAYS: dict[str, tuple[dict[str, Any], bool]] = {
    "plain, projected backward": ({"optim": "galore_adamw", "optim_args": "projected_backward=true"}, False),
    "plain, projected backward, accumulated": (
        {"optim": "galore_adamw", "optim_args": "projected_backward=true"},
        True,
    ),
    "at once": ({"optim": "galore_adamw_layerwise"}, False),
    "held": ({"optim": "galore_adamw_layerwise", "hold_gradients": True}, False),
    "accumulated": ({"optim": "galore_adamw_layerwise"}, True),
    "accumulated by hooks": ({"optim": "galore_adamw_layerwise", "optim_args": "projected_backward=false"}, True),
    "accumulated in 8 bits": ({"optim": "galore_adamw_layerwise", "optim_args": "gradient_bits=8"}, True),
    "left": ({"optim": "galore_adamw_layerwise", "optim_args": "proj_type=left"}, True),
    "both sides": ({"optim": "galore_adamw_layerwise", "optim_args": "proj_type=full"}, True),
    "4 bits": ({"optim": "galore_adamw_8bit_layerwise", "optim_args": "proj_bits=4"}, True),
    "random bases": ({"optim": "galore_adamw_layerwise", "optim_args": "refresh=random"}, True),
}


@pytest.fixture(autouse=True)
def _closed_windows() -> Iterator[None]:
    """accelerate's window is a process-wide singleton: leave it as a Trainer without accumulation would."""
    GradientState()._set_sync_gradients(True)
    yield
    GradientState()._set_sync_gradients(True)


def optimizer_for(model: nn.Module, way: str, more: str = "", lr: float = 1e-3) -> GaLoreOptimizer:
    options = {**WAYS[way][0]}
    given = options.pop("optim_args", "")
    base = OPTIM_ARGS.replace(", proj_bits=16", "" if "proj_bits" in given else ", proj_bits=16")
    return make_optimizer(model, ["attn", "mlp"], optim_args=f"{base}, {given}, {more}", lr=lr, **options)


def parts_of(step: int, accumulated: bool) -> list[Tensor]:
    data, count = Counting(64), MICRO_BATCHES if accumulated else 1
    numbers = [(step * count + part) * ROWS for part in range(count)]
    return [torch.stack([data[(number + i) % 64]["input_ids"] for i in range(ROWS)]) for number in numbers]


def backward(model: nn.Module, parts: list[Tensor]) -> None:
    for index, rows in enumerate(parts):
        GradientState()._set_sync_gradients(index == len(parts) - 1)
        (model(input_ids=rows, labels=rows).loss / len(parts)).backward()


def true_norm(model: nn.Module, parts: list[Tensor]) -> float:
    """That of the gradient itself, of a copy without hooks."""
    twin = tiny_llama()
    twin.load_state_dict(model.state_dict())
    backward(twin, parts)
    return math.sqrt(sum(float(param.grad.square().sum()) for param in twin.parameters() if param.grad is not None))


def ratios(way: str, steps: int = 12, more: str = "") -> list[float]:
    """The norm that is told of each step, of what the gradient's is."""
    model = tiny_llama()
    optimizer = optimizer_for(model, way, more)
    found = []
    for step in range(steps):
        parts = parts_of(step, WAYS[way][1])
        expected = true_norm(model, parts)
        backward(model, parts)
        norm = optimizer.grad_norm()
        assert norm is not None
        found.append(float(norm) / expected)
        optimizer.step()
        optimizer.zero_grad()
    return found


@pytest.mark.parametrize("way", WAYS)
def test_it_is_that_of_the_gradient(way: str) -> None:
    """Of 14 matrices together: off by a percent or two in one step, and in no direction."""
    found = torch.tensor(ratios(way))
    assert (found - 1).abs().max() < 0.08
    assert (found - 1).square().mean().sqrt() < 0.04
    assert abs(found.mean() - 1) < 0.02


def test_without_probes_it_is_that_of_what_is_held() -> None:
    """Which is what clipping went by: the further off, the less a basis is the gradient's own."""
    assert max(ratios("accumulated", more="norm_probes=0")) < 0.95
    assert max(ratios("random bases", more="norm_probes=0", steps=4)) < 0.9


@pytest.mark.parametrize("by_torch", [True, False])
@pytest.mark.parametrize("way", ["plain, projected backward", "held", "accumulated", "accumulated in 8 bits"])
def test_clipping_is_to_that_norm(way: str, by_torch: bool) -> None:
    model = tiny_llama()
    optimizer = optimizer_for(model, way)
    for step in range(4):
        parts = parts_of(step, WAYS[way][1])
        expected = true_norm(model, parts)
        backward(model, parts)
        weight = model.model.layers[0].mlp.up_proj.weight
        before, head = weight.grad.low_rank.clone(), model.lm_head.weight.grad.clone()
        if by_torch:
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), expected / 4)
        else:
            clipped = optimizer.clip_grad_norm_(expected / 4)
            assert clipped is not None
            norm = clipped
        assert float(norm) == pytest.approx(expected, rel=0.08)
        factor = expected / 4 / float(norm)
        for found, unclipped in ((weight.grad.low_rank, before), (model.lm_head.weight.grad, head)):
            torch.testing.assert_close(found, unclipped * factor, rtol=1e-5, atol=0)
        after = optimizer.grad_norm()
        assert after is not None
        assert float(after) == pytest.approx(expected / 4, rel=1e-5)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("way", ["at once", "accumulated", "accumulated by hooks", "left", "both sides", "4 bits"])
def test_weights_are_what_they_are_without(way: str) -> None:
    """Where nothing is clipped. A product with more columns may round others, on some processors."""
    ends = []
    start = snapshot(tiny_llama())
    for probes in (0, 8):
        model = tiny_llama()
        optimizer = optimizer_for(model, way, f"norm_probes={probes}")
        for step in range(7):
            backward(model, parts_of(step, WAYS[way][1]))
            optimizer.step()
            optimizer.zero_grad()
        ends.append(snapshot(model))
    assert_same_path(ends[1], ends[0], start, 1e-5)


def test_they_change_with_the_basis_alone() -> None:
    """And are nowhere in a checkpoint."""
    model = tiny_llama()
    optimizer = optimizer_for(model, "accumulated", "stagger=false")
    target = target_of(optimizer, model.model.layers[1].mlp.down_proj.weight)
    seen: list[Tensor] = []
    for step in range(5):
        backward(model, parts_of(step, accumulated=True))
        (probes,) = (probes for probes in target.with_probes(target.bases()) if probes is not None)
        seen.append(probes[:, -8:].clone())
        optimizer.step()
        optimizer.zero_grad()
    assert [torch.equal(one, other) for one, other in itertools.pairwise(seen)] == [True, True, False, True]
    assert not any("probe" in key for state in optimizer.state.values() for key in state)


def test_a_refresh_that_is_dropped_takes_its_probes_with_it() -> None:
    model = tiny_llama()
    optimizer = optimizer_for(model, "held", "stagger=false")
    weight = model.model.layers[0].self_attn.q_proj.weight
    found = []
    for step in range(3):
        backward(model, parts_of(step, accumulated=False))
        optimizer.step()
        optimizer.zero_grad()
    for _ in range(2):  # the second is the first again
        backward(model, parts_of(3, accumulated=False))
        assert isinstance(weight.grad, LowRankGradient)
        found.append(weight.grad.low_rank.clone())
        optimizer.zero_grad()
    assert torch.equal(*found)


def test_groups_of_before_have_the_default() -> None:
    """Checkpoints that were written before there was such an option; and it may be set by group."""
    torch.manual_seed(0)
    net = nn.Linear(64, 64)
    options: dict[str, Any] = {"module": net, "layerwise": True, "hold_gradients": True}

    def columns(saved: dict[str, Any] | None = None, **more: int) -> int:
        optimizer = GaLoreAdamW(net.parameters(), param_options={net.weight: {"rank": 16, **more}}, **options)
        if saved is not None:
            optimizer.load_state_dict(saved)
        net(torch.randn(8, 64)).square().sum().backward()
        assert isinstance(net.weight.grad, LowRankGradient)
        found = net.weight.grad.low_rank.shape[1]
        optimizer.zero_grad()
        return found

    old = GaLoreAdamW(net.parameters(), param_options={net.weight: {"rank": 16}}, **options).state_dict()
    for group in old["param_groups"]:
        group.pop("norm_probes", None)
    assert columns(old) == columns() == 16 + 8
    assert columns(norm_probes=4) == 16 + 4
    assert columns(norm_probes=0) == 16


@pytest.mark.parametrize("way", [{"layerwise": True}, {"layerwise": True, "hold_gradients": True}])
@pytest.mark.parametrize("cls", SERVED)
def test_stacks(cls: type[Experts], way: dict[str, Any]) -> None:
    """Of experts that have different tokens, some of them none; each has probes of its own."""
    model, optimizer = made(cls, **way)
    twin = copy.deepcopy(model)
    found = []
    for step in range(16):
        x, counts = batch(cls, step)
        twin.load_state_dict(model.state_dict())
        twin.zero_grad()
        for module in (model, twin):
            module(x, counts).square().sum().backward()
        expected = math.sqrt(sum(float(p.grad.square().sum()) for p in twin.parameters() if p.grad is not None))
        norm = optimizer.grad_norm()
        assert norm is not None
        found.append(float(norm) / expected)
        optimizer.step()
        optimizer.zero_grad()
    assert abs(sum(found) / len(found) - 1) < 0.03
    assert max(abs(ratio - 1) for ratio in found) < 0.15


@pytest.mark.parametrize("cls", [GaLoreAdamW, GaLoreAdamW8bit])
def test_where_there_are_gradients_they_are_refused(cls: type[Any], tmp_path: Path) -> None:
    """Whose norm is exact, so that more of them, or none, would change nothing."""
    net = nn.Linear(64, 64)
    group = {"params": [net.weight], "rank": 16}
    for probes in (0, 16):
        with pytest.raises(ValueError, match=rf"norm_probes={probes} is for low-rank gradients.*layerwise=True"):
            cls([{**group, "norm_probes": probes}])
        cls([{**group, "norm_probes": probes}], module=net, layerwise=True).close()
    cls([{**group, "norm_probes": 8}])
    optimizer = cls([net.bias])
    with pytest.raises(ValueError, match="norm_probes=4 is for"):
        optimizer.add_param_group({**group, "norm_probes": 4})
    assert len(optimizer.param_groups) == 1
    optim_args = "rank=16, norm_probes=16"
    with pytest.raises(ValueError, match=r'norm_probes=16 is for.* Without it: --optim_args "rank=16"\.$'):
        galore_config(arguments(tmp_path, "galore_adamw", optim_args=optim_args))
    config = galore_config(arguments(tmp_path, "galore_adamw", optim_args=f"{optim_args}, projected_backward=true"))
    assert config is not None
    assert config.norm_probes == 16


@pytest.mark.parametrize("option", ["residual=fira", "scaling=channel"])
def test_options_that_need_gradients_do_without_them(option: str) -> None:
    with pytest.raises(ValueError, match=rf"{option} needs the gradient itself.*norm_probes=0 would do nothing"):
        GaLoreConfig.from_optim_args(f"norm_probes=0, {option}")
    GaLoreConfig.from_optim_args(f"norm_probes=8, {option}")


def test_they_follow_a_weight_to_another_dtype() -> None:
    """As to another device, where products with those that were made before would fail."""
    model = tiny_llama().double()
    optimizer = optimizer_for(model, "accumulated", "stagger=false")
    target = target_of(optimizer, model.model.layers[0].mlp.up_proj.weight)
    for dtype in (torch.float64, torch.float32):
        backward(model.to(dtype), parts_of(0, accumulated=True))
        assert {basis.dtype for basis in target.with_probes(target.bases()) if basis is not None} == {dtype}
        optimizer.step()
        optimizer.zero_grad()
