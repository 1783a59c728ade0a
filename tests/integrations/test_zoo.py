"""Every architecture of the zoo trains with `all-linear` to one end: plain, layerwise, with a projected backward."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_galore import GaLoreConfig, make_optimizer
from hf_galore.backward.gradient import LowRankGradient
from hf_galore.integrations.target_modules import find_targets
from tests.support.helpers import perturbed, snapshot
from tests.support.zoo import ZOO, Architecture, Batch

STEPS, RANK = 3, 4
# A gap of 2 has refreshes in the three steps. Bases unquantised: a code that rounding tips over is a difference of its
# own size.
ARGS: dict[str, Any] = {"rank": RANK, "update_proj_gap": 2, "scale": 1.0, "proj_bits": 16}
# Adam's first steps are the signs of what rounding decides wherever a gradient is zero but for rounding, as the biases
# of keys have: ε is what keeps those from moving.
RATE, EPS = 3e-3, 1e-3
# A refresh from factors rounds otherwise than one from the gradient: most models end 1e-6 apart. Others magnify that:
# they may end as far apart as a perturbation of about a rounding brings them, but not so far as another update would.
ROUNDING, MOST = 1e-5, 0.01
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
    before = loss_of(model, batch, 0).item()
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
    return End(snapshot(model), before, loss_of(model, batch, 0).item())


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


# Of what has two dimensions or more and is no embedding and no output head: depthwise convolutions, tables of
# positions, what weight normalization keeps, routers and classifiers of fewer rows than the rank.
LEFT_ALONE = 0.2


def share_projected(model: nn.Module) -> float:
    """The share of the parameters in matrices that `all-linear` projects, as a test sees it: modes that agree because
    nothing is projected would show nothing."""
    projected = find_targets(model, "all-linear", GaLoreConfig(rank=RANK)).projected.values()
    head = getattr(model, "get_output_embeddings", lambda: None)()
    outside = {
        id(param)
        for module in model.modules()
        if isinstance(module, nn.Embedding) or module is head
        for param in module.parameters()
    }
    matrices = sum(param.numel() for param in model.parameters() if param.ndim > 1 and id(param) not in outside)
    return sum(weight.numel() for weight in projected) / matrices


def made(architecture: Architecture) -> tuple[nn.Module, Batch]:
    """The tiny model and its batch, where the installed releases have that architecture."""
    if architecture.name.startswith("diffusers."):
        pytest.importorskip("diffusers")
    return architecture.make()


@pytest.mark.parametrize("architecture", ZOO.values(), ids=list(ZOO))
def test_three_steps_end_alike_in_every_mode(architecture: Architecture) -> None:
    model, batch = made(architecture)
    assert share_projected(model) >= 1 - LEFT_ALONE
    model.train()
    start = snapshot(model)
    plain = trained(model, batch, "plain")
    for mode in ("layerwise", "projected"):
        other = apart(trained(model, batch, mode).weights, plain.weights, start)
        if other > ROUNDING:
            nearby = trained(perturbed(copy.deepcopy(model)), batch, "plain")
            assert other <= ROUNDING + min(4 * apart(nearby.weights, plain.weights, start), MOST), mode
    assert math.isfinite(plain.before)
    assert plain.after < plain.before
