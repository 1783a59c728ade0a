"""What the benchmarks of options have measured, as the docs show it: the best of each grid.

`tests/benchmarks/results` has every finished run of `tests.benchmarks.ranks`, `tests.benchmarks.tuning` and
`tests.benchmarks.int8_quality`.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
RANKS, TUNING = RESULTS / "ranks.jsonl", RESULTS / "tuning.jsonl"
INT8_QUALITY = RESULTS / "int8_quality.jsonl"

FULL_RANK = 0
"""The rank of optimizers that have none."""


class Best(NamedTuple):
    """The point of a grid with the lowest mean loss."""

    rates: tuple[float, float]
    """Of all else, and the matrices'."""
    lines: list[dict[str, Any]]
    """What came of each seed there."""
    at_edge: bool
    """Whether a neighbour of the point was not tried."""

    def mean(self, key: str = "loss") -> float:
        """The mean of a figure over the seeds."""
        return statistics.fmean(line[key] for line in self.lines)

    def cell(self, key: str = "loss", digits: int = 3, factor: float = 1.0) -> str:
        """`3.086 ± 0.007` of several seeds, `3.086` of one; with a mark where a neighbour was not tried."""
        text = f"{factor * self.mean(key):.{digits}f}"
        if len(self.lines) > 1:
            text += f" ± {factor * statistics.stdev(line[key] for line in self.lines):.{digits}f}"
        return text + (" *" if self.at_edge else "")


def best_of(lines: Iterable[Mapping[str, Any]], rates: tuple[str, str], step: tuple[float, float]) -> Best | None:
    """The best point of a grid: of those with the most seeds the lowest mean.

    Args:
        lines: the runs of one optimizer at one rank.
        rates: the keys of the two rates.
        step: the factors from a rate to the next.
    """
    points: dict[tuple[float, float], list[dict[str, Any]]] = {}
    for line in lines:
        points.setdefault((line[rates[0]], line[rates[1]]), []).append(dict(line))
    if not points:
        return None
    best = min(points, key=lambda at: (-len(points[at]), statistics.fmean(line["loss"] for line in points[at])))
    one_rate = len({first / second for first, second in points}) == 1 and len(points) > 1
    own = [(step[0], 1.0), (1 / step[0], 1.0)] if len({point[0] for point in points}) > 1 else []
    others = [] if one_rate else [(1.0, step[1]), (1.0, 1 / step[1])]
    neighbours = [(best[0] * a, best[1] * b) for a, b in own + others]
    missing = [near for near in neighbours if not any(_close(near, point) for point in points)]
    return Best(best, sorted(points[best], key=lambda line: line["seed"]), bool(missing) and not one_rate)


def _close(one: Sequence[float], other: Sequence[float]) -> bool:
    return all(abs(a - b) < 1e-6 * a for a, b in zip(one, other, strict=True))


def read(path: Path) -> list[dict[str, Any]]:
    """The runs that a file has."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def best_of_ranks() -> dict[tuple[str, int], Best]:
    """The best of each optimizer and rank, from random weights; η and scale."""
    runs = read(RANKS)
    places = dict.fromkeys((run["contender"], run["rank"]) for run in runs)
    found = {
        place: best_of((run for run in runs if (run["contender"], run["rank"]) == place), ("lr", "scale"), (2.0, 2.0))
        for place in places
    }
    return {place: best for place, best in found.items() if best is not None}


def best_of_tuning(task: str) -> dict[tuple[str, int], Best]:
    """The same of fine-tuning; the rest's rate and the matrices'."""
    runs = [run for run in read(TUNING) if run["task"] == task]
    places = dict.fromkeys((run["contender"], run["rank"]) for run in runs)
    found = {
        place: best_of(
            (run for run in runs if (run["contender"], run["rank"]) == place), ("rest", "matrices"), (4.0, 2.0)
        )
        for place in places
    }
    return {place: best for place, best in found.items() if best is not None}


def int8_losses() -> dict[tuple[str, str], dict[int, float]]:
    """The held-out losses of weights kept in each way, by task and way, then by seed."""
    found: dict[tuple[str, str], dict[int, float]] = {}
    for run in read(INT8_QUALITY):
        if run["size"] == "small":
            found.setdefault((run["task"], run["contender"]), {})[run["seed"]] = run["loss"]
    return found
