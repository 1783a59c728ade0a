"""How far a run was at a step: in steps, in tokens, in hours."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from .runs import STEP_SECONDS, TOKENS_PER_SECOND, Run, Series

AXES = ("steps", "tokens", "hours")
"""What a curve can be drawn over."""

_HOUR = 3600.0
_TOKENS_SO_FAR = ("num_tokens", "num_input_tokens_seen")  # TRL's and the Trainer's own, counted from the first step

Position = Callable[[float], float]


def position(run: Run, axis: str) -> Position | None:
    """From a step of `run` to its place on `axis`, one of `AXES`; `None` where the log does not tell it.

    Tokens and hours are known where something was logged, and in between in proportion. Hours are those of the steps,
    without evaluations and checkpoints; of a run whose steps were not timed, a share of all its time.
    """
    if axis == "steps":
        return float
    known = _tokens(run) if axis == "tokens" else _seconds(run)
    if not known:
        return None
    unit = 1.0 if axis == "tokens" else _HOUR
    steps, values = zip(*[(0, 0.0), *known], strict=True)

    def at(step: float) -> float:
        if step > steps[-1]:  # the last steps may not have been logged
            return float(values[-1] * step / steps[-1] / unit)
        return float(np.interp(step, steps, values) / unit)

    return at


def tokens(run: Run) -> float | None:
    """The tokens that `run` was trained on; `None` where its log does not tell."""
    at = position(run, "tokens")
    return None if at is None else at(run.step)


def axes_of(runs: Sequence[Run]) -> list[str]:
    """Those of `AXES` that any of `runs` has."""
    return [axis for axis in AXES if any(position(run, axis) for run in runs)]


def _tokens(run: Run) -> Series:
    for key in _TOKENS_SO_FAR:
        counted = [(step, value) for step, value in run.series(key) if step > 0]
        if counted:
            return counted
    seconds = dict(run.series(STEP_SECONDS))
    return _summed([(step, speed * seconds[step]) for step, speed in run.series(TOKENS_PER_SECOND) if step in seconds])


def _seconds(run: Run) -> Series:
    known = _summed(run.series(STEP_SECONDS))
    if not known and run.step and run.step_seconds is not None:
        return [(run.step, run.step * run.step_seconds)]
    return known


def _summed(each: Series) -> Series:
    """What there is after each step that was logged, of what a step took on average since the log before."""
    before, total, found = 0, 0.0, []
    for step, value in each:
        total += (step - before) * value
        found.append((step, total))
        before = step
    return found
