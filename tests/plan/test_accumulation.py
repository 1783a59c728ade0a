"""Gradients of a tensor with several uses are added as autograd adds them where nobody looks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from hf_galore.plan.accumulation import ADD, ADD_IN_PLACE
from hf_galore.plan.tracking import StorageTracker


class Copied(torch.autograd.Function):
    """With a gradient of its own, made in Python."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 1

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> Tensor:
        return torch.empty_like(delta).copy_(delta)


USES: dict[str, Callable[[Tensor], Tensor]] = {
    "two": lambda x: x * 2 + x * 3,
    "of a function in Python": lambda x: x * 2 + Copied.apply(x),
    "the gradient of a sum, which others hold": lambda x: x + x * 3,
    "three": lambda x: x + x * 3 + x,
    "five": lambda x: x * 2 + x * 3 + x * 4 + x * 5 + x * 6,
}


def gradient(uses: Callable[[Tensor], Tensor]) -> Tensor:
    leaf = torch.arange(12.0).view(4, 3).requires_grad_()
    uses(leaf * 1).backward(torch.ones(4, 3))
    assert leaf.grad is not None
    return leaf.grad


@pytest.mark.parametrize("uses", USES.values(), ids=list(USES))
def test_sums_in_place_are_those_of_an_unwatched_pass(uses: Callable[[Tensor], Tensor]) -> None:
    seen = []

    def call(func: Any, args: Any, kwargs: Any) -> Any:
        if func in (ADD, ADD_IN_PLACE) and torch._C._current_graph_task_id() != -1:
            seen.append(func is ADD_IN_PLACE)
        return func(*args, **kwargs)

    expected = gradient(uses)
    with StorageTracker(torch.device("cpu"), call):
        found = gradient(uses)
    assert torch.equal(found, expected)
    with profile(activities=[ProfilerActivity.CPU]) as unwatched:
        gradient(uses)
    counts = {event.key: event.count for event in unwatched.key_averages()}
    forward = {"two": 1, "of a function in Python": 1, "three": 2, "five": 4}.get(
        next(name for name, each in USES.items() if each is uses), 1
    )
    assert seen.count(True) == counts.get("aten::add_", 0)
    assert seen.count(False) == counts["aten::add"] - forward


def test_what_python_adds_is_left_alone() -> None:
    """In a backward pass, too: it holds both."""

    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 1

        @staticmethod
        def backward(ctx: Any, delta: Tensor) -> Tensor:
            first, second = delta * 2, delta * 3
            both = first + second
            return both + first + second

    with StorageTracker(torch.device("cpu")):
        assert torch.equal(gradient(lambda x: Doubled.apply(x)), torch.full((4, 3), 10.0))
