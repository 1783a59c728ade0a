"""What the benchmark of int8 weights measures, in seconds: they learn as floats do, and to the nearest they do not."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from hf_galore.optim import GaLoreAdamW
from tests.benchmarks.int8_quality import rounding_of
from tests.support.int8 import Net, batch, floats_of, net

STEPS, HELD_OUT = 250, 10_000


def loss_after(model: Net, teacher: Net, contender: str, rate: float) -> float:
    """The held-out loss of a student whose three matrices learn what the teacher's do."""
    model = copy.deepcopy(model)
    weights = model.targets()
    for param in model.parameters():
        param.requires_grad_(any(param is weight for weight in weights))
    group = {"params": weights, "rank": 16, "update_proj_gap": 25, "scale": 0.25}
    torch.manual_seed(0)
    optimizer = GaLoreAdamW([group], lr=rate, weight_decay=0.0, module=model, layerwise=True)

    def loss(step: int) -> torch.Tensor:
        x = batch(step, torch.float32, rows=32)[0]
        with torch.no_grad():
            wanted = teacher(x)
        return nn.functional.mse_loss(model(x), wanted)

    with rounding_of(contender):
        for step in range(STEPS):
            loss(step).backward()
            optimizer.step()
            optimizer.zero_grad()
    optimizer.close()
    with torch.no_grad():
        return sum(loss(HELD_OUT + step).item() for step in range(8)) / 8


@pytest.fixture(scope="module")
def losses() -> dict[str, float]:
    student = net(torch.float32)
    teacher = copy.deepcopy(student)
    with torch.no_grad():
        for weight in teacher.targets():
            noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(2))
            weight.copy_(weight + 0.05 * noise)
    starts = {"float": floats_of(student), "int8": student, "int8, nearest": student}
    found = {name: loss_after(start, teacher, name, 1e-3) for name, start in starts.items()}
    return {**found, "before": loss_after(student, teacher, "int8", 0.0)}


def test_int8_weights_learn_as_floats_do(losses: dict[str, float]) -> None:
    assert losses["float"] < 0.2 * losses["before"]
    assert abs(losses["int8"] / losses["float"] - 1) < 0.1


def test_rounded_to_the_nearest_they_do_not(losses: dict[str, float]) -> None:
    """Most of each update is less than half a step of 8 bits, and lost."""
    assert losses["int8, nearest"] > 5 * losses["int8"]
