"""What is asked of accelerate: whether a micro-batch closes the window, and what its wrapper of an optimizer holds."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import GradientState
from torch import nn

from hf_galore import GaLoreAdamW
from hf_galore.integrations.accelerate import closes_window, unwrapped
from hf_galore.integrations.callback import galore_optimizer


def test_accelerate_is_as_we_need_it() -> None:
    found = getattr(GradientState(), "sync_gradients", None)
    assert isinstance(found, bool), f"accelerate.state.GradientState().sync_gradients is {found!r}, not a bool"
    Accelerator(cpu=True)  # a wrapper asks for the state that this makes
    parameter = nn.Parameter(torch.zeros(1))
    inner = torch.optim.SGD([parameter], lr=0.1)
    wrapper = AcceleratedOptimizer(inner)
    assert getattr(wrapper, "optimizer", None) is inner, (
        "AcceleratedOptimizer no longer has its optimizer in .optimizer"
    )


def test_where_nobody_accumulates_each_micro_batch_closes_a_window() -> None:
    assert closes_window() is True


@pytest.mark.parametrize("steps", [1, 3])
def test_windows_are_accelerates(steps: int) -> None:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=steps)
    model = nn.Linear(2, 1)
    found = []
    for _ in range(2 * steps):
        with accelerator.accumulate(model):
            found.append(closes_window())
    assert found == ([False] * (steps - 1) + [True]) * 2
    with accelerator.no_sync(model):
        assert closes_window() == GradientState().sync_gradients
    assert closes_window()


def test_a_galore_optimizer_is_found_in_the_wrapper_and_without_it() -> None:
    model = nn.Linear(4, 4)
    optimizer = GaLoreAdamW(model.parameters())
    wrapper = Accelerator(cpu=True).prepare(optimizer)
    assert type(wrapper) is AcceleratedOptimizer
    assert unwrapped(wrapper) is unwrapped(optimizer) is optimizer
    assert galore_optimizer(wrapper) is galore_optimizer(optimizer) is optimizer
    other = torch.optim.SGD(model.parameters(), lr=0.1)
    assert unwrapped(other) is other
    assert galore_optimizer(other) is galore_optimizer(None) is None
