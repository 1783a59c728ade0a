"""Every architecture of the zoo trains with `all-linear`: plain, layerwise and with a projected backward, to one end."""

from __future__ import annotations

import copy
import dataclasses
import logging
import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_galore import GaLoreConfig, make_optimizer
from hf_galore.backward.gradient import LowRankGradient
from hf_galore.integrations.target_modules import find_targets
from tests.support.helpers import hooks_on, perturbed, snapshot
from tests.support.zoo import ZOO, Architecture, Batch

STEPS, RANK = 3, 4
# A gap of 2 has refreshes in the three steps. Bases unquantised: a code that rounding tips over is a difference of its
# own size.
ARGS: dict[str, Any] = {"rank": RANK, "update_proj_gap": 2, "scale": 1.0, "proj_bits": 16}
# Adam's first steps are the signs of what rounding decides wherever a gradient is zero but for rounding, as the biases
# of keys have: ε is what keeps those from moving.
RATE, EPS = 3e-3, 1e-3
MODES = {
    "plain": ("galore_adamw", False),
    "layerwise": ("galore_adamw_layerwise", True),
    "projected": ("galore_adamw", True),
}


@dataclasses.dataclass(frozen=True)
class End:
    """What a training came to: the weights, and the loss of the batch before and after."""

    weights: dict[str, Tensor]
    before: float
    after: float


def loss_of(model: nn.Module, batch: Batch, seed: int) -> Tensor:
    """The loss, with the same dropout and masks wherever the seed is the same."""
    torch.manual_seed(seed)
    loss: Tensor = model(**batch).loss
    return loss


def trained(model: nn.Module, batch: Batch, mode: str) -> End:
    """Train a copy of the model for three steps, and look whether the mode is what it says."""
    model = copy.deepcopy(model)
    optim, projected_backward = MODES[mode]
    optimizer = make_optimizer(
        model,
        optim=optim,
        optim_args={**ARGS, "projected_backward": projected_backward},
        lr=RATE,
        eps=EPS,
    )
    targets = find_targets(model, "all-linear", GaLoreConfig(rank=RANK)).projected
    before = float(loss_of(model, batch, 0))
    for step in range(STEPS):
        start = snapshot(model)
        loss_of(model, batch, step).backward()
        # In each step, since most go through another code than one with a refresh.
        if mode == "layerwise":
            moved = [name for name, param in model.named_parameters() if not torch.equal(param, start[name])]
            assert moved, "layerwise, and nothing moved in the backward pass"
            assert all(weight.grad is None or weight.grad.numel() < weight.numel() for weight in targets.values())
        else:
            low_rank = [
                isinstance(weight.grad, LowRankGradient) for weight in targets.values() if weight.grad is not None
            ]
            assert low_rank == [mode == "projected"] * len(low_rank)
        optimizer.step()
        optimizer.zero_grad()
    optimizer.close()
    assert hooks_on(model) == 0
    return End(snapshot(model), before, float(loss_of(model, batch, 0)))


def apart(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> float:
    """How far two ends are apart, of the tensor where it is most: as a fraction of its way and the typical one.

    A tensor that no gradient reaches (an expert without tokens) has no way of its own.
    """
    ways = {name: (weight - start[name]).norm() for name, weight in expected.items()}
    elements = sum(weight.numel() for weight in expected.values())
    typical = math.sqrt(sum(float(way) ** 2 for way in ways.values()) / elements)
    return max(
        float((found[name] - weight).norm() / (ways[name] + typical * math.sqrt(weight.numel())))
        for name, weight in expected.items()
    )


def made(architecture: Architecture) -> tuple[nn.Module, Batch]:
    """The tiny model and its batch, where the installed releases have that architecture."""
    if architecture.name.startswith("diffusers."):
        pytest.importorskip("diffusers")
    return architecture.make()


@pytest.mark.parametrize("architecture", ZOO.values(), ids=list(ZOO))
def test_three_steps_end_alike_in_every_mode(architecture: Architecture, caplog: pytest.LogCaptureFixture) -> None:
    model, batch = made(architecture)
    model.train()
    start = snapshot(model)
    with caplog.at_level(logging.ERROR):
        plain = trained(model, batch, "plain")
        others = {mode: trained(model, batch, mode) for mode in ("layerwise", "projected")}
        nearby = trained(perturbed(copy.deepcopy(model)), batch, "plain")
    # What a perturbation of about a rounding does to this model is the measure; 1e-5 where it does next to nothing, as
    # a refresh from factors rounds otherwise than one from the gradient.
    limit = 1e-5 + 4 * apart(nearby.weights, plain.weights, start)
    assert limit < 0.01, "this model magnifies rounding so much that nothing would be seen"
    for mode, other in others.items():
        assert apart(other.weights, plain.weights, start) <= limit, mode
    assert math.isfinite(plain.before)
    assert plain.after < plain.before


# What has two dimensions or more and is not projected in the tiny models, but for embeddings and heads: what it is.
LEFT_ALONE = 0.1


@pytest.mark.parametrize("architecture", ZOO.values(), ids=list(ZOO))
def test_what_is_trained_there_is_projected(architecture: Architecture) -> None:
    """Modes that agree because nothing is projected would show nothing."""
    model, _ = made(architecture)
    projected = find_targets(model, "all-linear", GaLoreConfig(rank=RANK)).projected.values()
    outside = {
        id(param)
        for module in model.modules()
        if isinstance(module, nn.Embedding) or module is getattr(model, "lm_head", None)
        for param in module.parameters()
    }
    matrices = sum(param.numel() for param in model.parameters() if param.ndim > 1 and id(param) not in outside)
    assert sum(weight.numel() for weight in projected) >= (1 - LEFT_ALONE) * matrices
