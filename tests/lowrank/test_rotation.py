"""Moments over a refresh: the formulas against loops in float64, and what the optimizers do with them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from hf_galore import GaLoreAdafactor, GaLoreAdamW, GaLoreAdamW8bit
from hf_galore.config import Moments
from hf_galore.lowrank.projection import Bases, Side, basis_shapes, low_rank_shape, project, projected_back
from hf_galore.lowrank.rotation import Rotation, rotate, rotate_adam, rotate_factored, rotation_between
from hf_galore.optim.optimizer import GaLoreOptimizer
from hf_galore.rules.adam_8bit import QuantizedMoments, dequantize_moments
from tests.support.helpers import assert_identical, copied, target_of

pytestmark = pytest.mark.arithmetic

SIDES: tuple[Side, ...] = ("left", "right", "full")
SHAPE, RANK = (9, 7), 3
BETAS = (0.9, 0.99)
# Both compute in float64, a few dozen operations on numbers of about 1.
EXACT: dict[str, Any] = {"atol": 1e-13, "rtol": 1e-12}

Rows = list[list[float]]


def orthonormal(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    q: Tensor = torch.linalg.qr(torch.randn(rows, columns, generator=generator, dtype=torch.float64))[0]
    return q


def two_bases(side: Side, seed: int = 0) -> tuple[Bases, Bases]:
    """Old bases, and new ones that share some of their span."""
    generator = torch.Generator().manual_seed(seed)
    shapes = basis_shapes(SHAPE, side, RANK)
    old = [None if shape is None else orthonormal(shape[0], shape[1], generator) for shape in shapes]
    new = []
    for p in old:
        noise = None if p is None else torch.randn(p.shape, generator=generator, dtype=torch.float64)
        new.append(None if p is None or noise is None else torch.linalg.qr(p + 0.3 * noise)[0])
    return Bases(*old), Bases(*new)


def adam_moments(side: Side, seed: int = 1) -> tuple[Tensor, Tensor]:
    """m and v such as Adam has after several steps: v is not below m²."""
    generator = torch.Generator().manual_seed(seed)
    shape = low_rank_shape(SHAPE, side, RANK)
    mean = torch.randn(shape, generator=generator, dtype=torch.float64)
    return 0.5 * mean, 0.05 * (mean.square() + torch.rand(shape, generator=generator, dtype=torch.float64))


# ---- the formulas, in loops


def transposed(rows: Rows) -> Rows:
    return [list(column) for column in zip(*rows, strict=True)]


def looped_rows(c: Rows, x: Rows, *, variance: bool) -> Rows:
    """Cx; for variances C²x, and the mean over the old coordinates for what they do not cover of a new one."""
    out = []
    for i in range(len(c)):
        row = []
        for j in range(len(x[0])):
            total = 0.0
            for k in range(len(x)):
                total += (c[i][k] ** 2 if variance else c[i][k]) * x[k][j]
            if variance:
                covered = sum(value**2 for value in c[i])
                total += max(0.0, 1 - covered) * sum(x[k][j] for k in range(len(x))) / len(x)
            row.append(total)
        out.append(row)
    return out


def looped(rotation: Rotation, x: Rows, *, variance: bool) -> Rows:
    """On the rows by the left C, on the columns by the right one."""
    left, right = rotation
    if left is not None:
        x = looped_rows(left.tolist(), x, variance=variance)
    if right is not None:
        x = transposed(looped_rows(right.tolist(), transposed(x), variance=variance))
    return x


def elementwise(function: Callable[..., float], *matrices: Rows) -> Rows:
    return [[function(*values) for values in zip(*rows, strict=True)] for rows in zip(*matrices, strict=True)]


def looped_adam(m: Tensor, v: Tensor, rotation: Rotation, step: int) -> tuple[Tensor, Tensor]:
    corrections = [1 - beta**step for beta in BETAS]
    mean = elementwise(lambda value: value / corrections[0], m.tolist())
    variance = elementwise(lambda value, mean: value / corrections[1] - mean**2, v.tolist(), mean)
    rotated = looped(rotation, mean, variance=False)
    spread = looped(rotation, variance, variance=True)
    first = elementwise(lambda value: value * corrections[0], rotated)
    second = elementwise(lambda mean, value: corrections[1] * abs(value + mean**2), rotated, spread)
    return torch.tensor(first, dtype=torch.float64), torch.tensor(second, dtype=torch.float64)


@pytest.mark.parametrize("step", [1, 7, 5000])
@pytest.mark.parametrize("side", SIDES)
def test_adams_moments_follow_the_formula(side: Side, step: int) -> None:
    old, new = two_bases(side)
    rotation = rotation_between(new, old)
    m, v = adam_moments(side)
    found = rotate_adam(m, v, rotation, step=step, betas=BETAS)
    for mine, expected in zip(found, looped_adam(m, v, rotation, step), strict=True):
        torch.testing.assert_close(mine, expected, **EXACT)


@pytest.mark.parametrize("side", SIDES)
def test_the_factored_moment_follows_the_formula(side: Side) -> None:
    """Each factor is a column of variances, or a row of them, that its own side rotates."""
    old, new = two_bases(side)
    rotation = rotation_between(new, old)
    rows, columns = low_rank_shape(SHAPE, side, RANK)
    row, column = torch.rand(rows, dtype=torch.float64), torch.rand(columns, dtype=torch.float64)
    found_row, found_column = rotate_factored(row, column, rotation)
    expected_row = looped(Rotation(rotation.left, None), [[value] for value in row.tolist()], variance=True)
    expected_column = looped(Rotation(None, rotation.right), [column.tolist()], variance=True)
    torch.testing.assert_close(found_row, torch.tensor(expected_row, dtype=torch.float64).flatten(), **EXACT)
    torch.testing.assert_close(found_column, torch.tensor(expected_column, dtype=torch.float64).flatten(), **EXACT)


# ---- what the formulas are for


def rotations_of_a_subspace(side: Side, turn: Callable[[Tensor], Tensor]) -> Rotation:
    """From bases to others of the same span."""
    old, _ = two_bases(side)
    return rotation_between(Bases(*(None if p is None else turn(p) for p in old)), old)


def signed_permutation(basis: Tensor) -> Tensor:
    """Columns in another order, some of them turned round."""
    return basis[:, [2, 0, 1]] * torch.tensor([1.0, -1.0, -1.0], dtype=basis.dtype)


@pytest.mark.parametrize("side", SIDES)
def test_the_same_basis_changes_nothing(side: Side) -> None:
    rotation = rotations_of_a_subspace(side, lambda basis: basis)
    m, v = adam_moments(side)
    for found, expected in zip(rotate_adam(m, v, rotation, step=5, betas=BETAS), (m, v), strict=True):
        torch.testing.assert_close(found, expected, **EXACT)
    for found, expected in zip(rotate_factored(v[:, 0], v[0], rotation), (v[:, 0], v[0]), strict=True):
        torch.testing.assert_close(found, expected, **EXACT)


@pytest.mark.parametrize("side", SIDES)
def test_columns_that_change_places_or_signs_take_their_moments_along(side: Side) -> None:
    rotation = rotations_of_a_subspace(side, signed_permutation)
    m, v = adam_moments(side)
    found_m, found_v = rotate_adam(m, v, rotation, step=5, betas=BETAS)
    expected_m, expected_v = m, v
    if side != "right":
        expected_m, expected_v = signed_permutation(expected_m.mT).mT, expected_v[[2, 0, 1]]
    if side != "left":
        expected_m, expected_v = signed_permutation(expected_m), expected_v[:, [2, 0, 1]]
    torch.testing.assert_close(found_m, expected_m, **EXACT)
    torch.testing.assert_close(found_v, expected_v, **EXACT)

    found_row, found_column = rotate_factored(v[:, 0], v[0], rotation)
    torch.testing.assert_close(found_row, v[:, 0] if side == "right" else v[[2, 0, 1], 0], **EXACT)
    torch.testing.assert_close(found_column, v[0] if side == "left" else v[0, [2, 0, 1]], **EXACT)


@pytest.mark.parametrize("side", SIDES)
def test_another_basis_of_the_subspace_leaves_the_momentum_where_it_points(side: Side) -> None:
    old, _ = two_bases(side)
    turn = orthonormal(RANK, RANK, torch.Generator().manual_seed(3))
    new = Bases(*(None if p is None else p @ turn for p in old))
    m, v = adam_moments(side)
    found, _ = rotate_adam(m, v, rotation_between(new, old), step=5, betas=BETAS)
    everything = slice(None)
    torch.testing.assert_close(projected_back(found, new, everything), projected_back(m, old, everything), **EXACT)
    assert not torch.allclose(found, m)


@pytest.mark.parametrize("side", ["left", "full"])
def test_the_right_side_is_the_transpose_of_the_left(side: Side) -> None:
    old, new = two_bases(side)
    left, right = rotation_between(new, old)
    m, v = adam_moments(side)
    here = rotate_adam(m, v, Rotation(left, right), step=5, betas=BETAS)
    there = rotate_adam(m.mT, v.mT, Rotation(right, left), step=5, betas=BETAS)
    for found, expected in zip(there, here, strict=True):
        # `full` takes one side after the other: they commute, up to rounding.
        torch.testing.assert_close(found.mT, expected, **EXACT)


def test_both_sides_are_one_after_the_other() -> None:
    old, new = two_bases("full")
    rotation = rotation_between(new, old)
    alone = Rotation(rotation.left, None), Rotation(None, rotation.right)
    m, v = adam_moments("full")
    found, _ = rotate_adam(m, v, rotation, step=5, betas=BETAS)
    torch.testing.assert_close(found, rotate(rotate(m, alone[0]), alone[1]), **EXACT)
    # Around a mean of zero the second moment is the variance, which two steps carry as one does.
    zero = torch.zeros_like(m)
    _, at_once = rotate_adam(zero, v, rotation, step=5, betas=BETAS)
    once = rotate_adam(zero, v, alone[0], step=5, betas=BETAS)
    _, twice = rotate_adam(*once, alone[1], step=5, betas=BETAS)
    torch.testing.assert_close(at_once, twice, **EXACT)


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_what_no_old_coordinate_covers_is_given_their_mean(share: float) -> None:
    """One new coordinate, of which `share` is the first old one."""
    rotation = Rotation(torch.tensor([[math.sqrt(share), 0.0], [0.0, 1.0]], dtype=torch.float64), None)
    v = torch.tensor([[2.0, 3.0], [10.0, 5.0]], dtype=torch.float64)
    mean = v.mean(dim=0)
    expected = torch.stack((share * v[0] + (1 - share) * mean, v[1]))
    m, found = rotate_adam(torch.zeros_like(v), v, rotation, step=4, betas=BETAS)
    assert not m.any()
    torch.testing.assert_close(found, expected, **EXACT)
    row, column = rotate_factored(v[:, 0], v[0], rotation)
    torch.testing.assert_close(row, expected[:, 0], **EXACT)
    torch.testing.assert_close(column, v[0], **EXACT)


def test_a_coordinate_that_is_covered_more_than_whole_loses_nothing() -> None:
    """Quantised bases are a little longer than 1 in places."""
    rotation = Rotation(torch.tensor([[1.1, 0.0], [0.0, 1.0]], dtype=torch.float64), None)
    row = torch.tensor([1.0, 100.0], dtype=torch.float64)
    found, _ = rotate_factored(row, row, rotation)
    torch.testing.assert_close(found, torch.tensor([1.21, 100.0], dtype=torch.float64), **EXACT)


@given(
    st.sampled_from(SIDES),
    st.integers(min_value=0, max_value=10_000),
    st.integers(min_value=1, max_value=10_000),
    st.floats(min_value=0, max_value=4),
)
def test_a_second_moment_is_never_negative(side: Side, seed: int, step: int, size: float) -> None:
    """Not even where v is below m², as it is in 8 bits, or after a gradient that turned round."""
    old, new = two_bases(side, seed)
    generator = torch.Generator().manual_seed(seed)
    shape = low_rank_shape(SHAPE, side, RANK)
    m = torch.randn(shape, generator=generator)
    v = size * torch.rand(shape, generator=generator)
    rotation = rotation_between(new, old)
    _, second = rotate_adam(m, v, rotation, step=step, betas=BETAS)
    row, column = rotate_factored(v.mean(dim=1), v.mean(dim=0), rotation)
    for value in (second, row, column):
        assert value.isfinite().all()
        assert (value >= 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_rotation_is_computed_in_float32_at_least(dtype: torch.dtype) -> None:
    """Of bases in bfloat16, whose product would have three digits."""
    old, new = (Bases(*(None if p is None else p.to(dtype) for p in bases)) for bases in two_bases("full"))
    for found, p, q in zip(rotation_between(new, old), new, old, strict=True):
        assert found is not None
        assert p is not None
        assert q is not None
        assert found.dtype == torch.promote_types(dtype, torch.float32)
        # Nine products of about 0.1 each, summed in float32.
        torch.testing.assert_close(found.double(), p.double().mT @ q.double(), atol=1e-6, rtol=0)


# ---- in the optimizers

# Low-rank gradients of at least 4,096 elements on every side, from where moments are really in 8 bits.
LARGE, LARGE_RANK, GAP = (96, 80), 66, 3
LR, SCALE = 1e-2, 0.5
OPTIMIZERS: dict[str, tuple[type[GaLoreOptimizer], dict[str, Any]]] = {
    "adamw": (GaLoreAdamW, {"betas": BETAS, "weight_decay": 0.0}),
    "adamw_8bit": (GaLoreAdamW8bit, {"betas": BETAS, "weight_decay": 0.0}),
    "adafactor": (GaLoreAdafactor, {}),
    "adafactor_with_momentum": (GaLoreAdafactor, {"beta1": 0.9}),
}


def made(kind: str, moments: Moments, proj_type: Side = "right") -> tuple[GaLoreOptimizer, nn.Parameter]:
    param = nn.Parameter(torch.zeros(LARGE))
    cls, options = OPTIMIZERS[kind]
    group = {"params": [param], "rank": LARGE_RANK, "update_proj_gap": GAP, "scale": SCALE, "proj_type": proj_type}
    group |= {"refresh": "svd", "stagger": False, "moments": moments, "proj_bits": 16}
    optimizer: Any = cls
    return optimizer([group], lr=LR, **options), param


def gradient(number: int) -> Tensor:
    """A steady part, which makes momentum, and a different one every time, which moves the subspace."""
    generator = torch.Generator().manual_seed(0)
    steady = torch.randn(LARGE, generator=generator)
    return steady + torch.randn(LARGE, generator=generator.manual_seed(1 + number))


def before_a_refresh(
    kind: str, moments: Moments, proj_type: Side = "right"
) -> tuple[GaLoreOptimizer, nn.Parameter, dict[str, Any]]:
    """An optimizer that has its next refresh at the next step, and its group."""
    optimizer, param = made(kind, moments, proj_type)
    for number in range(GAP):
        param.grad = gradient(number)
        optimizer.step()
    group = optimizer.param_groups[0]
    assert target_of(optimizer, param).due()
    return optimizer, param, group


def refresh(optimizer: GaLoreOptimizer, param: nn.Parameter, group: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        low_rank = target_of(optimizer, param).project(gradient(GAP), refresh=True)
    assert low_rank is not None
    return low_rank


def moments_of(state: dict[str, Tensor]) -> dict[str, Tensor]:
    found = {key: value for key, value in state.items() if key.startswith("exp_avg")}
    assert found
    return copied(found)  # type: ignore[no-any-return]


def in_float32(state: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """m and v, of 8 bits too."""
    if "exp_avg_absmax" not in state:
        return state["exp_avg"].clone(), state["exp_avg_sq"].clone()
    moments = QuantizedMoments(*(state[key] for key in QuantizedMoments._fields))
    return dequantize_moments(moments)


def test_the_8_bit_moments_of_these_tests_are_in_8_bits() -> None:
    for proj_type in SIDES:
        optimizer, param = made("adamw_8bit", "keep", proj_type)
        assert optimizer.state[param]["exp_avg"].dtype == torch.uint8


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_keep_leaves_them_as_they_were(kind: str) -> None:
    optimizer, param, group = before_a_refresh(kind, "keep")
    before = moments_of(optimizer.state[param])
    old = copied(target_of(optimizer, param).bases())  # in 16 bits they are the state's own tensors
    refresh(optimizer, param, group)
    assert_identical(moments_of(optimizer.state[param]), before)
    new = target_of(optimizer, param).bases()
    assert old.right is not None
    assert new.right is not None
    assert not torch.allclose(new.right, old.right, atol=0.1)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_reset_goes_on_as_a_new_optimizer_with_that_basis_would(kind: str) -> None:
    """Bit for bit, in the refresh's own step and the one after it."""
    optimizer, param, group = before_a_refresh(kind, "reset")
    low_rank = refresh(optimizer, param, group)
    bases = target_of(optimizer, param).bases()
    other, twin = made(kind, "reset")
    with torch.no_grad():
        twin.copy_(param)
        target_of(other, twin).project(gradient(GAP), refresh=True)
        assert bases.right is not None
        # That of the old run has its columns turned to the side of the basis before.
        other.state[twin]["basis_right"].copy_(bases.right)
        for following in (low_rank, project(gradient(GAP + 1), bases)):
            before = param.detach().clone()
            target_of(optimizer, param).update(following.clone())
            target_of(other, twin).update(following.clone())
            assert not torch.equal(param, before)
            assert torch.equal(param, twin)
    assert_identical(moments_of(optimizer.state[param]), moments_of(other.state[twin]))


