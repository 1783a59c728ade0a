"""When bases are refreshed: the arithmetic by itself, and what an optimizer makes of it."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from hf_galore import GaLoreAdafactor, GaLoreAdamW, GaLoreAdamW8bit
from hf_galore.lowrank.schedule import (
    MAX_GAP_FACTOR,
    NEVER,
    STABLE_OVERLAP,
    next_gap_factor,
    phase_of,
    refreshes_by,
    step_of_next_refresh,
)
from hf_galore.optim.optimizer import GaLoreOptimizer
from tests.support.helpers import copied

CLASSES = [GaLoreAdamW, GaLoreAdamW8bit, GaLoreAdafactor]
GAPS = st.integers(1, 30)
FACTORS = st.integers(1, MAX_GAP_FACTOR)


def schedule(gap: int, phase: int, gap_factor: int = 1) -> Iterator[int]:
    """The steps at which a target refreshes, one after the other."""
    at = NEVER
    while True:
        at = step_of_next_refresh(at, gap, phase, gap_factor)
        yield at


def until(steps: Iterator[int], end: int) -> list[int]:
    return list(itertools.takewhile(lambda step: step < end, steps))


# ---- the arithmetic


@given(count=st.integers(1, 60), gap=GAPS)
def test_staggered_targets_refresh_once_a_gap_and_few_at_a_time(count: int, gap: int) -> None:
    gaps = 4
    phases = [phase_of(index, count, gap) for index in range(count)]
    assert phases == sorted(phases)
    assert all(0 <= phase < gap for phase in phases)
    end = 1 + gaps * gap
    refreshes = [until(schedule(gap, phase), end) for phase in phases]
    assert all(steps[0] == 0 for steps in refreshes)  # all bases are made in the first step
    for step in range(1, end):
        assert sum(step in steps for steps in refreshes) <= math.ceil(count / gap)
    for start in range(1, end, gap):
        for steps in refreshes:
            assert sum(start <= step < start + gap for step in steps) == 1


@given(gap=GAPS)
def test_targets_that_are_not_staggered_refresh_together_every_gap(gap: int) -> None:
    assert until(schedule(gap, phase=0), 4 * gap + 1) == [0, gap, 2 * gap, 3 * gap, 4 * gap]


@given(gap=GAPS, data=st.data())
def test_the_count_of_refreshes_is_that_of_the_schedule(gap: int, data: st.DataObject) -> None:
    phase = data.draw(st.integers(0, gap - 1))
    for steps in range(4 * gap + 2):
        assert refreshes_by(steps, gap, phase) == len(until(schedule(gap, phase), steps))


@given(refreshed_at=st.integers(0, 10_000), gap=GAPS, gap_factor=FACTORS, data=st.data())
def test_the_next_refresh_is_in_phase_and_after_that_many_gaps(
    refreshed_at: int, gap: int, gap_factor: int, data: st.DataObject
) -> None:
    """Wherever the last one was: one that was put off, or came with a first gradient that was zero, costs no phase."""
    phase = data.draw(st.integers(0, gap - 1))
    step = step_of_next_refresh(refreshed_at, gap, phase, gap_factor)
    assert step % gap == phase
    assert (gap_factor - 1) * gap < step - refreshed_at <= gap_factor * gap
    following = step_of_next_refresh(step, gap, phase, gap_factor)
    assert following - step == gap_factor * gap


@given(gap=GAPS, gap_factor=FACTORS, data=st.data())
def test_the_first_refresh_is_at_once(gap: int, gap_factor: int, data: st.DataObject) -> None:
    assert step_of_next_refresh(NEVER, gap, data.draw(st.integers(0, gap - 1)), gap_factor) == 0


def test_a_stable_subspace_doubles_the_gap_up_to_eight_times() -> None:
    factors = [1]
    for _ in range(5):
        factors.append(next_gap_factor(factors[-1], overlap=0.9, chance=0.25))
    assert factors == [1, 2, 4, 8, 8, 8]
    assert MAX_GAP_FACTOR == 8


@given(factor=FACTORS, chance=st.floats(0, 0.999))
def test_stable_is_measured_from_what_chance_gives(factor: int, chance: float) -> None:
    threshold = chance + STABLE_OVERLAP * (1 - chance)
    margin = 1e-9 * 1e3  # the division by 1 − chance, at least 1e-3, magnifies rounding
    assert next_gap_factor(factor, chance, chance) == 1
    assert next_gap_factor(factor, threshold - margin, chance) == 1
    assert next_gap_factor(factor, min(threshold + margin, 1.0), chance) == min(2 * factor, MAX_GAP_FACTOR)
    assert next_gap_factor(factor, 1.0, chance) == min(2 * factor, MAX_GAP_FACTOR)


@given(factor=FACTORS, overlap=st.floats(0, 1))
def test_an_overlap_that_chance_explains_is_no_stability(factor: int, overlap: float) -> None:
    """A basis of as many columns as rows spans everything."""
    assert next_gap_factor(factor, overlap, chance=1.0) == 1


# ---- through an optimizer

ROWS, COLUMNS, RANK = 24, 32, 4


def make(count: int = 1, cls: type[Any] = GaLoreAdamW, **options: Any) -> tuple[GaLoreOptimizer, list[nn.Parameter]]:
    """An optimizer of `count` targets, with the same start every time."""
    generator = torch.Generator().manual_seed(0)
    weights = [nn.Parameter(torch.randn(ROWS, COLUMNS, generator=generator)) for _ in range(count)]
    optimizer = cls([{"params": weights, "rank": RANK, "proj_bits": 16, **options}], lr=1e-3)
    assert isinstance(optimizer, GaLoreOptimizer)
    return optimizer, weights


def gradient(step: int, index: int = 0) -> Tensor:
    return torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(1000 * index + step))


def stable_gradient(step: int, subspace: int) -> Tensor:
    """Always of the same four columns, with other coefficients, and a little noise."""
    columns = torch.randn(ROWS, RANK, generator=torch.Generator().manual_seed(10_000 + subspace))
    rows = torch.randn(RANK, COLUMNS, generator=torch.Generator().manual_seed(20_000 + step))
    return columns @ rows + 0.1 * gradient(step)


def take_step(optimizer: GaLoreOptimizer, gradients: dict[nn.Parameter, Tensor]) -> list[bool]:
    """Which of these weights had a refresh."""
    before = [float(optimizer.state[weight]["refreshes"]) for weight in gradients]
    steps = [float(optimizer.state[weight]["step"]) for weight in gradients]
    for weight, value in gradients.items():
        weight.grad = value
    optimizer.step()
    refreshed = []
    for weight, count, step in zip(gradients, before, steps, strict=True):
        state = optimizer.state[weight]
        refreshed.append(float(state["refreshes"]) == count + 1)
        assert refreshed[-1] == (float(state["refreshed_at"]) == step)
        assert float(state["refreshes"]) <= count + 1
    return refreshed


def refreshed_at(
    optimizer: GaLoreOptimizer,
    weights: list[nn.Parameter],
    steps: range,
    gradient: Callable[[int, int], Tensor] = gradient,
) -> dict[int, list[int]]:
    """The targets that refresh, by number, in each step that has any."""
    found: dict[int, list[int]] = {}
    for step in steps:
        gradients = {weight: gradient(step, index) for index, weight in enumerate(weights)}
        refreshed = take_step(optimizer, gradients)
        if any(refreshed):
            found[step] = [index for index, was in enumerate(refreshed) if was]
    return found


ALL = [0, 1, 2, 3, 4]


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize(
    ("stagger", "gap", "expected"),
    [
        (False, 3, {0: ALL, 3: ALL, 6: ALL}),
        # ⌊index · 3 / 5⌋: the phases 0, 0, 1, 1 and 2.
        (True, 3, {0: ALL, 1: [2, 3], 2: [4], 3: [0, 1], 4: [2, 3], 5: [4], 6: [0, 1], 7: [2, 3], 8: [4]}),
        # ⌊index · 10 / 5⌋: every other step.
        (True, 10, {0: ALL, 2: [1], 4: [2], 6: [3], 8: [4]}),
        (True, 1, dict.fromkeys(range(9), ALL)),
    ],
)
def test_targets_refresh_when_their_phase_says(
    stagger: bool, gap: int, expected: dict[int, list[int]], cls: type[Any]
) -> None:
    optimizer, weights = make(5, cls, update_proj_gap=gap, stagger=stagger)
    assert refreshed_at(optimizer, weights, range(9)) == expected
    figures = optimizer.refresh_figures()
    assert figures["refreshes"] == sum(len(indices) for indices in expected.values())
    assert "refreshes_saved" not in figures


def test_the_phases_spread_over_the_groups_and_leave_out_those_that_are_not_staggered() -> None:
    """Four staggered targets in two groups, and one between that keeps to the gap's first step."""
    weights = [nn.Parameter(torch.ones(ROWS, COLUMNS)) for _ in range(5)]
    full_rank = nn.Parameter(torch.ones(RANK, COLUMNS))  # no target, and no part of the spread
    options = {"rank": RANK, "update_proj_gap": 4, "proj_bits": 16}
    optimizer = GaLoreAdamW(
        [
            {"params": [*weights[:2], full_rank], **options},
            {"params": [weights[2]], **options, "stagger": False},
            {"params": weights[3:], **options},
        ]
    )
    expected = {0: ALL, 1: [1], 2: [3], 3: [4], 4: [0, 2], 5: [1]}
    assert refreshed_at(optimizer, weights, range(6)) == expected


