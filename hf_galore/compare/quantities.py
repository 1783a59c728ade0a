"""The numbers that runs are compared by."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from .progress import position, tokens
from .runs import HELD_OUT_LOSS, MIB, Run, Series, shared_metrics
from .seeds import Compared, Spread
from .words import digits, duration, metric_name, short_count

_SAME_TOKENS = 1.02  # times as many: rows of a batch differ in length


class Quantity(NamedTuple):
    """A number that each run may have."""

    key: str
    label: str
    value: Callable[[Run], float | None]
    text: Callable[[float], str]
    deviation: Callable[[float], str]
    """A standard deviation as text: of two digits, and without the unit that stands before it."""
    lower_is_better: bool | None = None
    relative: bool = True
    """Whether the difference from the first run, in per cent, says something."""
    brief: str | None = None
    """The label where room is scarce; `None` where it is left out then."""


def quantities(compared: Sequence[Compared]) -> list[Quantity]:
    """The quantities that are compared; of metrics, those that all runs have."""
    runs = [run for one in compared for run in one.runs]

    def metric(key: str) -> Quantity:
        name = metric_name(key)
        return Quantity(key, f"{name}, last", lambda run: run.metrics.get(key), _loss, _loss, brief=name)

    times: Sequence[Quantity] = _TIMES
    if len({run.step for run in runs}) > 1:  # then a shorter time is no merit
        times = [quantity._replace(lower_is_better=None, relative=False) for quantity in _TIMES]
    at_equal_tokens = [_at_tokens(fewest)] if (fewest := equal_tokens(compared)) is not None else []
    return [*_LOSSES, *at_equal_tokens, *map(metric, shared_metrics(runs)), *_COSTS, *times]


def equal_tokens(compared: Sequence[Compared]) -> float | None:
    """The tokens that all runs saw which came to their end and tell it; `None` where all saw as many."""
    known = [count for one in compared for run in one.runs if run.finished and (count := tokens(run))]
    return min(known) if known and max(known) > _SAME_TOKENS * min(known) else None


def spread_text(quantity: Quantity, of: Compared, found: Spread | None) -> str | None:
    """A number of `of` as text, with its deviation: `4.9876 ± 0.0123`; `None` where it is not known."""
    if found is None:
        return None
    text = quantity.text(found.mean)
    if found.deviation:
        text += f" ± {quantity.deviation(found.deviation)}"
    return text if found.known == len(of.runs) else f"{text} ({found.known} of {len(of.runs)})"


# ---- as text


def _two_digits(value: float) -> str:
    return digits(value, 2)


def _loss(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 1000 else digits(value)


def _seconds(value: float) -> str:
    return f"{digits(value)} s"


def _seconds_around(value: float) -> str:
    return f"{digits(value, 2)} s" if value < 100 else duration(value)


def _gib(value: float) -> str:
    return f"{digits(value)} GiB"


def _mib(value: float) -> str:
    return f"{digits(value / MIB)} MiB"


def _mib_alone(value: float) -> str:
    return digits(value / MIB, 2)


# ---- of a run


def _at(pick: Callable[[Series], float | None]) -> Callable[[Run], float | None]:
    def value(run: Run) -> float | None:
        series = run.series(HELD_OUT_LOSS)
        return pick(series) if series else None

    return value


def _lowest(run: Run) -> float | None:
    return min((value for _, value in run.series(HELD_OUT_LOSS) if math.isfinite(value)), default=None)


def _at_tokens(count: float) -> Quantity:
    """The held-out loss after `count` tokens, between two evaluations in proportion."""

    def value(run: Run) -> float | None:
        at = position(run, "tokens")
        places = [(at(step), loss) for step, loss in run.series(HELD_OUT_LOSS) if math.isfinite(loss)] if at else []
        if not places or not places[0][0] <= count <= _SAME_TOKENS * places[-1][0]:
            return None
        return float(np.interp(count, [place for place, _ in places], [loss for _, loss in places]))

    name = f"held-out loss at {short_count(count)} tokens"
    return _is_loss("eval_loss_at_equal_tokens", name, value, name)


def _is_loss(key: str, label: str, value: Callable[[Run], float | None], brief: str | None) -> Quantity:
    return Quantity(key, label, value, _loss, _loss, lower_is_better=True, brief=brief)


_LOSSES = (
    _is_loss("training_loss", "training loss, mean of the last tenth", lambda run: run.training_loss, "training loss"),
    Quantity("eval_loss_first", "held-out loss, first", _at(lambda at: at[0][1]), _loss, _loss, relative=False),
    _is_loss("eval_loss_last", "held-out loss, last", _at(lambda at: at[-1][1]), "held-out loss, last"),
    _is_loss("eval_loss_lowest", "held-out loss, lowest", _lowest, "held-out loss, lowest"),
)
_COSTS = (
    Quantity("tokens", "tokens", tokens, short_count, short_count, relative=False, brief="tokens"),
    Quantity(
        *("step_seconds", "step time, median", lambda run: run.step_seconds, _seconds, _two_digits),
        lower_is_better=True,
        brief="step time",
    ),
    Quantity(
        *("tokens_per_second", "tokens per second, median", lambda run: run.tokens_per_second, digits, _two_digits),
        lower_is_better=False,
        brief="tokens / s",
    ),
    Quantity(
        *("peak_memory_gib", "peak memory", lambda run: run.peak_memory_gib, _gib, _two_digits),
        lower_is_better=True,
        brief="peak memory",
    ),
    Quantity(
        *("optimizer_bytes", "optimizer state", lambda run: run.optimizer_bytes, _mib, _mib_alone),
        lower_is_better=True,
        brief="optimizer state",
    ),
)
_TIMES = (
    Quantity(
        *("seconds_in_steps", "time of the steps", lambda run: run.seconds_in_steps, duration, _seconds_around),
        lower_is_better=True,
        brief="time of steps",
    ),
    Quantity(
        *(
            "training_seconds",
            "training time, with evaluations",
            lambda run: run.training_seconds,
            duration,
            _seconds_around,
        ),
        lower_is_better=True,
    ),
)