@pytest.mark.parametrize("kind", ["adamw", "adamw_8bit"])
def test_the_first_step_after_a_reset_is_one_of_normal_size(kind: str) -> None:
    """|N| is 1. With the bias correction of step 6001, which is none, it would be (1 − β₁) / √(1 − β₂), or 3.2."""
    optimizer, param, group = before_a_refresh(kind, "reset")
    group["betas"] = (0.9, 0.999)
    optimizer.state[param]["step"].fill_(6000.0)
    before = param.detach().clone()
    low_rank = refresh(optimizer, param, group)
    with torch.no_grad():
        target_of(optimizer, param).update(low_rank.clone())
    bases = target_of(optimizer, param).bases()
    direction = project((before - param.detach()) / (LR * SCALE), bases)
    # N = R / (|R| + ε), and the rounding of a small move of the weights, projected back and forth.
    torch.testing.assert_close(direction, low_rank.sign(), atol=1e-3, rtol=0)


def refresh_and_compare(optimizer: GaLoreOptimizer, param: nn.Parameter, group: dict[str, Any]) -> Rotation:
    """What a refresh that it makes has done to the bases."""
    old = copied(target_of(optimizer, param).bases())  # in 16 bits they are the state's own tensors
    refresh(optimizer, param, group)
    return rotation_between(target_of(optimizer, param).bases(), old)


