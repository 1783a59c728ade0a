"""refresh=random in an optimizer: bases fixed by the run's seed, others for each target and each refresh."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_galore import GaLoreAdamW
from tests.optim.test_classes import gradients, parameters
from tests.support.helpers import (
    EXACT_ARGS,
    OPTIM_ARGS,
    assert_identical,
    copied,
    logged,
    make_trainer,
    snapshot,
    target_of,
    tiny_llama,
)
from tests.support.helpers import train as train_model

GAP = 3
SHAPE = (12, 10)


def made(*params: nn.Parameter, **options: Any) -> GaLoreAdamW:
    group = {"params": list(params), "rank": 4, "update_proj_gap": GAP, "refresh": "random", "proj_bits": 16}
    return GaLoreAdamW([{**group, "stagger": False, **options}])


def bases_by_refresh(optimizer: GaLoreAdamW, *params: nn.Parameter, factor: float = 1.0) -> list[list[Tensor]]:
    """The right bases of each parameter after each of three refreshes."""
    found = []
    for step, gradient in enumerate(gradients(SHAPE, 3 * GAP)):
        for param in params:
            param.grad = gradient * factor
        optimizer.step()
        if step % GAP == 0:
            found.append([copied(target_of(optimizer, param).bases().right) for param in params])
    return found


def test_each_target_and_each_refresh_has_its_own() -> None:
    params = parameters(SHAPE, SHAPE)
    found = [basis for bases in bases_by_refresh(made(*params), *params) for basis in bases]
    overlaps = [(p.mT @ q).square().sum().item() / 4 for i, p in enumerate(found) for q in found[:i]]
    assert max(overlaps) < 0.9  # 0.4 by chance
    for basis in found:
        torch.testing.assert_close(basis.mT @ basis, torch.eye(4), atol=1e-5, rtol=0)


def test_they_are_the_seeds_and_not_the_gradients() -> None:
    """The seed is that of torch when the optimizer was made, whatever was drawn since."""
    found = []
    for seed, factor in ((0, 1.0), (0, -3.0), (1, 1.0)):
        torch.manual_seed(seed)
        (param,) = parameters(SHAPE)
        optimizer = made(param)
        torch.manual_seed(99)
        found.append(bases_by_refresh(optimizer, param, factor=factor))
    assert_identical(found[0], found[1])
    assert not torch.equal(found[0][0][0], found[2][0][0])


def test_a_loaded_run_goes_on_with_the_bases_of_the_first() -> None:
    torch.manual_seed(0)
    (param,), (twin,) = parameters(SHAPE), parameters(SHAPE)
    first = made(param)
    sent = list(gradients(SHAPE, 4 * GAP))
    for gradient in sent[: 2 * GAP]:
        param.grad = gradient
        first.step()
    torch.manual_seed(5)
    second = made(twin)
    second.load_state_dict(copied(first.state_dict()))
    with torch.no_grad():
        twin.copy_(param)
    for gradient in sent[2 * GAP :]:
        for optimizer, weight in ((first, param), (second, twin)):
            weight.grad = gradient
            optimizer.step()
    assert torch.equal(param, twin)
    assert_identical(first.state_dict()["state"], second.state_dict()["state"])


@pytest.mark.parametrize("name", ["galore_adamw", "galore_adamw_8bit_layerwise"])
def test_a_resumed_training_is_an_uninterrupted_one(name: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"optim_args": f"{OPTIM_ARGS}, refresh=random", "save_strategy": "steps", "save_steps": 4}
    whole, resumed = tiny_llama(), tiny_llama(seed=1)
    first = train_model(whole, tmp_path / "whole", name, **options)
    assert logged(first, "loss")[-1] < logged(first, "loss")[0]
    second = make_trainer(resumed, tmp_path / "resumed", name, **options)
    second.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert_identical(snapshot(resumed), snapshot(whole))


def test_layerwise_is_plain(tmp_path: Path) -> None:
    ends = []
    for name in ("galore_adamw", "galore_adamw_layerwise"):
        model = tiny_llama()
        train_model(model, tmp_path, name, optim_args=f"{EXACT_ARGS}, refresh=random")
        ends.append(snapshot(model))
    assert_identical(ends[0], ends[1])
