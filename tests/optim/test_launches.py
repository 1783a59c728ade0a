"""How many kernels a card is asked for in a steady step, counted with tensors that have no numbers.

Each launch takes the host some microseconds; on a fast card that is what a step of GaLore takes longer than one of
AdamW. (Counted are operations: a card's own count is a little higher, as some take more than one kernel.)
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import hf_galore.kernels.adam
import hf_galore.kernels.blockwise
from hf_galore.optim import GaLoreAdamW, GaLoreAdamW8bit
from hf_galore.optim.bases import count_refresh
from hf_galore.plan.fakes import Fakes, fake_training

WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "layerwise": {"layerwise": True},
    "held": {"layerwise": True, "hold_gradients": True},
}
# They only say how memory is to be read.
VIEWS = {
    *("_reshape_alias", "_unsafe_view", "alias", "as_strided", "detach", "expand", "permute", "select", "slice"),
    *("split", "split_with_sizes", "squeeze", "t", "transpose", "unbind", "unsqueeze", "view"),
    *("device", "empty", "empty_like", "new_empty", "new_empty_strided", "promote_types"),
}
SMALL = 5  # parameters that one multi-tensor kernel takes


def on_the_card(func: Any, args: Any, out: Any) -> bool:
    """Whether an operation launches a kernel; counters of steps are the host's, and fakes know their numbers."""
    if func.overloadpacket.__name__ in VIEWS:
        return False
    results = out if isinstance(out, (list, tuple)) else (out,)
    tensors = [value for value in (*args, *results) if isinstance(value, torch.Tensor)]
    return not tensors or any(getattr(tensor, "constant", None) is None for tensor in tensors)


def launches(
    layers: int, way: str | None, cls: Any, monkeypatch: pytest.MonkeyPatch, clip: bool = False, **group: Any
) -> int:
    """The launches of one step of a model with Llama-2-7B's layers; without an optimizer where `way` is `None`."""
    counted: Counter[str] = Counter()
    original = Fakes.call

    def call(self: Fakes, func: Any, args: Any, kwargs: Any) -> Any:
        out = original(self, func, args, kwargs)
        if on_the_card(func, args, out):
            lists = [value for value in args if isinstance(value, (list, tuple)) and len(value) > SMALL]
            counted[str(func)] += max([-(-len(value) // 64) for value in lists], default=1)
        return out

    monkeypatch.setattr(Fakes, "call", call)
    for module in (hf_galore.kernels.adam, hf_galore.kernels.blockwise):
        monkeypatch.setattr(module, "launch", lambda name, *_, **__: counted.update([name]))
        monkeypatch.setattr(module, "has_numbers", lambda tensor: True)  # else they stop short of the launch
    with fake_training("cuda"):
        config = LlamaConfig(num_hidden_layers=layers, vocab_size=64, use_cache=False)
        model = LlamaForCausalLM(config).bfloat16().train()
        optimizer = None if way is None else optimizer_of(model, cls, group, **WAYS[way])
        ids = torch.zeros(2, 16, dtype=torch.int64)
        for _ in range(2):
            counted.clear()
            model(input_ids=ids).logits.sum().backward()
            if optimizer is None:
                model.zero_grad()
                continue
            if clip:
                optimizer.clip_grad_norm_(1.0)
            optimizer.step()
            optimizer.zero_grad()
    monkeypatch.undo()
    return counted.total()


def optimizer_of(model: nn.Module, cls: Any, group: dict[str, Any], **options: Any) -> Any:
    """The 7B recipe's, after all its first refreshes."""
    targets = [
        module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ("attn" in name or "mlp" in name)
    ]
    group = {"rank": 1024, "proj_bits": 4, "update_proj_gap": 10**6, "stagger": False, **group}
    optimizer = cls(
        model.parameters(), weight_decay=0.01, param_options=dict.fromkeys(targets, group), module=model, **options
    )
    for target in optimizer.targets():
        count_refresh(target.state, 0)
    return optimizer


def launches_a_layer(
    way: str | None, monkeypatch: pytest.MonkeyPatch, cls: Any = GaLoreAdamW8bit, clip: bool = False, **group: Any
) -> int:
    few, more = (launches(layers, way, cls, monkeypatch, clip, **group) for layers in (2, 6))
    return -(-(more - few) // 4)


@pytest.mark.parametrize("way", WAYS)
def test_launches_a_layer(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was 281 when all that could be skipped was booked by itself and bases were read twice."""
    alone = launches_a_layer(None, monkeypatch)
    found = launches_a_layer(way, monkeypatch)
    assert alone > 90, "the model's own are counted"
    # 7 targets: the basis, one product more than the gradient took, the norm, Adam, W; 2 norms: theirs and Adam. Where
    # there is no gradient to take the norm of, norm probes are put beside the basis, and R is taken out between them.
    assert found <= alone + 7 * (5 if way == "plain" else 7) + 2 * 2
    assert found <= 180


def test_32_bits_take_one_cast_of_the_gradient_and_one_of_the_direction(monkeypatch: pytest.MonkeyPatch) -> None:
    assert launches_a_layer("layerwise", monkeypatch, GaLoreAdamW) <= launches_a_layer("layerwise", monkeypatch) + 2 * 7


@pytest.mark.parametrize("way", ["plain", "held"])
def test_clipping_takes_few_kernels_for_all(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not one for each gradient's norm and one for its scaling."""
    assert launches_a_layer(way, monkeypatch, clip=True) <= launches_a_layer(way, monkeypatch) + 2


@pytest.mark.parametrize(
    ("option", "value", "most"),
    [("residual", "fira", 42), ("residual", "sign", 26), ("scaling", "channel", 37), ("scaling", "tensor", 37)],
)
def test_what_options_that_need_gradients_take_more(
    option: str, value: str, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Most are on numbers, one a channel or one a matrix; in chunks, as it was once, residuals took 93."""
    group: dict[str, Any] = {option: value}
    more = launches_a_layer("plain", monkeypatch, **group) - launches_a_layer("plain", monkeypatch)
    assert 0 < more <= 7 * most
