"""Lion on low-rank gradients: the paper's update, and all that holds for every rule."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bitsandbytes.optim.lion import Lion32bit
from torch import nn

from hf_galore import GaLoreAdafactor, GaLoreAdamW, GaLoreAdamW8bit
from hf_galore.lowrank.rotation import rotation_between
from hf_galore.optim import GaLoreOptimizer
from tests.optim.test_classes import PUBLISHED, gradients, parameters, train
from tests.support.helpers import (
    EXACT_ARGS,
    OPTIM_ARGS,
    assert_identical,
    copied,
    logged,
    make_trainer,
    optimizer_of,
    snapshot,
    target_of,
    tiny_llama,
)
from tests.support.helpers import train as train_model

LION: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1}
RANK, GAP, SCALE = 4, 5, 0.5


def lion(params: list[Any], **options: Any) -> GaLoreOptimizer:
    return GaLoreOptimizer(params, rule="lion", **{**LION, **options})


def projected(*params: nn.Parameter, **options: Any) -> dict[str, Any]:
    values = {"rank": RANK, "update_proj_gap": GAP, "scale": SCALE, **PUBLISHED, **options}
    return {"params": list(params), **values}


def test_without_projection_it_is_bitsandbytes_lion() -> None:
    """Which decays first, too. Its fused kernel rounds otherwise: a sign may differ where a mean is next to zero."""
    ours, theirs = parameters((12, 7), (7,)), parameters((12, 7), (7,))
    train(lion([{"params": ours}]), ours, 20)
    train(Lion32bit(theirs, lr=LION["lr"], betas=LION["betas"], weight_decay=LION["weight_decay"]), theirs, 20)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-6, rtol=1e-6)


def test_a_vector_moves_as_the_paper_says() -> None:
    """Signs of means of gradients that are not near zero: nothing that rounding could turn."""
    (param,) = parameters((5,))
    optimizer = lion([param])
    W, m = param.detach().double().numpy().copy(), np.zeros(5)
    for step in range(1, 8):
        g = np.array([1.0, -2.0, 0.5, -0.25, 3.0]) * (-1) ** (step // 3) * step
        param.grad = torch.tensor(g, dtype=torch.float32)
        optimizer.step()
        W *= 1 - LION["lr"] * LION["weight_decay"]
        W -= LION["lr"] * np.sign(LION["betas"][0] * m + (1 - LION["betas"][0]) * g)
        m = LION["betas"][1] * m + (1 - LION["betas"][1]) * g
    np.testing.assert_allclose(param.detach().numpy(), W, rtol=1e-6)
    np.testing.assert_allclose(optimizer.state[param]["exp_avg"].numpy(), m, rtol=1e-5)


@pytest.mark.parametrize("proj_type", ["left", "right", "full"])
def test_a_target_moves_as_the_paper_says(proj_type: str) -> None:
    """R is projected with the optimizer's own bases: what becomes of R is what this is about."""
    (param,) = parameters((12, 10), dtype=torch.float64)
    optimizer = lion([projected(param, proj_type=proj_type)])
    m = np.zeros(1)
    for g in gradients((12, 10), 12, torch.float64):
        before = param.detach().numpy().copy()
        param.grad = g
        optimizer.step()
        left, right = target_of(optimizer, param).bases()
        P = np.eye(12) if left is None else left.numpy()
        Q = np.eye(10) if right is None else right.numpy()
        R = P.T @ g.numpy() @ Q
        c = LION["betas"][0] * m + (1 - LION["betas"][0]) * R
        m = LION["betas"][1] * m + (1 - LION["betas"][1]) * R
        expected = (1 - LION["lr"] * LION["weight_decay"]) * before - LION["lr"] * SCALE * P @ np.sign(c) @ Q.T
        np.testing.assert_allclose(param.detach().numpy(), expected, rtol=0, atol=1e-12)