@pytest.mark.parametrize("proj_type", SIDES)
@pytest.mark.parametrize("kind", ["adamw", "adamw_8bit"])
def test_rotate_carries_adams_moments_over(kind: str, proj_type: Side) -> None:
    optimizer, param, group = before_a_refresh(kind, "rotate", proj_type)
    before = in_float32(optimizer.state[param])
    rotation = refresh_and_compare(optimizer, param, group)
    expected = rotate_adam(*before, rotation, step=GAP, betas=BETAS)
    for found, value, unrotated in zip(in_float32(optimizer.state[param]), expected, before, strict=True):
        error = ((found - value).norm() / value.norm()).item()
        # The same computation; in 8 bits with a rounding to the dynamic code, of about 1 %.
        assert error <= (0.02 if kind == "adamw_8bit" else 1e-6)
        assert (unrotated - value).norm() / value.norm() > 0.05


@pytest.mark.parametrize("proj_type", SIDES)
@pytest.mark.parametrize("kind", ["adafactor", "adafactor_with_momentum"])
def test_rotate_carries_adafactors_moments_over(kind: str, proj_type: Side) -> None:
    optimizer, param, group = before_a_refresh(kind, "rotate", proj_type)
    before = moments_of(optimizer.state[param])
    rotation = refresh_and_compare(optimizer, param, group)
    row, column = rotate_factored(before["exp_avg_sq_row"], before["exp_avg_sq_col"], rotation)
    expected = {"exp_avg_sq_row": row, "exp_avg_sq_col": column}
    if kind == "adafactor_with_momentum":
        expected["exp_avg"] = rotate(before["exp_avg"], rotation)
    after = moments_of(optimizer.state[param])
    assert set(after) == set(expected)
    for key, value in expected.items():
        torch.testing.assert_close(after[key], value)
    assert any(not torch.allclose(after[key], before[key], rtol=1e-3) for key in after)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_refresh_without_a_gradient_rotates_nothing(kind: str) -> None:
    """The basis stays where the gradient is zero, and so does all else: the step is that of `keep`."""
    ends: list[tuple[Tensor, dict[str, Tensor]]] = []
    settings: tuple[Moments, ...] = ("rotate", "keep")
    for setting in settings:
        optimizer, param, _ = before_a_refresh(kind, setting)
        before = param.detach().clone()
        param.grad = torch.zeros_like(param)
        optimizer.step()
        ends.append((param.detach() - before, moments_of(optimizer.state[param])))
    if kind != "adafactor":  # which has no momentum
        assert ends[1][0].any()
    assert_identical(ends[0], ends[1])