def test_a_group_that_is_added_later_moves_the_phases() -> None:
    optimizer, weights = make(1, update_proj_gap=4)
    assert refreshed_at(optimizer, weights, range(5)) == {0: [0], 4: [0]}
    weights.append(nn.Parameter(torch.ones(ROWS, COLUMNS)))
    optimizer.add_param_group({"params": weights[1:], "rank": RANK, "update_proj_gap": 4, "proj_bits": 16})
    # The new one counts its own steps: its first is step 5, and its phase, 2 of 4, comes two steps later.
    assert refreshed_at(optimizer, weights, range(5, 10)) == {5: [1], 7: [1], 8: [0]}


@pytest.mark.parametrize("stagger", [True, False])
@pytest.mark.parametrize("resume_at", [5, 6, 7])
def test_a_resumed_optimizer_keeps_the_schedule(stagger: bool, resume_at: int) -> None:
    """In the middle of a gap, and of longer ones than the first: the gradients' subspaces are stable."""
    options: dict[str, Any] = {"update_proj_gap": 4, "stagger": stagger, "lazy_refresh": True}
    optimizer, weights = make(3, **options)
    refreshed_at(optimizer, weights, range(resume_at), stable_gradient)
    saved = copied(optimizer.state_dict())
    expected = refreshed_at(optimizer, weights, range(resume_at, 22), stable_gradient)
    resumed, others = make(3, **options)
    resumed.load_state_dict(saved)
    assert refreshed_at(resumed, others, range(resume_at, 22), stable_gradient) == expected
    assert {index for indices in expected.values() for index in indices} == {0, 1, 2}
    factors = [int(state["gap_factor"]) for state in saved["state"].values()]
    assert max(factors) > 1
    # Neither a fresh start nor factors of 1 would have had this schedule.
    fresh, others = make(3, **options)
    assert refreshed_at(fresh, others, range(resume_at, 22), stable_gradient) != expected
    eager, others = make(3, **options)
    for state in saved["state"].values():
        state["gap_factor"].fill_(1)
    eager.load_state_dict(saved)
    assert refreshed_at(eager, others, range(resume_at, 22), stable_gradient) != expected


