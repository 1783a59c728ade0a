"""A model whose modules run accelerate's wrapper of `forward`, as a `device_map` over several devices has them."""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from torch import Tensor, nn

from hf_galore.backward.linear import ProjectedLinear, why_not_patchable
from hf_galore.integrations.accelerate import forward_attribute
from hf_galore.optim.optimizer import GaLoreOptimizer
from tests.backward.test_layerwise import Net, assert_same_weights, batches, make, ordinary_step, run

WAY = "layerwise, projected backward"


def by_dispatch(net: nn.Module) -> None:
    dispatch_model(net, device_map={"": "cpu"}, force_hooks=True)


def by_same_device(net: nn.Module) -> None:
    for module in net.modules():
        if isinstance(module, nn.Linear):
            add_hook_to_module(module, AlignDevicesHook("cpu", io_same_device=True))


def by_two_hooks(net: nn.Module) -> None:
    by_same_device(net)
    for module in net.modules():
        if isinstance(module, nn.Linear):
            add_hook_to_module(module, AlignDevicesHook("cpu"), append=True)


DISPATCHED: dict[str, Callable[[nn.Module], None]] = {
    "device_map": by_dispatch,
    "io_same_device": by_same_device,
    "two hooks": by_two_hooks,
}


def served(net: nn.Module) -> list[str]:
    return [name for name, module in net.named_modules() if isinstance(module, ProjectedLinear)]


def made() -> Net:
    torch.manual_seed(0)
    return Net()


