"""While int8 weights train, no float tensor has as many elements as one of them: only tiles are of floats.

Every operation of whole steps is looked at, those of backward passes and of int8 weights themselves too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from hf_galore.backward.stand_in import StandIn
from hf_galore.int8 import BLOCK, Int8Weight, is_int8, products
from hf_galore.optim import GaLoreAdamW, GaLoreOptimizer
from tests.support.int8 import Net, as_int8, in_8_bits, net, train, weight_of

# Of which no tile of another weight has as many elements.
WIDTH = 72


class FloatCopies(TorchDispatchMode):
    """Within, notes each float tensor that has as many elements as an int8 weight, or as its blocks filled up.

    Args:
        weights: the int8 weights. No activation and no low-rank gradient may have as many elements as one.
    """

    def __init__(self, weights: Sequence[Tensor]) -> None:
        super().__init__()
        self.found: list[str] = []
        self.operations = 0
        self._sizes = {weight.numel() for weight in weights}
        self._sizes |= {m * BLOCK * math.ceil(n / BLOCK) for m, n in (weight.shape for weight in weights)}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, (StandIn, Int8Weight)) for kind in types):
            return NotImplemented  # they answer with operations on what they hold, which are seen
        out = func(*args, **(kwargs or {}))
        self.operations += 1
        for leaf in tree_leaves(out):
            if isinstance(leaf, (StandIn, Int8Weight)) or not isinstance(leaf, Tensor):
                continue
            if leaf.dtype.is_floating_point and leaf.numel() in self._sizes:
                self.found.append(f"{func} gave {tuple(leaf.shape)} of {leaf.dtype}")
        return out


@pytest.fixture(autouse=True)
def tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "TILE_ELEMENTS", 1100)


def int8_targets(model: Net) -> list[Int8Weight]:
    return [as_int8(weight) for weight in model.targets()]


def make(**options: Any) -> Callable[[Net], Any]:
    group = {"rank": 7, "update_proj_gap": 3}
    return lambda model: GaLoreAdamW(
        model.parameters(),
        lr=1e-2,
        module=model,
        param_options={weight: {**group, **options.get("group", {})} for weight in model.targets()},
        **{"layerwise": True, **{key: value for key, value in options.items() if key != "group"}},
    )


def checkpointed(use_reentrant: bool) -> Callable[[Net, Tensor], Tensor]:
    def forward(model: Net, x: Tensor) -> Tensor:
        out: Tensor = checkpoint(model, x.requires_grad_(), use_reentrant=use_reentrant)
        return out

    return forward


def autocast(model: Net, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        out: Tensor = model(x).to(x.dtype)
    return out


STEPS: dict[str, dict[str, Any]] = {
    "at once": {},
    "clipped": {"max_norm": 0.1},
    "autocast": {"forward": autocast},
    "accumulated": {"accumulation": 3},
    "accumulated and clipped": {"accumulation": 3, "max_norm": 0.1},
    "checkpointed": {"forward": checkpointed(False)},
    "checkpointed, reentrant": {"forward": checkpointed(True)},
    "checkpointed, accumulated and clipped": {"forward": checkpointed(False), "accumulation": 3, "max_norm": 0.1},
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("words", STEPS)
def test_no_float_tensor_is_as_large_as_a_weight(words: str, dtype: torch.dtype) -> None:
    """Over seven steps, with refreshes: of few tokens a refresh takes factors of a gradient, and none is built."""
    model = net(dtype, width=WIDTH)
    options = {"hold_gradients": True} if "max_norm" in STEPS[words] else {}
    before = [weight.dequantized() for weight in int8_targets(model)]
    with FloatCopies(int8_targets(model)) as copies:
        optimizer = train(model, make(**options), steps=7, **STEPS[words])
    assert copies.found == []
    assert copies.operations > 1000
    assert isinstance(optimizer, GaLoreOptimizer)
    assert optimizer.refresh_figures()["refreshes"] >= 6
    for weight, old in zip(int8_targets(model), before, strict=True):
        assert (weight.dequantized() != old).double().mean() > 0.2


@pytest.mark.parametrize("group", [{"proj_type": "left"}, {"rule": "muon"}, {"moments": "rotate"}], ids=str)
def test_of_other_options(group: dict[str, Any]) -> None:
    model = net(torch.float32, width=WIDTH)
    with FloatCopies(int8_targets(model)) as copies:
        train(model, make(group=group), steps=5)
    assert copies.found == []


def test_a_refresh_from_many_tokens_builds_one_gradient() -> None:
    """Where that takes fewer multiply-adds than the factors: δᵀX of the one layer whose turn it is, and no weight."""
    model = net(torch.float32, width=WIDTH)
    optimizer = make(group={"rank": 30, "update_proj_gap": 100})(model)
    found: list[list[str]] = []
    x = torch.randn(300, WIDTH, generator=torch.Generator().manual_seed(0))
    for _ in range(3):
        with FloatCopies(int8_targets(model)) as copies:
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append(copies.found)
    assert found[1:] == [[], []]
    assert any("aten.mm" in operation for operation in found[0])
    optimizer.close()


def test_a_gradient_that_is_built_is_seen() -> None:
    """What the test above would find: with a plain backward pass, and where a weight is read as a whole."""
    model = net(torch.float32, width=WIDTH)
    with FloatCopies(int8_targets(model)) as copies:
        train(model, make(projected_backward=False), steps=1)
    assert len([operation for operation in copies.found if "aten.mm" in operation]) >= 3
    with FloatCopies(int8_targets(model)) as copies:
        _ = weight_of(model.up).dequantized()
        _ = model.up.weight.norm()
    assert len(copies.found) > 2


def test_evaluation() -> None:
    model = net(torch.bfloat16, width=WIDTH)
    with FloatCopies(int8_targets(model)) as copies, torch.no_grad():
        model(torch.randn(5, WIDTH, dtype=torch.bfloat16))
    assert copies.found == []


@pytest.mark.parametrize("overrides", [{}, {"max_grad_norm": 0.5, "gradient_accumulation_steps": 2}], ids=str)
@pytest.mark.parametrize("name", ["galore_adamw_layerwise", "galore_adamw_8bit_layerwise"])
def test_in_a_trainer(name: str, overrides: dict[str, Any], tmp_path: Path) -> None:
    """A Llama in bfloat16 with checkpointed layers, from its first step to its last."""
    from tests.support.helpers import make_trainer, tiny_llama

    model: nn.Module = in_8_bits(tiny_llama(hidden_size=96, intermediate_size=200), but=["lm_head"]).bfloat16()
    trainer = make_trainer(
        model,
        tmp_path,
        name,
        per_device_train_batch_size=3,
        max_steps=4,
        optim_args="rank=12, update_proj_gap=3, scale=0.5",
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        **overrides,
    )
    with FloatCopies([param for param in model.parameters() if is_int8(param)]) as copies:
        trainer.train()
    assert copies.found == []
    assert copies.operations > 5000