@pytest.mark.parametrize("setting", ["rotate", "reset"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_refresh_without_a_gradient_comes_with_the_next_one(kind: str, setting: Moments) -> None:
    """The step without a gradient leaves the refresh due, moments included: nothing is lost, nothing done twice."""
    optimizer, param, group = before_a_refresh(kind, setting)
    param.grad = torch.zeros_like(param)
    optimizer.step()
    assert target_of(optimizer, param).due()
    before, old = copied(optimizer.state[param]), copied(target_of(optimizer, param).bases())
    refresh(optimizer, param, group)
    assert not target_of(optimizer, param).due()
    after = moments_of(optimizer.state[param])
    if setting == "reset":
        assert not any(value.any() for value in after.values())
        return
    expected = copied(before)
    with torch.no_grad():
        target = target_of(optimizer, param)
        rotation = rotation_between(target.bases(), old)
        target.rule.rotate_({key: expected[key] for key in target.moment_keys}, group, rotation, GAP + 1)
    assert_identical(after, moments_of(expected))
    assert any(not torch.equal(value, before[key]) for key, value in after.items())


# ---- what it is good for


def turning(steps: int) -> list[Tensor]:
    """Gradients of rank 4 whose subspace turns by a hundredth a step, all directions in it nearly as strong."""
    generator = torch.Generator().manual_seed(0)
    left = torch.linalg.qr(torch.randn(32, 8, generator=generator))[0]
    right = torch.linalg.qr(torch.randn(24, 4, generator=generator))[0]
    out = []
    for step in range(steps):
        angle = 0.01 * step
        basis = math.cos(angle) * left[:, :4] + math.sin(angle) * left[:, 4:]
        # Which singular vectors such a matrix has is up to the noise: only their span is well defined.
        out.append(basis @ (torch.eye(4) + 0.05 * torch.randn(4, 4, generator=generator)) @ right.mT)
    return out


def lowest_cosine(moments: Moments) -> float:
    """Of the momentum, projected back, before each refresh with that after it."""
    param = nn.Parameter(torch.zeros(32, 24))
    options: dict[str, Any] = {"rank": 4, "update_proj_gap": 5, "proj_type": "left", "refresh": "svd", "proj_bits": 16}
    optimizer = GaLoreAdamW([{"params": [param], "stagger": False, "moments": moments, **options}], lr=1e-3)
    found = []
    for step, sent in enumerate(turning(31)):
        state = optimizer.state[param]
        due = target_of(optimizer, param).due()
        old = projected_back(state["exp_avg"], target_of(optimizer, param).bases(), slice(None))
        with torch.no_grad():
            low_rank = target_of(optimizer, param).project(sent, refresh=due)
            assert low_rank is not None
            new = projected_back(state["exp_avg"], target_of(optimizer, param).bases(), slice(None))
            target_of(optimizer, param).update(low_rank)
        if due and step > 0:
            found.append(torch.cosine_similarity(old.flatten(), new.flatten(), dim=0).item())
    assert len(found) == 6
    return min(found)


def test_rotated_momentum_keeps_its_direction_while_the_subspace_turns() -> None:
    """`keep` gives each coordinate the momentum of whichever singular vector had its place."""
    # Ten steps of β₁ = 0.9 are a tenth of a radian: its cosine is 0.995.
    assert lowest_cosine("rotate") > 0.99
    assert lowest_cosine("keep") < 0.9