@pytest.mark.parametrize("bad_step", [0, 5])
def test_a_refresh_that_is_put_off_keeps_its_place_in_the_targets_own_count(bad_step: int) -> None:
    gap = 5
    optimizer, (weight,) = make(1, update_proj_gap=gap)
    refreshed = []
    for step in range(14):
        value = torch.full((ROWS, COLUMNS), float("nan")) if step in (bad_step, bad_step + 1) else gradient(step)
        if take_step(optimizer, {weight: value})[0]:
            refreshed.append(step)
    # Two steps of the run are no steps of the target's.
    on_time = [0, 5, 10]
    assert refreshed == [step + 2 * (step >= bad_step) for step in on_time]
    assert int(optimizer.state[weight]["step"]) == 12
    assert optimizer.skipped_updates()[f"a parameter of shape {(ROWS, COLUMNS)}"] == (2, bad_step + 1)


# ---- lazily


@pytest.mark.parametrize("refresh", ["svd", "randomized", "subspace"])
def test_lazy_refreshes_wait_while_the_subspace_is_stable(refresh: str) -> None:
    gap = 2
    optimizer, (weight,) = make(1, update_proj_gap=gap, lazy_refresh=True, refresh=refresh)
    refreshed: list[int] = []
    factors: list[int] = []
    changes_at = 31
    for step in range(70):
        if take_step(optimizer, {weight: stable_gradient(step, subspace=int(step >= changes_at))})[0]:
            refreshed.append(step)
            factors.append(int(optimizer.state[weight]["gap_factor"]))
    # 1, 2, 4 and 8 gaps, and 8 again; the change is noticed at 46, and the new subspace is as stable as the old one.
    assert refreshed == [0, 2, 6, 14, 30, 46, 48, 52, 60]
    assert factors == [1, 2, 4, 8, 8, 1, 2, 4, 8]
    figures = optimizer.refresh_figures()
    assert figures["refreshes"] == 9
    assert figures["refreshes_saved"] == 70 // gap - 9
    assert 0.4 < figures["overlap_median"] <= 1
    assert figures["captured_energy_min"] > 0.9


