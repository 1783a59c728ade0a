"""Muon on low-rank gradients: the papers' update, torch's own where nothing is projected away, and no noise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_galore import GaLoreAdafactor, GaLoreAdamW, GaLoreAdamW8bit
from hf_galore.lowrank.rotation import rotation_between
from hf_galore.optim import GaLoreOptimizer
from hf_galore.rules.muon import Over, orthogonalised
from tests.lowrank.test_orthonormal import TF32
from tests.lowrank.test_orthonormal import in_tf32 as in_tf32
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
from tests.support.reference import ReferenceMuon

RANK, GAP, SCALE = 4, 5, 0.5
OPTIONS: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1}


def projected(*params: nn.Parameter, **options: Any) -> dict[str, Any]:
    values = {"rank": RANK, "update_proj_gap": GAP, "scale": SCALE, "rule": "muon", **PUBLISHED, **options}
    return {"params": list(params), **values}


def stepped(optimizer: torch.optim.Optimizer, param: nn.Parameter, gradient: Tensor) -> Tensor:
    """The gradient's step: what the weight lost."""
    before = param.detach().clone()
    param.grad = gradient
    optimizer.step()
    return before - param.detach()


# ---- the update


@pytest.mark.parametrize("shape", [(12, 10), (10, 12)], ids=str)
@pytest.mark.parametrize("proj_type", ["std", "reverse_std", "full"])
def test_it_follows_the_papers_in_float64(shape: tuple[int, int], proj_type: str) -> None:
    (param,) = parameters(shape, dtype=torch.float64)
    optimizer = GaLoreAdamW([projected(param, proj_type=proj_type)], **OPTIONS)
    reference = ReferenceMuon(
        param.detach().numpy(),
        rank=RANK,
        gap=GAP,
        scale=SCALE,
        proj_type=proj_type,
        betas=(0.0, 0.0),
        eps=0.0,
        **OPTIONS,
    )
    for gradient in gradients(shape, 50, torch.float64):
        stepped(optimizer, param, gradient)
        reference.step(gradient.numpy())
        torch.testing.assert_close(param.detach(), torch.from_numpy(reference.W), rtol=0, atol=1e-6)


