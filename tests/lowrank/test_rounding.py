"""Stochastic rounding: without bias, between neighbours, repeatable, and what it saves in bfloat16 training."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor, nn

from hf_galore import GaLoreAdafactor, GaLoreAdamW, GaLoreAdamW8bit
from hf_galore.lowrank import rounding
from hf_galore.lowrank.rounding import add_rounded_, add_whole_, generator_for, is_identity, round_stochastically
from tests.support.helpers import copied

pytestmark = pytest.mark.arithmetic

CPU = torch.device("cpu")
# A mean is off by more than this many standard errors once in two million times; the seeds are fixed besides.
ERRORS = 5.0
LARGEST = torch.finfo(torch.bfloat16).max


def numbers(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def neighbours(value: float) -> tuple[Tensor, Tensor]:
    """The bfloat16 below and above a float32, or itself twice."""
    exact = torch.tensor(value, dtype=torch.float32)
    nearest = exact.to(torch.bfloat16)
    away = torch.full_like(nearest, math.copysign(math.inf, (exact - nearest.float()).item()))
    other = nearest if nearest.float() == exact else torch.nextafter(nearest, away)
    return torch.minimum(nearest, other), torch.maximum(nearest, other)


# ---- one number


@pytest.mark.parametrize(
    "value",
    [1.001, -1.001, 1 / 3, -math.pi, 1.9999, 1e30, -1e-30, 1e-40, -2.5e-40, 3e-41],
    ids=str,
)
def test_the_mean_is_the_value(value: float) -> None:
    """Of either sign, and subnormal: 3e-41 is below the smallest bfloat16."""
    draws = 20_000
    values = torch.full((draws,), value)
    rounded = round_stochastically(values, numbers()).double()
    low, high = neighbours(value)
    gap = (high.double() - low.double()).item()
    assert gap > 0
    exact = values[0].double().item()  # float32's own rounding of the value is not what is looked at
    share = (exact - low.double().item()) / gap
    deviation = gap * math.sqrt(share * (1 - share))
    assert abs(rounded.mean().item() - exact) < ERRORS * deviation / math.sqrt(draws)
    assert set(rounded.tolist()) == {low.item(), high.item()}


@given(st.floats(min_value=-LARGEST, max_value=LARGEST, width=32, allow_nan=False))
@example(LARGEST)
@example(-LARGEST)
@example(0.0)
@example(2.0**-149)  # the smallest float32
@example(2.0 - 2.0**-23)  # the neighbour above has another exponent
def test_a_value_becomes_one_of_its_neighbours(value: float) -> None:
    rounded = round_stochastically(torch.full((64,), value), numbers())
    low, high = neighbours(value)
    assert rounded.dtype == torch.bfloat16
    assert ((rounded == low) | (rounded == high)).all()


def test_what_bfloat16_can_hold_stays() -> None:
    """Every finite bfloat16 there is, zeros with their signs."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    finite = every[every.isfinite()]
    assert len(finite) == 2**16 - 2 * 2**7  # all but the exponent of infinities and NaNs
    rounded = round_stochastically(finite.float(), numbers())
    assert torch.equal(rounded.view(torch.int16), finite.view(torch.int16))


def test_a_view_that_is_not_contiguous_is_rounded_by_its_indices() -> None:
    values = torch.arange(12.0).reshape(3, 4).mT
    assert torch.equal(round_stochastically(values, numbers()).float(), values)


# ---- the random numbers


def first_numbers(seed: int, index: int, step: int) -> tuple[int, ...]:
    drawn = torch.randint(0, 2**16, (8,), generator=generator_for(CPU, seed, index, step))
    return tuple(drawn.tolist())


def test_the_numbers_are_a_function_of_seed_parameter_and_step() -> None:
    triples = [
        (seed, index, step)
        for seed in (0, 1, 42, 2**32, 2**64 - 1)  # torch's own seeds have up to 64 bits
        for index in (0, 1, 2, 300)
        for step in (1, 2, 3, 100_000)
    ]
    first = [first_numbers(*triple) for triple in triples]
    assert [first_numbers(*triple) for triple in triples] == first
    # Eight numbers of 16 bits would coincide by chance once in 2¹²⁸.
    assert len(set(first)) == len(triples)