def test_a_gradient_that_is_not_finite_is_skipped() -> None:
    matrix, vector = parameters((12, 10), (7,))
    optimizer = lion([projected(matrix), {"params": [vector]}])
    train(optimizer, [matrix, vector], 3)
    weights, state = copied([matrix, vector]), copied(optimizer.state_dict())
    for param in (matrix, vector):
        param.grad = torch.full_like(param, float("nan"))
    optimizer.step()
    assert_identical([matrix, vector], weights)
    assert_identical(optimizer.state_dict(), state)
    assert {skipped.times for skipped in optimizer.skipped_updates().values()} == {1}


def test_on_a_device_that_alone_knows_a_skipped_step_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_galore.lowrank.nonfinite._look", lambda skip: None)
    matrix, vector = parameters((12, 10), (7,))
    optimizer = lion([projected(matrix), {"params": [vector]}])
    train(optimizer, [matrix, vector], 3)
    weights, moments = copied([matrix, vector]), copied([optimizer.state[p]["exp_avg"] for p in (matrix, vector)])
    for param in (matrix, vector):
        param.grad = torch.full_like(param, float("inf"))
    optimizer.step()
    assert_identical([matrix, vector], weights)
    assert_identical([optimizer.state[p]["exp_avg"] for p in (matrix, vector)], moments)


@pytest.mark.parametrize("moments", ["rotate", "reset"])
def test_its_moment_goes_over_a_refresh_as_asked(moments: str) -> None:
    (param,) = parameters((12, 10))
    optimizer = lion([projected(param, moments=moments)])
    train(optimizer, [param], GAP)
    target, stream = target_of(optimizer, param), gradients((12, 10), GAP + 1)
    *_, following = stream
    before, old = optimizer.state[param]["exp_avg"].clone(), copied(target.bases())
    assert target.due()
    with torch.no_grad():
        target.project(following, refresh=True)
    if moments == "reset":
        assert not optimizer.state[param]["exp_avg"].any()
        return
    rotation = rotation_between(target.bases(), old)
    assert rotation.right is not None
    torch.testing.assert_close(optimizer.state[param]["exp_avg"], before @ rotation.right.mT)
    assert not torch.equal(optimizer.state[param]["exp_avg"], before)


# ---- by the option


def test_the_option_is_for_targets_and_the_name_for_all_others() -> None:
    matrix, vector = parameters((96, 80), (7,))
    for cls, others in ((GaLoreAdamW, ["exp_avg", "exp_avg_sq"]), (GaLoreAdamW8bit, ["exp_avg", "exp_avg_sq"])):
        optimizer = cls([projected(matrix, rule="lion"), {"params": [vector]}])
        assert list(target_of(optimizer, matrix).moment_keys) == ["exp_avg"]
        assert optimizer.state[matrix]["exp_avg"].dtype == torch.float32
        assert list(optimizer.trained(vector).moment_keys) == others


def test_a_group_with_another_rule_has_that_rules_options() -> None:
    """ε of Adafactor is not Adam's, and β is the optimizer's."""
    matrix, vector = parameters((12, 10), (7,))
    optimizer = GaLoreAdamW([projected(matrix, rule="adafactor"), {"params": [vector]}], eps=1e-6, betas=(0.8, 0.9))
    of_targets, of_others = optimizer.param_groups
    assert (of_targets["eps"], of_targets["clip_threshold"], of_targets["decay_rate"]) == (1e-30, 1.0, -0.8)
    assert (of_others["eps"], of_others["betas"]) == (1e-6, (0.8, 0.9))
    train(optimizer, [matrix, vector], 3)
    assert set(target_of(optimizer, matrix).moment_keys) == {"exp_avg_sq_row", "exp_avg_sq_col"}


def test_an_optimizer_without_beta_leaves_it_to_the_rule() -> None:
    (matrix,) = parameters((12, 10))
    optimizer = GaLoreAdafactor([projected(matrix, rule="lion")], lr=1e-2)
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.99)
    train(optimizer, [matrix], 3)
    assert target_of(optimizer, matrix).moment_keys == ("exp_avg",)


