"""Curves of runs, ready to be drawn: of a run what it logged, of several seeds their mean and deviation."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from .progress import position
from .runs import Run, Series, first_not_finite
from .seeds import Compared, Seeds

_NOISY = 100  # points, from where a running median is drawn over them
_WINDOW = 40  # a running median is over this part of the points


class Curve(NamedTuple):
    """Points in the order of the steps; NaN where there is nothing to draw."""

    x: list[float]
    y: list[float]
    deviation: list[float] | None = None
    """Of several seeds, around `y`."""


def curve(one: Compared, key: str, axis: str) -> Curve | None:
    """What `one` logged as `key`, over `axis`; `None` where there is nothing, or no place on that axis.

    Of several seeds: the mean of those that are not broken, at the steps that all of these logged.
    """
    if not isinstance(one, Seeds):
        return _of_run(one, one.series(key), axis)
    each = [dict(run.series(key)) for run in one.sound]
    steps = sorted(set.intersection(*map(set, each))) if each else []
    places = [position(run, axis) for run in one.sound]
    if not steps or not all(places):
        return None
    values = [[_or_nan(series[step]) for series in each] for step in steps]
    return Curve(
        [statistics.fmean(at(step) for at in places if at) for step in steps],
        [statistics.fmean(found) for found in values],
        [statistics.stdev(found) for found in values] if len(each) > 1 else None,
    )


def level(run: Run, value: float, axis: str) -> Curve | None:
    """A curve that is `value` from the first step to the last."""
    return _of_run(run, [(0, value), (run.step, value)], axis)


def smoothed(drawn: Curve) -> Curve | None:
    """`drawn` as its running median, where it is so long and noisy that this shows more; else `None`."""
    window = len(drawn.y) // _WINDOW if len(drawn.y) > _NOISY else 1
    if window <= 1:
        return None
    deviation = None if drawn.deviation is None else _running_median(drawn.deviation, window)
    return Curve(drawn.x, _running_median(drawn.y, window), deviation)


def remarks(one: Compared, keys: Sequence[str] = ()) -> list[str]:
    """What a legend has to say of `one` beside its name.

    Args:
        one: a run, or several seeds.
        keys: what is drawn; without any, the run as a whole is told of.
    """
    if isinstance(one, Seeds):
        lost = len(one.runs) - len(one.sound)
        return [f"{lost} of {len(one.runs)} broken"] if lost else []
    steps = [step for key in keys if (step := first_not_finite(one.series(key))) is not None]
    found = [f"not finite from step {min(steps):,}"] if steps else []
    if not keys and one.broken is not None:
        found = [f"broken at step {one.broken[1]:,}"]
    return found if one.finished else [*found, "interrupted"]


def window_in_words() -> str:
    """What a smoothed curve is."""
    return f"running median over a {_WINDOW}th of the log"


def _of_run(run: Run, series: Series, axis: str) -> Curve | None:
    at = position(run, axis)
    if at is None or not series:
        return None
    return Curve([at(step) for step, _ in series], [_or_nan(value) for _, value in series])


def _or_nan(value: float) -> float:
    # NaN leaves a gap; an infinite value would have no place on the axis.
    return value if math.isfinite(value) else math.nan


def _running_median(values: Sequence[float], window: int) -> list[float]:
    """The median of the `window` values around each, without those that are NaN; NaN stays NaN."""
    half = window // 2
    medians = []
    for place, value in enumerate(values):
        near = [v for v in values[max(0, place - half) : place + half + 1] if not math.isnan(v)]
        medians.append(math.nan if math.isnan(value) else statistics.median(near))
    return medians