@pytest.mark.parametrize("turned", [False, True])
def test_where_nothing_is_projected_away_it_is_torchs_muon(turned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of gradients of rank 7 in one span a basis of rank 7 has all, whichever, with the momentum carried over."""
    monkeypatch.setattr(Tensor, "bfloat16", lambda tensor: tensor)  # which torch's takes its steps in
    shape = (8, 12) if turned else (12, 8)
    ours, theirs = (parameters(shape, dtype=torch.float64)[0] for _ in range(2))
    group = projected(ours, rank=7, scale=1.0, moments="rotate", momentum=0.9)
    optimizer = GaLoreAdamW([group], **OPTIONS)
    muon = torch.optim.Muon([theirs], momentum=0.9, adjust_lr_fn="match_rms_adamw", **OPTIONS)
    generator = torch.Generator().manual_seed(0)
    span = torch.randn(7, 8, dtype=torch.float64, generator=generator)
    for _ in range(3 * GAP):
        gradient = torch.randn(12, 7, dtype=torch.float64, generator=generator) @ span
        gradient = gradient.mT.contiguous() if turned else gradient
        theirs.grad = gradient.clone()
        muon.step()
        stepped(optimizer, ours, gradient)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)


@pytest.mark.parametrize("shape", [(256, 64), (64, 256), (3, 96, 64)], ids=str)
def test_an_element_is_as_large_as_adams(shape: tuple[int, ...]) -> None:
    """Whose root mean square Moonlight gives as 0.2 to 0.4; singular values end between 0.7 and 1.2."""
    (param,) = parameters(shape)
    optimizer = GaLoreAdamW([projected(param, rank=16, scale=1.0)], lr=1.0, weight_decay=0.0)
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        moved = stepped(optimizer, param, torch.randn(shape, generator=generator))
    target = target_of(optimizer, param)
    direction = target.projected_by(moved, target.bases())
    assert 0.14 < direction.square().mean().sqrt() < 0.24


# ---- no noise


def singular(values: Tensor, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """A matrix with these singular values, and its singular vectors."""
    generator = torch.Generator().manual_seed(1)
    left, right = (
        torch.linalg.qr(torch.randn(rows, len(values), dtype=torch.float64, generator=generator))[0]
        for rows in (len(values), columns)
    )
    return (left * values) @ right.mT, left, right


def test_what_is_rounding_in_the_momentum_is_little_in_the_direction() -> None:
    """Of the direction's largest singular value, 1e-3; a tenth of the largest is made as large as that."""
    noise = torch.full((40,), 1e-7, dtype=torch.float64)
    matrix, left, right = singular(torch.cat([torch.logspace(0, -1, 24, dtype=torch.float64), noise]), 300)
    for given in (matrix.float(), matrix.float().mT):
        found = orthogonalised(given, Over())
        found = (found if given.shape == matrix.shape else found.mT).double()
        of_singular = left.mT @ found @ right
        values = torch.linalg.svdvals(of_singular[:24, :24])
        assert 0.6 < values.min() <= values.max() < 1.3
        assert torch.linalg.matrix_norm(of_singular[24:], 2) < 1e-3
        assert torch.linalg.matrix_norm(of_singular[:, 24:], 2) < 1e-3


@pytest.mark.usefixtures("in_tf32")
def test_the_same_where_products_of_float32_are_computed_in_tf32() -> None:
    """By products in parts, which are precise; rounded ones would bring up a noise of their own."""
    noise = torch.full((48,), 1e-7, dtype=torch.float64)
    matrix, left, _ = singular(torch.cat([torch.logspace(0, -1.5, 16, dtype=torch.float64), noise]), 300)
    expected = orthogonalised(matrix, Over())
    with TF32():
        found = orthogonalised(matrix.float(), Over()).double()
    assert torch.linalg.matrix_norm(found - expected, 2) < 1e-3
    assert torch.linalg.matrix_norm(left[:, 16:].mT @ found, 2) < 1e-3


def test_a_column_that_is_zero_stays_zero() -> None:
    """As R has it where a gradient's rank is below the basis's: a column of the basis is zero then."""
    matrix = torch.randn(40, 8, generator=torch.Generator().manual_seed(2))
    matrix[:, 5:] = 0
    assert not orthogonalised(matrix, Over())[:, 5:].any()
    assert not orthogonalised(torch.zeros(3, 8, 40), Over()).any()


@pytest.mark.parametrize("refresh", ["svd", "subspace", "randomized"])
def test_gradients_of_a_lower_rank_than_the_basis_move_the_weight_in_their_span(refresh: str) -> None:
    """One token, say, has a gradient of rank 1."""
    (param,) = parameters((64, 48))
    optimizer = GaLoreAdamW([projected(param, rank=16, refresh=refresh, update_proj_gap=3)], lr=1.0, weight_decay=0.0)
    generator = torch.Generator().manual_seed(3)
    span = torch.randn(3, 48, generator=generator)
    inside = torch.linalg.qr(span.mT)[0]
    for _ in range(7):
        moved = stepped(optimizer, param, torch.randn(64, 3, generator=generator) @ span)
        outside = moved - moved @ inside @ inside.mT
        assert torch.linalg.matrix_norm(outside, 2) < 1e-3 * torch.linalg.matrix_norm(moved, 2)


def test_a_stack_is_orthogonalised_matrix_by_matrix() -> None:
    stack = (
        torch.randn(3, 8, 40, generator=torch.Generator().manual_seed(4))
        * torch.tensor([1.0, 1e-6, 1e6])[:, None, None]
    )
    found = orthogonalised(stack, Over())
    for one, of_stack in zip(stack, found, strict=True):
        torch.testing.assert_close(of_stack, orthogonalised(one, Over()), rtol=0, atol=1e-5)


def test_a_matrix_without_a_gradient_does_not_move() -> None:
    """An expert of a stack without tokens: Muon's momentum fades, and its direction does not."""
    (param,) = parameters((3, 24, 16))
    optimizer = GaLoreAdamW([projected(param)], lr=1e-2, weight_decay=0.0)
    for step, gradient in enumerate(gradients((3, 24, 16), 3)):
        gradient[1] *= step == 0
        moved = stepped(optimizer, param, gradient)
        assert [one.any().item() for one in moved] == [True, step == 0, True]
    momentum = optimizer.state[param]["momentum_buffer"]
    assert 0 < momentum[1].norm() < momentum[0].norm()


@pytest.mark.parametrize("size", [1e-16, 1e-20, 1e-23, 1e-30, 1e-44])
def test_a_momentum_of_next_to_nothing_fades(size: float) -> None:
    """Squares of its elements are nothing in float32: divided by that, it would be NaN for good."""
    matrix = torch.randn(2, 8, 40, generator=torch.Generator().manual_seed(5))
    found = orthogonalised(matrix * size, Over())
    assert (found.abs() <= orthogonalised(matrix, Over()).abs().max() * 2).all()
    assert torch.linalg.matrix_norm(found, 2).max() < 1.3


# ---- what holds for every rule


@pytest.mark.parametrize("knows", [True, False], ids=["host-knows", "device-knows"])
def test_a_gradient_that_is_not_finite_changes_nothing(knows: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not knows:
        monkeypatch.setattr("hf_galore.lowrank.nonfinite._look", lambda skip: None)
    (param,) = parameters((12, 10))
    optimizer = GaLoreAdamW([projected(param, update_proj_gap=100)], **OPTIONS)
    train(optimizer, [param], 3)
    before = copied([param, optimizer.state[param]["momentum_buffer"]])
    for value in ("nan", "inf"):
        stepped(optimizer, param, torch.full_like(param, float(value)))
    assert_identical([param, optimizer.state[param]["momentum_buffer"]], before)
    assert {skipped.times for skipped in optimizer.skipped_updates().values()} == {2}
    assert stepped(optimizer, param, torch.randn_like(param)).any()


@pytest.mark.parametrize("moments", ["keep", "rotate", "reset"])
def test_its_momentum_goes_over_a_refresh_as_asked(moments: str) -> None:
    (param,) = parameters((12, 10))
    optimizer = GaLoreAdamW([projected(param, moments=moments)], **OPTIONS)
    train(optimizer, [param], GAP)
    target = target_of(optimizer, param)
    *_, following = gradients((12, 10), GAP + 1)
    before, old = optimizer.state[param]["momentum_buffer"].clone(), copied(target.bases())
    assert target.due()
    with torch.no_grad():
        target.project(following, refresh=True)
    found, rotation = optimizer.state[param]["momentum_buffer"], rotation_between(target.bases(), old)
    assert rotation.right is not None
    carried = before @ rotation.right.mT
    assert not torch.allclose(carried, before)
    torch.testing.assert_close(found, {"keep": before, "rotate": carried, "reset": torch.zeros_like(before)}[moments])


@pytest.mark.parametrize("make", [GaLoreAdamW, GaLoreAdamW8bit, GaLoreAdafactor])
def test_what_is_not_projected_goes_by_the_optimizers_own_rule(make: Any) -> None:
    """A matrix of its own group, too, that is too small to be projected."""
    found = []
    for rule in ({}, {"rule": "muon"}):
        matrix, small, vector = parameters((96, 80), (50, 40), (7,))
        group = projected(matrix, small, rank=64)
        group.pop("rule")
        optimizer = make([{**group, **rule}, {"params": [vector]}], lr=1e-2)
        assert (optimizer.trained(matrix).moment_keys == ("momentum_buffer",)) == bool(rule)
        train(optimizer, [matrix, small, vector], 3)
        found.append([copied(p.detach()) for p in (small, vector)])
        if rule:
            assert optimizer.state[matrix]["momentum_buffer"].dtype == torch.float32
    assert_identical(found[0], found[1])


def test_its_state_is_half_of_adams() -> None:
    bytes_of = {}
    for rule in ("adam", "muon"):
        (param,) = parameters((96, 80))
        bytes_of[rule] = GaLoreAdamW([projected(param, rule=rule, rank=64)]).memory().moment_bytes
    assert bytes_of["muon"] * 2 == bytes_of["adam"] == 8 * 96 * 64


def test_bfloat16_weights_have_a_momentum_in_float32() -> None:
    (param,) = parameters((24, 16), dtype=torch.bfloat16)
    optimizer = GaLoreAdamW([{**projected(param), "stochastic_rounding": True}], lr=1e-2, weight_decay=0.1)
    assert stepped(optimizer, param, torch.randn(24, 16).bfloat16()).any()
    assert optimizer.state[param]["momentum_buffer"].dtype == torch.float32


def test_what_it_refuses() -> None:
    (matrix,) = parameters((12, 10))
    with pytest.raises(
        ValueError, match=r"rule has to be one of .*lion, but is 'muon'. muon is for projected matrices"
    ):
        GaLoreOptimizer([matrix], rule="muon")
    for momentum in (-0.1, 1.0):
        with pytest.raises(ValueError, match=f"momentum has to be at least 0.* but is {momentum}"):
            GaLoreAdamW([projected(matrix, momentum=momentum)])


def test_layerwise_is_plain_under_the_trainer(tmp_path: Path) -> None:
    ends = []
    for name in ("galore_adamw", "galore_adamw_layerwise"):
        model = tiny_llama()
        trainer = train_model(model, tmp_path, name, optim_args=f"{EXACT_ARGS}, rule=muon")
        assert logged(trainer, "loss")[-1] < logged(trainer, "loss")[0]
        ends.append(snapshot(model))
    assert_identical(ends[0], ends[1])


def test_a_resumed_run_is_an_uninterrupted_one(tmp_path: Path) -> None:
    options: dict[str, Any] = {"optim_args": f"{OPTIM_ARGS}, rule=muon", "save_strategy": "steps", "save_steps": 4}
    whole, resumed = tiny_llama(), tiny_llama(seed=1)
    first = train_model(whole, tmp_path / "whole", "galore_adamw_8bit_layerwise", **options)
    second = make_trainer(resumed, tmp_path / "resumed", "galore_adamw_8bit_layerwise", **options)
    second.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert second.state.global_step == first.state.global_step
    assert_identical(snapshot(resumed), snapshot(whole))
    assert_identical(optimizer_of(second).state_dict()["state"], optimizer_of(first).state_dict()["state"])