def test_lazy_refreshes_are_as_frequent_as_others_while_nothing_is_stable() -> None:
    """Gradients of the whole space: two random subspaces of 4 in 24 dimensions have little in common."""
    lazy, weights = make(3, update_proj_gap=4, lazy_refresh=True)
    eager, others = make(3, update_proj_gap=4)
    subspaces = {step: [stable_gradient(step, subspace=100 * step + i) for i in range(3)] for step in range(13)}
    for values in subspaces.values():
        pairs = [dict(zip(params, copy.deepcopy(values), strict=True)) for params in (weights, others)]
        assert take_step(lazy, pairs[0]) == take_step(eager, pairs[1])
    assert lazy.refresh_figures()["refreshes_saved"] == 0
    assert [int(lazy.state[weight]["gap_factor"]) for weight in weights] == [1] * 3


def test_saved_refreshes_are_counted_over_all_targets_and_survive_loading() -> None:
    """One target of three is stable."""
    gap, steps = 3, 22
    optimizer, weights = make(3, update_proj_gap=gap, lazy_refresh=True)
    done = 0
    for step in range(steps):
        values = [stable_gradient(step, subspace=0 if i == 1 else 100 * step + i) for i in range(3)]
        done += sum(take_step(optimizer, dict(zip(weights, values, strict=True))))
    eager = sum(refreshes_by(steps, gap, phase_of(index, 3, gap)) for index in range(3))
    figures = optimizer.refresh_figures()
    assert (figures["refreshes"], figures["refreshes_saved"]) == (done, eager - done)
    assert eager - done > 0
    loaded, _ = make(3, update_proj_gap=gap, lazy_refresh=True)
    loaded.load_state_dict(copied(optimizer.state_dict()))
    assert loaded.refresh_figures() == {"refreshes": done, "refreshes_saved": eager - done}
    # The figures of single refreshes have been asked for; the counts go on.
    assert optimizer.refresh_figures() == {"refreshes": done, "refreshes_saved": eager - done}


def test_only_lazy_targets_keep_a_factor() -> None:
    optimizer, (weight,) = make(1)
    assert "gap_factor" not in optimizer.state[weight]
    optimizer, (weight,) = make(1, lazy_refresh=True)
    assert float(optimizer.state[weight]["gap_factor"]) == 1
