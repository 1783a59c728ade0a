"""The model of torch's allocator gives what its rules give by hand, and never less than what is alive."""

from __future__ import annotations

import random

import pytest

from hf_galore.plan.allocator import reserved_bytes
from hf_galore.plan.needs import MODEL_ERROR, OUTSIDE, OUTSIDE_BYTES, WORK_SPACES, allocator_bytes
from hf_galore.plan.tracking import GRANULE

KIB, MIB = 2**10, 2**20
BOTH = pytest.mark.parametrize("expandable", [True, False])


def sequence(*steps: int) -> list[tuple[int, int]]:
    """Sizes are those of new storages; −1 ends the first one that is alive, −2 the second, and so on."""
    events, alive = [], []
    for index, step in enumerate(steps):
        if step > 0:
            alive.append((index, step))
            events.append((index, step))
        else:
            storage, size = alive.pop(-step - 1)
            events.append((storage, -size))
    return events


def mib(events: list[tuple[int, int]], *, expandable: bool) -> float:
    return reserved_bytes(events, expandable=expandable) / MIB


@BOTH
@pytest.mark.parametrize(
    ("size", "segments", "pages"),
    [
        (GRANULE, 2, 2),
        (MIB, 2, 2),  # the largest small one
        (MIB + GRANULE, 20, 20),
        (10 * MIB - GRANULE, 20, 20),
        (10 * MIB, 10, 20),  # from here a segment of its own, of a multiple of 2 MiB
        (32 * MIB, 32, 40),
        (33 * MIB, 34, 40),
    ],
)
def test_one_storage(size: int, segments: int, pages: int, expandable: bool) -> None:
    assert mib(sequence(size), expandable=expandable) == (pages if expandable else segments)


@BOTH
def test_what_is_free_is_used_again(expandable: bool) -> None:
    assert mib(sequence(*([32 * MIB, -1] * 5)), expandable=expandable) == (40 if expandable else 32)
    assert mib(sequence(*([5 * KIB] * 409)), expandable=expandable) == 2  # of 10 granules each
    assert mib(sequence(*([5 * KIB] * 410)), expandable=expandable) == 4


def test_two_holes_are_one_only_within_a_segment() -> None:
    """Two of 16 MiB go, and one of 32 MiB comes: without expandable segments there is no room for it."""
    events = sequence(16 * MIB, 16 * MIB, -1, -1, 32 * MIB)
    assert mib(events, expandable=False) == 16 + 16 + 32
    assert mib(events, expandable=True) == 40


def test_neighbours_before_and_behind_become_one_again() -> None:
    """Three in a segment of 30 MiB; the middle one goes last."""
    thirds = [10 * MIB - 512 * KIB] * 3
    for order in ([-1, -2, -1], [-3, -1, -1], [-2, -1, -1], [-2, -2, -1]):
        assert mib(sequence(30 * MIB, -1, *thirds, *order, 30 * MIB), expandable=False) == 30
        assert mib(sequence(30 * MIB, -1, *thirds, *order, 40 * MIB), expandable=True) == 40


def test_what_a_storage_leaves_of_a_block_is_a_block() -> None:
    assert mib(sequence(22 * MIB, -1, 20 * MIB, MIB + GRANULE), expandable=False) == 22
    assert mib(sequence(22 * MIB, -1, 21 * MIB, MIB + GRANULE), expandable=False) == 22 + 20
    assert mib(sequence(22 * MIB, -1, 21 * MIB, MIB + GRANULE), expandable=True) == 40


def test_the_smallest_block_that_is_large_enough_is_taken() -> None:
    """Where 64 were taken for 30, the 60 that come then would need a segment of their own."""
    assert mib(sequence(64 * MIB, 32 * MIB, -1, -1, 30 * MIB, 60 * MIB), expandable=False) == 64 + 32


def test_the_end_of_an_expandable_segment_is_the_last_to_be_taken() -> None:
    """A hole of 60 MiB and 20 at the end: 20 go into the hole, and 100 need but 80 more than the end has."""
    events = sequence(60 * MIB, 20 * MIB, 20 * MIB, -3, -1, 20 * MIB, 100 * MIB)
    assert mib(events, expandable=True) == 60 + 20 + 20 + 80


def test_the_end_of_an_expandable_segment_grows_by_what_is_missing() -> None:
    assert mib(sequence(20 * MIB, 20 * MIB, -2, 60 * MIB), expandable=True) == 20 + 60
    assert mib(sequence(20 * MIB, 20 * MIB, -2, 60 * MIB), expandable=False) == 20 + 20 + 60


@BOTH
def test_small_and_large_ones_share_nothing(expandable: bool) -> None:
    assert mib(sequence(20 * MIB, -1, MIB), expandable=expandable) == 22


@BOTH
def test_a_storage_that_is_resized_is_there_twice_for_a_moment(expandable: bool) -> None:
    assert reserved_bytes([(0, 20 * MIB), (0, 20 * MIB)], expandable=expandable) == 60 * MIB
    assert reserved_bytes([(0, 20 * MIB), (0, -20 * MIB), (0, 20 * MIB)], expandable=expandable) == 20 * MIB


@BOTH
@pytest.mark.parametrize("seed", range(5))
def test_at_least_what_is_alive_and_no_more_than_without_using_anything_again(seed: int, expandable: bool) -> None:
    rng = random.Random(seed)
    alive: dict[int, int] = {}
    events, peak, born = [], 0, 0
    for index in range(3000):
        if alive and rng.random() < 0.5:
            storage = rng.choice(list(alive))
            events.append((storage, -alive.pop(storage)))
        else:
            alive[index] = rng.choice([1, 7, 300, 3000, 30_000, 300_000]) * GRANULE
            events.append((index, alive[index]))
            born += alive[index]
        peak = max(peak, sum(alive.values()))
    found = reserved_bytes(events, expandable=expandable)
    assert peak <= found < born / 3
    assert found % (2 * MIB) == 0


# ---- what a card has to have


def test_what_a_plan_adds() -> None:
    assert list(OUTSIDE.values())[:3] == [529 * MIB, 66 * MIB, 186 * MIB]  # 529, 595 and 781 together, as measured
    assert 0.94 * 2**30 <= OUTSIDE_BYTES <= 0.95 * 2**30
    assert len(WORK_SPACES) == 2
    for expandable in (True, False):
        found = allocator_bytes(sequence(102 * MIB), expandable=expandable)
        # Two work spaces of 8.125 MiB have 20: pages, behind which the rest grows by pages, or a segment.
        assert found == int((20 + 100 if expandable else 20 + 102) * MIB * (1 + MODEL_ERROR))