def test_drawing_them_leaves_torchs_own_random_state_alone() -> None:
    before = torch.get_rng_state()
    add_rounded_(
        torch.ones(4, dtype=torch.bfloat16),
        torch.ones(4).__getitem__,
        alpha=1e-3,
        decay=1.0,
        generator=generator_for(CPU, 0, 0, 1),
    )
    assert torch.equal(torch.get_rng_state(), before)


# ---- adding


@pytest.mark.parametrize("chunk", [rounding.CHUNK_ELEMENTS, 8, 1])
@pytest.mark.parametrize("shape", [(), (5,), (5, 4), (3, 2, 2)], ids=str)
def test_adding_is_exact_on_average(shape: tuple[int, ...], chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """decay · W + alpha · U, in one chunk and in several, of which the last is shorter."""
    monkeypatch.setattr(rounding, "CHUNK_ELEMENTS", chunk)
    weight = (1 + torch.rand(shape)).to(torch.bfloat16)
    update = torch.randn(shape)
    alpha, decay, draws = -1e-3, 0.998, 2000
    total = torch.zeros(shape, dtype=torch.float64)
    generator = numbers()
    for _ in range(draws):
        moved = weight.clone()
        add_rounded_(moved, rows_of(update), alpha=alpha, decay=decay, generator=generator)
        total += moved.double()
    expected = decay * weight.double() + alpha * update.double()
    # Between 1 and 2 a bfloat16 is 2⁻⁷ from the next, and its deviation at most half of that: 4e-4 for the mean,
    # where decay moves the weights by 2e-3 and more.
    torch.testing.assert_close(total / draws, expected, atol=ERRORS * 2**-8 / math.sqrt(draws), rtol=0)


def rows_of(update: Tensor) -> Callable[[slice], Tensor]:
    return lambda rows: update.reshape(-1)[rows] if update.ndim == 0 else update[rows]


def test_every_row_is_asked_for_once_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounding, "CHUNK_ELEMENTS", 8)
    asked: list[list[int]] = []

    def update(rows: slice) -> Tensor:
        asked.append(list(range(7))[rows])
        return torch.zeros(7, 4)[rows]

    add_rounded_(torch.ones(7, 4, dtype=torch.bfloat16), update, alpha=1.0, decay=1.0, generator=numbers())
    assert asked == [[0, 1], [2, 3], [4, 5], [6]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("skipped", [False, True])
def test_a_skip_that_only_the_device_knows_of(
    skipped: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: nothing moves where the update is skipped, or else what moves where the host knows."""
    start = torch.full((9,), 1.1, dtype=dtype)
    update = torch.zeros(9) if skipped else torch.linspace(-1, 1, 9)
    known, unknown = start.clone(), start.clone()
    options: dict[str, Any] = {"alpha": -0.1, "decay": 0.75}
    add_rounded_(known, update.__getitem__, skip=torch.tensor(0.0), **options)
    monkeypatch.setattr("hf_galore.lowrank.nonfinite._look", lambda skip: None)
    add_rounded_(unknown, update.__getitem__, skip=torch.tensor(float(skipped)), **options)
    assert not torch.equal(known, start)
    assert torch.equal(unknown, start if skipped else known)


def test_a_weight_that_is_not_contiguous_is_updated_in_place() -> None:
    storage = torch.zeros(4, 6, dtype=torch.bfloat16)
    update = torch.arange(24.0).reshape(6, 4)
    add_rounded_(storage.mT, update.__getitem__, alpha=1.0, decay=1.0, generator=numbers())
    assert torch.equal(storage.float(), update.mT)


# ---- in the optimizers

LR = 4e-4
# Target shapes with the rank and the weights that train full-rank. 8-bit moments are in 8 bits from 4,096 elements on.
SIZES: dict[str, tuple[type[Any], tuple[int, int], int]] = {
    "adamw": (GaLoreAdamW, (40, 32), 20),
    "adamw_8bit": (GaLoreAdamW8bit, (80, 64), 60),
    "adafactor": (GaLoreAdafactor, (40, 32), 20),
}


def ones(kind: str, dtype: torch.dtype = torch.bfloat16) -> list[nn.Parameter]:
    """Weights of 1, from which an update of less than 2⁻⁹ leads nowhere: a target, and two that are full-rank."""
    _, shape, _ = SIZES[kind]
    return [nn.Parameter(torch.ones(size, dtype=dtype)) for size in (shape, shape, (500,))]


def optimizer_for(kind: str, params: list[nn.Parameter], **options: Any) -> Any:
    cls, _, rank = SIZES[kind]
    target = {"params": params[:1], "rank": rank, "scale": 0.5, "refresh": "svd", "proj_bits": 16}
    return cls([target, {"params": params[1:]}], lr=LR, weight_decay=0.0, **options)


def train(optimizer: Any, params: list[nn.Parameter], steps: int) -> None:
    """With the same gradient at every step, so that every step is like the first."""
    for step in range(steps):
        for index, param in enumerate(params):
            if step == 0:
                sent = torch.randn(param.shape, generator=numbers(index))
                param.grad = sent.to(torch.bfloat16).to(param.dtype)
        optimizer.step()


@pytest.mark.parametrize("kind", SIZES)
def test_small_updates_arrive_on_average(kind: str) -> None:
    """Where rounding to the nearest loses all of them."""
    steps = 60
    ways: dict[str, list[Tensor]] = {}
    for name, dtype, options in (
        ("float32", torch.float32, {}),
        ("stochastic", torch.bfloat16, {"stochastic_rounding": True}),
        ("nearest", torch.bfloat16, {}),
    ):
        params = ones(kind, dtype)
        train(optimizer_for(kind, params, **options), params, steps)
        ways[name] = [param.detach().double() - 1 for param in params]
    for expected, found, lost in zip(ways["float32"], ways["stochastic"], ways["nearest"], strict=True):
        assert expected.abs().max() < steps * 2**-9  # each step is below what nearest rounding keeps
        assert not lost.any()
        # How far along float32's way it went. A step is off by at most half of 2⁻⁷ (above 1) for a weight, at random.
        share = ((found * expected).sum() / expected.square().sum()).item()
        deviation = 2**-8 * math.sqrt(steps) / expected.norm().item()
        # Bases and products in bfloat16, with three digits, are off by a few per cent at most besides.
        assert abs(share - 1) < ERRORS * deviation + 0.02
        assert ERRORS * deviation < 0.5  # or else it would prove little


def weights_after(kind: str, seed: int, steps: int = 5) -> list[Tensor]:
    torch.manual_seed(seed)
    params = ones(kind)
    optimizer = optimizer_for(kind, params, stochastic_rounding=True)
    torch.rand(seed)  # what else draws from torch's numbers does not matter
    train(optimizer, params, steps)
    return [param.detach() for param in params]


@pytest.mark.parametrize("kind", SIZES)
def test_a_seed_repeats_its_run_and_another_gives_another(kind: str) -> None:
    first, again, other = (weights_after(kind, seed) for seed in (1, 1, 2))
    for one, two, three in zip(first, again, other, strict=True):
        assert torch.equal(one, two)
        assert not torch.equal(one, three)


def test_two_parameters_and_two_steps_are_rounded_differently() -> None:
    params = [nn.Parameter(torch.ones(500, dtype=torch.bfloat16)) for _ in range(2)]
    optimizer = GaLoreAdamW(params, lr=1e-3, stochastic_rounding=True)
    moves = []
    for _ in range(2):
        before = [param.detach().clone() for param in params]
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.step()
        moves.append([param.detach() - start for param, start in zip(params, before, strict=True)])
    assert not torch.equal(*moves[0])
    assert not torch.equal(moves[0][0], moves[1][0])


@pytest.mark.parametrize("kind", SIZES)
def test_a_checkpoint_goes_on_with_the_numbers_of_its_own_seed(kind: str) -> None:
    torch.manual_seed(1)
    params = ones(kind)
    optimizer = optimizer_for(kind, params, stochastic_rounding=True)
    train(optimizer, params, 4)
    saved, weights = copied(optimizer.state_dict()), [param.detach().clone() for param in params]

    torch.manual_seed(2)
    resumed = [nn.Parameter(weight) for weight in weights]
    other = optimizer_for(kind, resumed, stochastic_rounding=True)
    other.load_state_dict(saved)
    train(optimizer, params, 4)
    train(other, resumed, 4)
    for one, two in zip(params, resumed, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("saved_with", [True, False])
def test_a_checkpoint_of_the_other_rounding_is_refused(saved_with: bool) -> None:
    """It would turn the rounding of the resumed run on or off without a word."""
    before, after = ones("adamw"), ones("adamw")
    saved = optimizer_for("adamw", before, stochastic_rounding=saved_with)
    train(saved, before, 2)
    resumed = optimizer_for("adamw", after, stochastic_rounding=not saved_with)
    with pytest.raises(ValueError, match="with stochastic_rounding=true"):
        resumed.load_state_dict(saved.state_dict())
    assert all(bool(group.get("stochastic_rounding")) is not saved_with for group in resumed.param_groups)
    assert all(state["step"] == 0 for state in resumed.state.values())


@pytest.mark.parametrize("saved_with", [True, False])
def test_so_is_one_without_any_projection(saved_with: bool) -> None:
    params = ones("adamw")
    saved = GaLoreAdamW(params, stochastic_rounding=saved_with)
    with pytest.raises(ValueError, match="with stochastic_rounding=true"):
        GaLoreAdamW(params, stochastic_rounding=not saved_with).load_state_dict(saved.state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_weights_than_bfloat16_are_refused(dtype: torch.dtype) -> None:
    params = [nn.Parameter(torch.ones(4, dtype=dtype))]
    with pytest.raises(ValueError, match=rf"stochastic_rounding is for bfloat16.*{dtype}.*lose nothing"):
        GaLoreAdamW(params, stochastic_rounding=True)


def test_beside_bfloat16_weights_others_train_as_ever() -> None:
    """Norms are often kept in float32."""
    mixed = [nn.Parameter(torch.ones(4, dtype=dtype)) for dtype in (torch.bfloat16, torch.float32)]
    alone = nn.Parameter(torch.ones(4))
    train(GaLoreAdamW(mixed, stochastic_rounding=True), mixed, 3)
    assert mixed[1].grad is not None
    other = GaLoreAdamW([alone])
    alone.grad = mixed[1].grad.clone()
    for _ in range(3):
        other.step()
    assert torch.equal(mixed[1], alone)


@pytest.mark.parametrize("cls", [GaLoreAdamW, GaLoreAdamW8bit, GaLoreAdafactor])
def test_a_weight_without_dimensions_trains(cls: type[Any]) -> None:
    """A learnt temperature, say."""
    param = nn.Parameter(torch.ones((), dtype=torch.bfloat16))
    optimizer = cls([param], lr=0.5, stochastic_rounding=True, weight_decay=0.0)
    param.grad = torch.ones_like(param)
    optimizer.step()
    assert param.item() == 0.5  # the first step of all three is the gradient's sign


def test_a_gradient_that_is_not_finite_leaves_the_weight_alone() -> None:
    """Weights of 1.1 that decayed by 1e-3 would be rounded down now and then."""
    params = [nn.Parameter(torch.full(size, 1.1, dtype=torch.bfloat16)) for size in ((40, 32), (500,))]
    groups = [{"params": params[:1], "rank": 20, "proj_bits": 16}, {"params": params[1:]}]
    optimizer = GaLoreAdamW(groups, lr=1e-2, weight_decay=0.1, stochastic_rounding=True)
    train(optimizer, params, 1)
    before = [param.detach().clone() for param in params]
    for param in params:
        param.grad = torch.full_like(param, math.nan)
    optimizer.step()
    for param, start in zip(params, before, strict=True):
        assert torch.equal(param, start)


# ---- weight decay in low precision


def decayed_norms(
    dtype: torch.dtype, *, target: bool, lr: float, steps: int, cls: type[Any] = GaLoreAdamW, **options: Any
) -> tuple[float, float]:
    """The norm of a weight at the start and after `steps` with λ = 0.1."""
    generator = torch.Generator().manual_seed(0)
    weight = nn.Parameter((torch.randn(128, 96, generator=generator) * 0.05).to(dtype))
    start = weight.detach().double().norm().item()
    group = {"rank": 32, "proj_bits": 16, "scale": 1.0} if target else {}
    if dtype == torch.float32:
        options = {}
    optimizer = cls([{"params": [weight], **group}], lr=lr, weight_decay=0.1, **options)
    for _ in range(steps):
        weight.grad = torch.randn(128, 96, generator=generator).to(dtype)
        optimizer.step()
    return start, weight.detach().double().norm().item()


@pytest.mark.parametrize("cls", [GaLoreAdamW, GaLoreAdamW8bit])
@pytest.mark.parametrize("target", [True, False])
@pytest.mark.parametrize("known", [True, False], ids=["host knows", "device knows"])
def test_decay_of_bfloat16_weights_is_that_of_float32(
    cls: type[Any], target: bool, known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """W · (1 − 1e-3) is W in bfloat16: the norm was 5.9 % off after 60 steps. Rounded with the update, it is there."""
    if not known:
        monkeypatch.setattr("hf_galore.lowrank.nonfinite._look", lambda skip: None)
    _, expected = decayed_norms(torch.float32, target=target, lr=1e-2, steps=60, cls=cls)
    start, found = decayed_norms(torch.bfloat16, target=target, lr=1e-2, steps=60, cls=cls)
    assert found == pytest.approx(expected, rel=0.01)
    assert abs(start - expected) > 0.02 * expected  # there was something to be seen


@pytest.mark.parametrize("cls", [GaLoreAdamW, GaLoreAdamW8bit])
@pytest.mark.parametrize("target", [True, False])
def test_at_fine_tuning_rates_only_stochastic_rounding_keeps_the_decay(
    cls: type[Any], target: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """1 − 5e-6 a step, beside updates of 5e-5: half a unit in the last place of 0.05 is 1e-4."""
    common: dict[str, Any] = {"target": target, "lr": 5e-5, "steps": 1500, "cls": cls}
    _, expected = decayed_norms(torch.float32, **common)
    with caplog.at_level("WARNING", logger="hf_galore"):
        _, found = decayed_norms(torch.bfloat16, stochastic_rounding=True, **common)
        assert not [record for record in caplog.records if "decay" in record.getMessage()]
        _, lost = decayed_norms(torch.bfloat16, **common)
    assert found == pytest.approx(expected, rel=0.005)
    assert abs(lost - expected) > 0.005 * expected
    (said,) = (record.getMessage() for record in caplog.records if "decay" in record.getMessage())
    assert "Weight decay does nothing to 1 weight(s)" in said
    assert "stochastic_rounding" in said


def test_a_group_may_round_stochastically() -> None:
    """The seed was the optimizer's, and a KeyError in the first step where only a group asked for it."""
    weights = [nn.Parameter(torch.full((64, 48), 1.0, dtype=torch.bfloat16)) for _ in range(2)]
    groups = [{"params": [weights[0]], "stochastic_rounding": True}, {"params": [weights[1]]}]
    optimizer = GaLoreAdamW(groups, lr=1e-3, weight_decay=0.0)
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert len(weights[0].unique()) == 2  # 1 − 1e-3 is between two neighbours
    assert len(weights[1].unique()) == 1
    with pytest.raises(ValueError, match="stochastic_rounding is for bfloat16"):
        GaLoreAdamW([{"params": [nn.Parameter(torch.ones(4, 4))], "stochastic_rounding": True}])


# ---- decay that rounding takes away


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_decay_is_the_identity_for_every_weight_or_not_for_all(dtype: torch.dtype) -> None:
    weights = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    weights = weights[weights.isfinite() & (weights.abs() >= torch.finfo(dtype).smallest_normal)]
    limit = torch.finfo(dtype).eps / 4
    for lost in (0.0, limit / 100, 0.999 * limit, limit, 1.1 * limit, 0.1):
        same = torch.equal((weights.double() * (1 - lost)).to(dtype), weights)
        assert is_identity(dtype, 1 - lost) <= same
        assert is_identity(dtype, 1 - lost) == (lost < limit)
    assert not torch.equal((weights.double() * (1 - 1.1 * limit)).to(dtype), weights)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("skip", [None, 0.0, 1.0])
def test_a_whole_update_is_rounded_once_with_the_decay(dtype: torch.dtype, skip: float | None) -> None:
    generator = torch.Generator().manual_seed(0)
    before, update = (torch.randn(64, 48, generator=generator).to(dtype) for _ in range(2))
    skipped = skip == 1
    update = update * (not skipped)
    weight, used = before.clone(), update.clone()
    add_whole_(weight, used, alpha=-0.01, decay=1 - 1e-3, skip=None if skip is None else torch.tensor(skip))
    exact = before.double() if skipped else before.double() * (1 - 1e-3) - 0.01 * update.double()
    # Half a unit in the last place, and that of the update.
    own = 0.01 * (update.double().abs() + 0.1 * before.double().abs())
    assert ((weight.double() - exact).abs() <= torch.finfo(dtype).eps * (exact.abs() + 2 * own) / 2).all()
    if not skipped:
        # The decay arrives: on average it is there.
        found = ((weight.double() - before.double() + 0.01 * update.double()) * before.double()).sum()
        assert found / before.double().square().sum() == pytest.approx(-1e-3, rel=0.15)
