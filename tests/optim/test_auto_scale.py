"""`scale=auto`: a number of each matrix, by which a step is as long whatever the rank."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_galore import GaLoreAdamW, GaLoreAdamW8bit, GaLoreConfig
from hf_galore.lowrank.scales import AUTO_OF_OTHERS, auto_scale, scale_of
from tests.support.helpers import (
    OPTIM_ARGS,
    RANK,
    assert_identical,
    copied,
    make_trainer,
    optimizer_of,
    snapshot,
    target_of,
    tiny_llama,
)
from tests.support.helpers import train as train_model

SHAPES = [(12, 10), (24, 40), (3, 16, 24), (8, 4, 3, 3)]
OPTIONS: dict[str, Any] = {"rank": 4, "update_proj_gap": 3}
WHOLE = {"rule": "muon", "residual": "muon"}
AUTO = OPTIM_ARGS.replace("scale=0.5", "scale=auto")


def parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def train(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], steps: int, seed: int = 2) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for param in params:
            strengths = torch.logspace(0, -1, param.shape[-1])  # singular values that are not all alike
            param.grad = torch.randn(param.shape, generator=generator) * strengths
        optimizer.step()


@pytest.mark.parametrize("options", [{}, {"rule": "muon"}, {"residual": "fira"}, {"scaling": "channel"}], ids=str)
def test_it_is_the_number_of_each_matrix(options: dict[str, Any]) -> None:
    """Which the parameters' shapes as matrices give: a convolution's is that of its outputs."""
    auto, numbers = parameters(), parameters()
    group = {**OPTIONS, **options, "basis_seed": 0}
    optimizer = GaLoreAdamW([{"params": auto, "scale": "auto", **group}], weight_decay=0.1)
    found = [scale_of(optimizer.param_groups[0], target_of(optimizer, param).matrix_shape) for param in auto]
    assert len(set(found)) == 4
    other = GaLoreAdamW(
        [{"params": [param], "scale": scale, **group} for param, scale in zip(numbers, found, strict=True)],
        weight_decay=0.1,
    )
    train(optimizer, auto, 5)
    train(other, numbers, 5)
    assert_identical(auto, numbers)


def length(rank: int, shape: tuple[int, ...], **options: Any) -> float:
    """Of the third step, from random gradients."""
    (param,) = (nn.Parameter(torch.zeros(shape)),)
    group = {"rank": rank, "scale": "auto", "refresh": "random", **options}
    if "scaling" in options:
        del group["refresh"]
    optimizer = GaLoreAdamW([{"params": [param], **group, "basis_seed": 3}], weight_decay=0.0)
    train(optimizer, [param], 2)
    before = param.detach().clone()
    train(optimizer, [param], 1, seed=4)
    return float((param.detach() - before).norm())


@pytest.mark.parametrize("shape", [(256, 128), (96, 160), (2, 96, 128)], ids=str)
@pytest.mark.parametrize(
    ("options", "within"),
    [
        ({}, 1.05),
        ({"rule": "lion"}, 1.05),
        ({"scaling": "tensor"}, 1.05),
        # A channel's scale is 1/‖R_j‖, whose mean over r random numbers is about √(r / (r − 2)) of what many give.
        ({"scaling": "channel"}, 1.2),
        # Its singular values end between 0.7 and 1.2, by where they were.
        ({"rule": "muon"}, 1.2),
        (WHOLE, 1.05),
        ({**WHOLE, "residual": "normuon"}, 1.05),
        # R has r² elements, few at the lowest rank; and of the other side r · min(m, n).
        ({"proj_type": "full"}, 1.2),
        ({"proj_type": "reverse_std"}, 1.05),
    ],
    ids=str,
)
def test_a_step_is_as_long_whatever_the_rank(options: dict[str, Any], within: float, shape: tuple[int, ...]) -> None:
    """Of ranks that are 7 times each other; with one number for all, it would be 2.7 times as long."""
    lengths = [length(rank, shape, **options) for rank in (12, 24, 48, 84)]
    assert min(lengths) > 0
    assert max(lengths) < within * min(lengths)


def test_a_step_is_as_long_whatever_the_side() -> None:
    lengths = [length(16, (256, 64), proj_type=side) for side in ("std", "reverse_std", "full")]
    assert max(lengths) < 1.05 * min(lengths)


def test_a_higher_rank_has_a_lower_scale() -> None:
    scales = [auto_scale({"rank": rank}, (2, 4096, 11008)) for rank in (16, 64, 256, 1024)]
    assert scales == sorted(scales, reverse=True)
    assert auto_scale({"rank": 16}, (4096, 11008)) == auto_scale({"rank": 16}, (11008, 4096)) == scales[0]


def test_a_multiple_of_auto_is_that_of_its_number() -> None:
    group = {"rank": 16, "scaling": "none", "rule": None}
    for text, factor in (("auto", 1), ("auto*8", 8), ("auto * 0.5", 0.5), ("AUTO*2e-1", 0.2), ("auto*1.0", 1)):
        config = GaLoreConfig.from_optim_args(f"rank=16, scale={text}")
        assert GaLoreConfig.from_optim_args(config.optim_args()) == config
        assert scale_of({**group, "scale": config.scale}, (64, 256)) == factor * auto_scale(group, (64, 256))
    lengths = {scale: length(16, (64, 256), scale=scale) for scale in ("auto", "auto*4")}
    assert math.isclose(lengths["auto*4"], 4 * lengths["auto"], rel_tol=1e-4)


def test_signs_of_a_residual_are_as_large_at_any_rank() -> None:
    """They are 1 each before they are scaled, where elements of what is projected back grow with the rank."""
    smallest = []
    for rank in (4, 16):
        param = nn.Parameter(torch.zeros(64, 96, dtype=torch.float64))
        group = {"rank": rank, "scale": "auto", "residual": "sign", "residual_scale": 100.0, "proj_bits": 16}
        optimizer = GaLoreAdamW([{"params": [param], **group}], lr=1.0, weight_decay=0.0)
        param.grad = torch.randn(64, 96, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        optimizer.step()
        smallest.append(param.detach().abs().median().item())
    assert math.isclose(smallest[0], 100 * AUTO_OF_OTHERS, rel_tol=0.05)
    assert math.isclose(smallest[1], 100 * AUTO_OF_OTHERS, rel_tol=0.05)


def test_a_checkpoint_says_auto_and_goes_on() -> None:
    whole, resumed = parameters(), parameters()
    first, second = (
        GaLoreAdamW([{"params": params, "scale": "auto", **OPTIONS}], weight_decay=0.1) for params in (whole, resumed)
    )
    train(first, whole, 4)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    with torch.no_grad():
        for param, other in zip(resumed, copied(whole), strict=True):
            param.copy_(other)
    saved = torch.load(file, weights_only=True)
    assert saved["param_groups"][0]["scale"] == "auto"
    second.load_state_dict(saved)
    train(first, whole, 4, seed=5)
    train(second, resumed, 4, seed=5)
    assert_identical(whole, resumed)
    of_a_number = GaLoreAdamW([{"params": parameters(), "scale": 0.25, **OPTIONS}])
    with pytest.raises(ValueError, match=r"scale=auto.*this optimizer was made with .*scale=0\.25"):
        of_a_number.load_state_dict(saved)


def test_what_is_no_scale() -> None:
    for wrong in ("automatic", "0.25", 0, None, "auto*", "auto*0", "auto*nan", "auto*-2", "2*auto", "auto2"):
        with pytest.raises(
            ValueError, match="GaLore's scale has to be a finite number above 0, or auto, or a multiple of it"
        ):
            GaLoreAdamW([{"params": parameters(), **OPTIONS, "scale": wrong}])


def test_a_trainer_takes_it_and_resumes(tmp_path: Path) -> None:
    """And trains other weights than by the number that it had."""
    options: dict[str, Any] = {"optim_args": AUTO, "save_strategy": "steps", "save_steps": 4}
    whole, resumed, number = tiny_llama(), tiny_llama(seed=1), tiny_llama()
    first = train_model(whole, tmp_path / "whole", "galore_adamw_8bit_layerwise", **options)
    second = make_trainer(resumed, tmp_path / "resumed", "galore_adamw_8bit_layerwise", **options)
    second.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert_identical(snapshot(resumed), snapshot(whole))
    assert_identical(optimizer_of(second).state_dict()["state"], optimizer_of(first).state_dict()["state"])
    train_model(number, tmp_path / "number", "galore_adamw_8bit_layerwise")
    assert not torch.equal(snapshot(number)["lm_head.weight"], snapshot(whole)["lm_head.weight"])
    optimizer = optimizer_of(first)
    assert isinstance(optimizer, GaLoreAdamW8bit)
    scales = {scale_of(target.group, target.matrix_shape) for target in optimizer.targets()}
    assert scales == {auto_scale({"rank": RANK}, (64, 256))}  # of all, whose smaller side is 64


def test_stochastic_rounding_takes_it() -> None:
    """Where a warning of lost decay goes by the length of a step."""
    weight: Tensor = torch.full((64, 48), 0.01, dtype=torch.bfloat16)
    for rounding in (False, True):
        param = nn.Parameter(weight.clone())
        options = {**OPTIONS, "scale": "auto", "stochastic_rounding": rounding}
        optimizer = GaLoreAdamW([{"params": [param], **options}], lr=1e-2, weight_decay=0.1)
        param.grad = torch.randn(64, 48).bfloat16()
        optimizer.step()
        assert not torch.equal(param, weight)
