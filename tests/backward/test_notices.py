"""What is said of a compiled model, and that it is trained as the same model uncompiled."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_galore import make_optimizer
from tests.support.helpers import Counting, snapshot, tiny_llama

LAYERWISE = "galore_adamw_layerwise"
ARGS = "rank=16, update_proj_gap=3, scale=0.5, proj_bits=16"
TOLERANCE = 1e-4  # of losses: the compiler adds up in another order, and four steps of Adam with a refresh follow


@pytest.fixture(autouse=True)
def _no_compiled_code() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(model: nn.Module) -> Any:
    return torch.compile(model, backend="aot_eager")


def in_place(model: nn.Module) -> Any:
    model.compile(backend="aot_eager")
    return model


def losses(model: Any, optimizer: torch.optim.Optimizer, steps: int = 4) -> list[float]:
    tokens = torch.stack([row["input_ids"] for row in Counting(4)])  # type: ignore[attr-defined]
    found = []
    for _ in range(steps):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


def make(model: nn.Module, optim: str, args: str = ARGS) -> Any:
    return make_optimizer(model, ["attn", "mlp"], optim=optim, optim_args=args, lr=1e-2)


def gradients_at_once(loss: Tensor) -> int:
    """The most parameters whose gradients one compiled part of the graph hands over."""
    seen, todo, most = set(), [loss.grad_fn], 0
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        others = [other for other, _ in node.next_functions]
        if "Compiled" in node.name():
            most = max(most, sum(hasattr(other, "variable") for other in others))
        todo += others
    return most


@pytest.mark.parametrize("compile_it", [compiled, in_place])
@pytest.mark.parametrize(
    ("optim", "args", "words"),
    [
        (LAYERWISE, "", "layerwise updates: their hooks break the compiled graph at each layer, so little is left to"),
        (LAYERWISE, ", projected_backward=false", "a compiled part hands over all its gradients at once"),
        ("galore_adamw", ", projected_backward=true", "has a projected backward: their hooks break"),
    ],
)
def test_hooks_on_a_compiled_model_are_warned_of(
    compile_it: Callable[[nn.Module], Any], optim: str, args: str, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = compile_it(tiny_llama(num_hidden_layers=1))
    optimizer = make(model, optim, ARGS + args)
    optimizer.close()
    optimizer.hooks.attach()
    said = [record for record in caplog.records if "is compiled" in record.getMessage()]
    assert [record.levelno for record in said] == [logging.WARNING]
    assert words in said[0].getMessage()
    assert ("all its gradients at once" in said[0].getMessage()) == ("false" in args)


def test_a_plain_optimizer_or_a_plain_model_is_not_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    make(compiled(tiny_llama(num_hidden_layers=1)), "galore_adamw")
    make(tiny_llama(num_hidden_layers=1), LAYERWISE)
    assert [record for record in caplog.records if "is compiled" in record.getMessage()] == []


@pytest.mark.parametrize("first", ["compiled first", "hooked first"])
@pytest.mark.parametrize("args", ["", ", projected_backward=false"])
def test_a_compiled_model_learns_as_the_model_uncompiled(first: str, args: str) -> None:
    """Also where the compiler has seen the model before it had hooks, and does not look for hooks again."""
    plain = tiny_llama(num_hidden_layers=2)
    expected = losses(plain, make(plain, LAYERWISE, ARGS + args))
    model = tiny_llama(num_hidden_layers=2)
    start = snapshot(model)
    outer = compiled(model)
    tokens = torch.zeros(4, 16, dtype=torch.long)
    if first == "compiled first":
        loss = outer(input_ids=tokens, labels=tokens).loss
        assert gradients_at_once(loss) == len(start)  # else this test is of nothing
    optimizer = make(model, LAYERWISE, ARGS + args)
    assert losses(outer, optimizer) == pytest.approx(expected, abs=TOLERANCE)
    # What the warning says of memory.
    at_once = gradients_at_once(outer(input_ids=tokens, labels=tokens).loss)
    assert at_once == (len(start) if first == "compiled first" and args else 1)
