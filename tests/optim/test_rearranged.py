"""What users do to groups, parameters and models between steps is followed as torch's optimizers do, or refused."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_galore import GaLoreAdamW, GaLoreAdamW8bit
from hf_galore.backward.linear import ProjectedLinear
from tests.optim.test_classes import parameters
from tests.support.helpers import assert_identical, copied, snapshot, target_of

WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "layerwise": {"layerwise": True},
    "held": {"layerwise": True, "hold_gradients": True},
    "projected": {"projected_backward": True},
}
HOOKED = [way for way in WAYS if way != "plain"]


def weight_of(layer: nn.Module) -> nn.Parameter:
    weight = layer.weight
    assert isinstance(weight, nn.Parameter)
    return weight


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(16, 16) for _ in range(3)))


def made(model: nn.Module, way: str, **options: Any) -> GaLoreAdamW:
    matrices = [param for param in model.parameters() if param.ndim == 2]
    group = {"rank": 4, "update_proj_gap": 3, "proj_bits": 16, **options}
    return GaLoreAdamW(
        model.parameters(), lr=1e-2, module=model, param_options=dict.fromkeys(matrices, group), **WAYS[way]
    )


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 4) -> None:
    for step in range(steps):
        x = torch.randn(5, 16, generator=torch.Generator().manual_seed(step))
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def group_with(optimizer: torch.optim.Optimizer, param: Tensor) -> dict[str, Any]:
    return next(group for group in optimizer.param_groups if any(param is other for other in group["params"]))


def move(optimizer: torch.optim.Optimizer, param: Tensor, **options: Any) -> None:
    """Into a group of its own."""
    group = group_with(optimizer, param)
    kept = {key: value for key, value in group.items() if key not in ("params", "param_names")}
    place = next(i for i, other in enumerate(group["params"]) if other is param)
    del group["params"][place]
    group.get("param_names", [None] * (place + 1)).pop(place)
    optimizer.add_param_group({**kept, "params": [param], **options})


# ---- groups


@pytest.mark.parametrize("way", WAYS)
def test_a_parameter_follows_its_new_group(way: str) -> None:
    model = net()
    optimizer = made(model, way)
    train(model, optimizer, 2)
    bias, matrix = model[1].bias, weight_of(model[1])
    assert isinstance(bias, nn.Parameter)
    move(optimizer, bias, lr=0.0)
    move(optimizer, matrix, lr=0.0)
    before = snapshot(model)
    train(model, optimizer)
    assert torch.equal(bias, before["1.bias"])
    assert torch.equal(matrix, before["1.weight"])
    assert not torch.equal(weight_of(model[0]), before["0.weight"])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "rearrange",
    [lambda groups: groups.reverse(), lambda groups: groups.insert(0, groups.pop())],
    ids=["reversed", "rotated"],
)
def test_the_order_of_groups_makes_no_difference(way: str, rearrange: Callable[[list[Any]], None]) -> None:
    ends = []
    for rearranged in (False, True):
        model = net()
        optimizer = made(model, way, stagger=False)  # turns follow the order
        train(model, optimizer, 2)
        if rearranged:
            rearrange(optimizer.param_groups)
        train(model, optimizer)
        ends.append(snapshot(model))
    assert_identical(ends[0], ends[1])


@pytest.mark.parametrize("way", WAYS)
def test_what_has_left_the_groups_is_not_trained_and_not_kept(way: str) -> None:
    model = net()
    optimizer = made(model, way)
    train(model, optimizer, 2)
    layer = model[1]
    group = group_with(optimizer, weight_of(layer))
    place = next(i for i, other in enumerate(group["params"]) if other is layer.weight)
    del group["params"][place], group["param_names"][place]
    del optimizer.state[weight_of(layer)]
    before = snapshot(model)
    train(model, optimizer)
    assert torch.equal(weight_of(layer), before["1.weight"])
    assert not torch.equal(weight_of(model[0]), before["0.weight"])
    gone = weakref.ref(weight_of(layer))
    layer.weight = nn.Parameter(torch.zeros(16, 16))
    train(model, optimizer, 1)
    gc.collect()
    assert gone() is None
    with pytest.raises(ValueError, match=r"a parameter of shape .* is in no group of this optimizer"):
        optimizer.refresh_next([nn.Parameter(torch.zeros(2, 2))])


@pytest.mark.parametrize("way", WAYS)
def test_a_parameter_that_comes_back_is_trained_again(way: str) -> None:
    ends = []
    for used in (way, "plain"):
        model = net()
        optimizer = made(model, used, stagger=False)
        train(model, optimizer, 2)
        weight = weight_of(model[1])
        group = group_with(optimizer, weight)
        kept = {key: value for key, value in group.items() if key not in ("params", "param_names")}
        place = next(i for i, other in enumerate(group["params"]) if other is weight)
        del group["params"][place], group["param_names"][place]
        train(model, optimizer, 1)
        model.zero_grad()  # it has a gradient that nobody has used
        optimizer.add_param_group({**kept, "params": [weight]})
        train(model, optimizer, 3)
        ends.append(snapshot(model))
    for name, expected in ends[1].items():
        torch.testing.assert_close(ends[0][name], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("option", "value"), [("proj_type", "left"), ("rank", 3), ("proj_bits", 8), ("rule", "lion")])
def test_an_option_that_shapes_follow_from_cannot_be_changed_in_a_run(option: str, value: Any) -> None:
    model = net()
    optimizer = made(model, "plain", proj_type="right")
    train(model, optimizer, 2)
    group_with(optimizer, weight_of(model[0]))[option] = value
    if option == "rule":  # Lion's moment is among Adam's
        optimizer.state[weight_of(model[0])].pop("exp_avg")
    with pytest.raises(ValueError, match=r"0\.weight has changed since .* or for other options of its group"):
        train(model, optimizer, 1)


def test_all_turns_are_taken_when_the_first_is_asked_for() -> None:
    """Options of groups that are changed later leave them as they are, whichever target has been asked by then."""
    model = net()
    optimizer = made(model, "plain", update_proj_gap=6)
    first, *others = optimizer.targets()
    turns = [first.phase]
    for group in optimizer.param_groups:
        group["update_proj_gap"] = 60
    assert [*turns, *(target.phase for target in others)] == [0, 2, 4]


# ---- hooks


@pytest.mark.parametrize("way", HOOKED)
def test_a_closed_optimizer_puts_no_hooks_on_again(way: str) -> None:
    model = net()
    model[2].requires_grad_(False)
    optimizer = made(model, way)
    train(model, optimizer, 1)
    optimizer.close()
    model[2].requires_grad_(True)
    train(model, optimizer)
    assert not any(isinstance(module, ProjectedLinear) for module in model.modules())
    twin = net()
    reference = made(twin, "plain")
    twin[2].requires_grad_(False)
    train(twin, reference, 1)
    twin[2].requires_grad_(True)
    train(twin, reference)
    for name, weight in snapshot(twin).items():
        torch.testing.assert_close(snapshot(model)[name], weight, atol=1e-5, rtol=1e-4)


def test_hooks_come_where_all_was_frozen_at_first() -> None:
    model = net().requires_grad_(False)
    optimizer = made(model, "layerwise")
    optimizer.step()
    model.requires_grad_(True)
    optimizer.step()
    assert all(isinstance(module, ProjectedLinear) for module in model)


@pytest.mark.parametrize("way", HOOKED)
def test_a_graph_that_outlives_its_optimizer_gives_plain_gradients(way: str) -> None:
    model, twin = net(), net()
    optimizer = made(model, way)
    x = torch.ones(5, 16)
    loss = model(x).square().sum()
    del optimizer
    loss.backward()
    twin(x).square().sum().backward()
    for param, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert type(param.grad) is Tensor
        assert torch.equal(param.grad, other.grad)  # type: ignore[arg-type]


# ---- state


@pytest.mark.parametrize("cls", [GaLoreAdamW, GaLoreAdamW8bit])
def test_a_copy_whose_weight_is_resized_is_refused(cls: type[Any]) -> None:
    """A fused kernel would write past the end of its moments."""
    matrix, vector = parameters((32, 16), (7,))
    optimizer = copy.deepcopy(cls([{"params": [matrix], "rank": 4}, {"params": [vector]}], lr=1e-2))
    for group, size in zip(optimizer.param_groups, ((64, 16), (70,)), strict=True):
        (param,) = group["params"]
        param.data = torch.zeros(size)
        param.grad = torch.ones(size)
        with pytest.raises(ValueError, match="has changed since the optimizer was made"):
            optimizer.trained(param).step(param.grad)


def test_asking_makes_no_state_and_raises_nothing() -> None:
    model = net()
    model[1].requires_grad_(False)
    optimizer = made(model, "plain")
    train(model, optimizer, 1)
    saved = copied(optimizer.state_dict())
    optimizer.refresh_figures()
    optimizer.load_state_dict(copied(saved))
    assert list(optimizer.state_dict()["state"]) == list(saved["state"])
    optimizer.state.clear()
    memory = optimizer.memory()
    assert (memory.moment_bytes, memory.targets) == (0, 2)
    assert not optimizer.state
    train(model, optimizer, 1)
    model[0].weight = nn.Parameter(torch.zeros(4, 4))
    assert optimizer.memory().targets == 2
    assert optimizer.refresh_figures()["refreshes"] == 2


def test_bases_take_the_weights_dtype_also_where_the_first_step_is_skipped() -> None:
    (param,) = parameters((12, 10))
    optimizer = GaLoreAdamW([{"params": [param], "rank": 4, "proj_bits": 16}])
    param.data = param.data.to(torch.bfloat16)
    param.grad = torch.full_like(param, float("nan"))
    optimizer.step()
    assert optimizer.state[param]["basis_right"].dtype == torch.bfloat16
    optimizer.load_state_dict(copied(optimizer.state_dict()))
    assert target_of(optimizer, param).due()