def low_rank_products(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The gradients that projected backwards have brought, as they come."""
    from hf_galore.backward.hooks import BackwardHooks

    found: list[Any] = []
    original = BackwardHooks.gradient_of

    def gradient_of(self: BackwardHooks, *args: Any) -> Any:
        found.append(original(self, *args))
        return found[-1]

    monkeypatch.setattr(BackwardHooks, "gradient_of", gradient_of)
    return found


def test_accelerates_wrapper_is_as_we_need_it() -> None:
    layer = nn.Linear(2, 2)
    assert forward_attribute(layer) is None
    add_hook_to_module(layer, AlignDevicesHook("cpu"))
    wrapper = layer.__dict__.get("forward")
    assert isinstance(wrapper, functools.partial), f"accelerate's wrapper of forward is a {type(wrapper).__name__}"
    assert wrapper.func.__module__ == "accelerate.hooks", wrapper.func.__module__
    assert forward_attribute(layer) == "_old_forward", sorted(layer.__dict__)
    assert layer._old_forward.__func__ is nn.Linear.forward  # type: ignore[union-attr]


@pytest.mark.parametrize("how", DISPATCHED)
def test_the_projected_backward_serves_a_dispatched_model(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    products = low_rank_products(monkeypatch)
    net = made()
    DISPATCHED[how](net)
    optimizer = make(net, WAY)
    for batch in batches(9):
        ordinary_step(net, optimizer, batch)
    assert served(net) == ["enter", "down", "up", "square"]
    assert len([found for found in products if found is not None]) > 20
    assert_same_weights(net, run(Net, WAY), tolerance=0)


@pytest.mark.parametrize("how", DISPATCHED)
def test_close_leaves_accelerates_wrapper(how: str) -> None:
    net = made()
    DISPATCHED[how](net)
    before = {name: dict(module.__dict__) for name, module in net.named_modules()}
    optimizer = make(net, WAY)
    ordinary_step(net, optimizer, batches(1)[0])
    optimizer.close()
    assert served(net) == []
    for name, module in net.named_modules():
        assert set(module.__dict__) == set(before[name])
        assert module.__dict__.get("forward") is before[name].get("forward")
        assert module.__dict__.get("_old_forward") == before[name].get("_old_forward")
    assert why_not_patchable(net.square) is None


@pytest.mark.parametrize("close_first", [True, False])
def test_a_wrapper_that_is_removed_takes_nothing_with_it(close_first: bool) -> None:
    """accelerate leaves `forward` on the module, bound to it."""
    net = made()
    by_dispatch(net)
    optimizer = make(net, WAY)
    for index, batch in enumerate(batches(9)):
        if index == 4:
            if close_first:
                optimizer.close()
            remove_hook_from_module(net, recurse=True)
            if close_first:
                assert optimizer.hooks is not None
                optimizer.hooks.attach()
            assert served(net) == ["enter", "down", "up", "square"]
        ordinary_step(net, optimizer, batch)
    optimizer.close()
    assert_same_weights(net, run(Net, WAY), tolerance=0)
    assert net.square.forward.__func__ is nn.Linear.forward  # type: ignore[attr-defined]


def test_a_wrapper_that_comes_after_the_hooks() -> None:
    net = made()
    optimizer = make(net, WAY)
    for index, batch in enumerate(batches(9)):
        if index == 4:
            by_same_device(net)
        ordinary_step(net, optimizer, batch)
    optimizer.close()
    assert_same_weights(net, run(Net, WAY), tolerance=0)
    loss: Tensor = net(batches(1)[0]).sum()
    loss.backward()
    assert type(net.square.weight.grad) is Tensor


def test_a_copy_of_a_dispatched_model_is_a_plain_one_with_its_own_weights() -> None:
    net = made()
    by_dispatch(net)
    optimizer = make(net, WAY)
    ordinary_step(net, optimizer, batches(1)[0])
    copied = copy.deepcopy(net)
    assert served(copied) == []
    assert [module for module in copied.modules() if "_galore_sink" in module.__dict__] == []
    copied.square.weight.data.zero_()
    assert copied(batches(1)[0]).abs().max() <= copied.square.bias.abs().max() + 1e-6
    assert why_not_patchable(copied.square) is None
    again: GaLoreOptimizer = make(copied, WAY)
    ordinary_step(copied, again, batches(1)[0])
    assert copied.square.weight.any()


def test_a_forward_of_somebodys_own_is_not_replaced() -> None:
    def doubled(input: Tensor) -> Tensor:
        return 2 * input

    for wrap in (False, True):
        net = made()
        net.square.forward = doubled  # type: ignore[method-assign]
        if wrap:
            add_hook_to_module(net.square, AlignDevicesHook("cpu"))
        assert why_not_patchable(net.square) == "its forward has been replaced"
        optimizer = make(net, WAY)
        assert served(net) == ["enter", "down", "up"]
        assert torch.equal(net.square(torch.ones(1)), torch.full((1,), 2.0))
        optimizer.close()
    other = made()
    other.square.forward = other.up.forward  # type: ignore[method-assign]
    assert why_not_patchable(other.square) == "its forward has been replaced"
    by_same_device(other)
    shallow = copy.copy(other.down)  # whose calls end in the other one's weight
    assert why_not_patchable(other.down) is None
    assert why_not_patchable(shallow) == "its forward has been replaced"


# ---- what is said


@pytest.mark.parametrize(
    ("replaced", "level", "count"),
    [
        (("square", "up", "down", "enter"), logging.WARNING, "none of the 4"),
        (("square", "up", "down"), logging.WARNING, "1 of the 4"),
        (("square", "up"), logging.INFO, None),
    ],
)
def test_a_projected_backward_that_serves_few_is_a_warning(
    replaced: tuple[str, ...], level: int, count: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    net = made()
    for name in replaced:
        layer = net.get_submodule(name)
        layer.forward = functools.partial(type(layer).forward, layer)
    with caplog.at_level(logging.INFO, logger="hf_galore"):
        optimizer = make(net, WAY)
        optimizer.hooks.attach()  # type: ignore[union-attr]
        ordinary_step(net, optimizer, batches(1)[0])
    said = [record for record in caplog.records if "cannot serve" in record.getMessage()]
    assert [record.levelno for record in said] == [level]
    message = said[0].getMessage()
    assert "(its forward has been replaced)" in message
    assert ("modules with targets" in message) == (count is not None)
    if count is not None:
        assert f"It serves {count} modules with targets" in message
        assert "projected_backward=false" in message