def test_its_own_name_as_option_is_no_other_rule() -> None:
    """8-bit moments stay in 8 bits."""
    (matrix,) = parameters((96, 80))
    options = {"rank": 64}
    optimizer = GaLoreAdamW8bit([projected(matrix, rule="adam", **options)])
    assert optimizer.state[matrix]["exp_avg"].dtype == torch.uint8
    unnamed = GaLoreAdamW8bit([projected(matrix, **options)])
    optimizer.load_state_dict(unnamed.state_dict())
    unnamed.load_state_dict(optimizer.state_dict())


def test_an_option_that_the_rule_refuses() -> None:
    (matrix,) = parameters((12, 10))
    with pytest.raises(ValueError, match="betas have to be two numbers"):
        lion([projected(matrix)], betas=(0.9, 1.0))
    with pytest.raises(ValueError, match=r"rule has to be one of adam, .*lion, but is 'loin'"):
        GaLoreOptimizer([matrix], rule="loin")
    with pytest.raises(ValueError, match="GaLore's rule has to be one of adam, adafactor, lion"):
        GaLoreAdamW([projected(matrix, rule="loin")])
    with pytest.raises(TypeError, match="GaLoreOptimizer has no keyword 'eps'"):
        lion([projected(matrix)], eps=1e-8)


def test_layerwise_is_plain_under_the_trainer(tmp_path: Path) -> None:
    ends = []
    for name in ("galore_adamw", "galore_adamw_layerwise"):
        model = tiny_llama()
        trainer = train_model(model, tmp_path, name, optim_args=f"{EXACT_ARGS}, rule=lion")
        assert logged(trainer, "loss")[-1] < logged(trainer, "loss")[0]
        ends.append(snapshot(model))
    assert_identical(ends[0], ends[1])


def test_a_trainer_warns_of_no_option_that_its_own_optimizer_has(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name, rule in (("galore_adamw", "adam"), ("galore_adamw_8bit", "adam"), ("galore_adamw", "lion")):
        train_model(tiny_llama(), tmp_path, name, optim_args=f"{OPTIM_ARGS}, rule={rule}", max_steps=1)
    assert "trains as it was made" not in caplog.text


def test_a_resumed_run_is_an_uninterrupted_one(tmp_path: Path) -> None:
    options: dict[str, Any] = {"optim_args": f"{OPTIM_ARGS}, rule=lion", "save_strategy": "steps", "save_steps": 4}
    whole, resumed = tiny_llama(), tiny_llama(seed=1)
    first = train_model(whole, tmp_path / "whole", "galore_adamw_8bit_layerwise", **options)
    second = make_trainer(resumed, tmp_path / "resumed", "galore_adamw_8bit_layerwise", **options)
    second.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert second.state.global_step == first.state.global_step
    assert_identical(snapshot(resumed), snapshot(whole))
    assert_identical(optimizer_of(second).state_dict()["state"], optimizer_of(first).state_dict()["state"])


def test_another_rule_cannot_go_on_from_a_checkpoint() -> None:
    (matrix,) = parameters((12, 10))
    saved = lion([projected(matrix)]).state_dict()
    with pytest.raises(ValueError, match=r"does not fit GaLoreAdamW at parameter 0 .*exp_avg_sq"):
        GaLoreAdamW([projected(matrix)]).load_state_dict(saved)


def test_copies_keep_the_rule() -> None:
    matrix, twin = parameters((12, 10), (12, 10))
    optimizer = lion([projected(matrix)])
    train(optimizer, [matrix], 2)
    other = copied(optimizer)
    assert other.rule == "lion"
    (copy,) = other.param_groups[0]["params"]
    train(optimizer, [matrix], 3)
    train(other, [copy], 3)
    assert torch.equal(matrix, copy)
    assert not torch.equal(matrix, twin)
