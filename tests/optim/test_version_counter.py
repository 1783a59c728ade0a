"""Each update raises the version of what it changes, by which autograd notices a weight that changed under a graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_galore import make_optimizer
from hf_galore.rules.adam_8bit import MIN_8BIT_ELEMENTS
from tests.support.helpers import NAMES

WIDTH, RANK = 96, 48  # R has 4,608 elements: its moments are really in 8 bits
assert WIDTH * RANK >= MIN_8BIT_ELEMENTS
PARTS = ("target", "full_rank", "vector")


class Net(nn.Module):
    """A matrix that is projected, one that is not and is as large, and a vector."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.target = nn.Linear(WIDTH, WIDTH, bias=False, dtype=dtype)
        self.full_rank = nn.Linear(WIDTH, WIDTH, bias=False, dtype=dtype)
        self.vector = nn.LayerNorm(WIDTH, bias=False, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.full_rank(torch.tanh(self.vector(self.target(x))))  # type: ignore[no-any-return]


def adamw(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(net.parameters(), lr=1e-2)


def galore(name: str, **options: Any) -> Callable[[nn.Module], torch.optim.Optimizer]:
    def make(net: nn.Module) -> torch.optim.Optimizer:
        args = {"rank": RANK, "update_proj_gap": 3, **options}
        return make_optimizer(net, ["target"], optim=name, optim_args=args, lr=1e-2, weight_decay=0.1)

    return make


MADE: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "torch.optim.AdamW": adamw,
    **{name: galore(name) for name in NAMES},
    "lion": galore("galore_adamw_8bit", rule="lion"),
    "muon": galore("galore_adamw_8bit", rule="muon"),
}
STOCHASTIC = {f"{name}, stochastic_rounding": galore(name, stochastic_rounding=True) for name in NAMES}
CASES = [
    *[(name, dtype) for name in MADE for dtype in (torch.float32, torch.bfloat16)],
    *[(name, torch.bfloat16) for name in STOCHASTIC],
]


def run(net: Net, optimizer: torch.optim.Optimizer) -> None:
    net(torch.randn(8, WIDTH, dtype=net.vector.weight.dtype)).float().square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("kind", PARTS)
@pytest.mark.parametrize(("name", "dtype"), CASES, ids=str)
def test_an_update_raises_the_weights_version(name: str, dtype: torch.dtype, kind: str) -> None:
    net = Net(dtype)
    optimizer = {**MADE, **STOCHASTIC}[name](net)
    weight = net.get_submodule(kind).weight
    assert isinstance(weight, Tensor)
    for step in range(5):  # with a refresh and without
        version, before = weight._version, weight.detach().clone()
        run(net, optimizer)
        assert not torch.equal(weight, before), step  # else there was no update
        assert weight._version > version, f"step {step}: the version of {kind} is {weight._version} as before"


@pytest.mark.parametrize("kind", PARTS)
@pytest.mark.parametrize("name", MADE)
def test_a_graph_from_before_the_update_is_refused(name: str, kind: str) -> None:
    """Silently, it would give gradients that are of neither the old nor the new weight."""
    net = Net()
    optimizer = MADE[name](net)
    run(net, optimizer)
    loss = net.get_submodule(kind)(torch.randn(8, WIDTH, requires_grad=True)).square().mean()
    run(net, optimizer)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
