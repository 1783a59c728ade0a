"""Checkpoints that earlier versions have written load, and the run goes on where it would have gone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_galore import GaLoreAdafactor, GaLoreAdamW, GaLoreAdamW8bit
from hf_galore.optim.checkpoint import FORMAT, FORMAT_KEY

pytestmark = pytest.mark.arithmetic

# Written before checkpoints said their format: for each class its weights and state after 5 steps, and its weights 7
# steps and two or three refreshes later.
FORMAT_1 = Path(__file__).parent / "data" / "format_1.pt"
OPTIONS: dict[str, tuple[type[Any], dict[str, Any], dict[str, Any]]] = {
    "adamw": (GaLoreAdamW, {"moments": "rotate", "proj_bits": 16, "rank": 6}, {"weight_decay": 0.1}),
    "adamw_8bit": (
        GaLoreAdamW8bit,
        {"moments": "keep", "proj_bits": 4, "rank": 47, "lazy_refresh": True},
        {"weight_decay": 0.1},
    ),
    "adafactor": (
        GaLoreAdafactor,
        {"moments": "reset", "proj_bits": 8, "proj_type": "full", "rank": 6},
        {"beta1": 0.9},
    ),
}


def gradients(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in ((48, 88), (7,))]


def made(name: str, weights: list[Tensor]) -> tuple[Any, list[nn.Parameter]]:
    cls, options, keywords = OPTIONS[name]
    params = [nn.Parameter(weight.clone()) for weight in weights]
    group = {"params": params[:1], "update_proj_gap": 3, "scale": 0.5, **options}
    return cls([group, {"params": params[1:]}], lr=1e-2, **keywords), params


@pytest.mark.parametrize("name", OPTIONS)
def test_a_run_goes_on_from_a_checkpoint_of_format_1(name: str) -> None:
    saved = torch.load(FORMAT_1, weights_only=True)[name]
    assert FORMAT_KEY not in saved["state"]
    optimizer, params = made(name, saved["weights"])
    optimizer.load_state_dict(saved["state"])
    for step in range(5, 12):
        for param, gradient in zip(params, gradients(step), strict=True):
            param.grad = gradient
        optimizer.step()
    for param, expected, start in zip(params, saved["after"], saved["weights"], strict=True):
        # Bit for bit on the machine that wrote it; elsewhere sums round otherwise, and codes of 8 bits tip over.
        way = (expected - start).norm()
        assert way > 0
        assert (param - expected).norm() <= 1e-3 * way


@pytest.mark.parametrize("name", OPTIONS)
def test_a_checkpoint_says_its_format_and_that_of_a_newer_version_is_refused(name: str) -> None:
    weights = gradients(0)
    state = made(name, weights)[0].state_dict()
    assert state[FORMAT_KEY] == FORMAT
    made(name, weights)[0].load_state_dict(state)
    with pytest.raises(ValueError, match=rf"is of format {FORMAT + 1}, .* up to {FORMAT}: a newer one"):
        made(name, weights)[0].load_state_dict({**state, FORMAT_KEY: FORMAT + 1})
