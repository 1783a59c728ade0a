"""Runs side by side, as tables of text that a terminal and a page show alike."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from .differences import SHOWN, WORK, differing, setting
from .runs import (
    HELD_OUT_LOSS,
    MIB,
    PEAK_MEMORY,
    STEP_SECONDS,
    TOKENS_PER_SECOND,
    TRAINING_LOSS,
    Run,
    Series,
    is_finite,
    shared_metrics,
)

UNKNOWN = "–"


class Row(NamedTuple):
    """A quantity of each run, as text."""

    label: str
    cells: list[str]
    best: frozenset[int] = frozenset()
    """The runs that do best, where it is known what that is and not all do."""


class Table(NamedTuple):
    """A table with a column for each run."""

    title: str
    names: list[str]
    rows: list[Row]


# ---- numbers as text


def digits(value: float, count: int = 3) -> str:
    """`value` to `count` digits, without an exponent unless it is needed."""
    if not math.isfinite(value):
        return str(value).replace("nan", "NaN")
    if value and not 1e-4 <= abs(value) < 1e9:
        return f"{value:.{count - 1}e}"
    places = 0 if not value else max(0, count - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{places}f}"


def duration(seconds: float) -> str:
    """`41.5 s`, `12 min 03 s`, `3 h 20 min`."""
    if not math.isfinite(seconds) or seconds < 100:
        return f"{digits(seconds)} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02} s"
    return f"{minutes // 60} h {minutes % 60:02} min"


def _loss(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 1000 else digits(value)


def _seconds(value: float) -> str:
    return f"{digits(value)} s"


def _gib(value: float) -> str:
    return f"{digits(value)} GiB"


def _mib(value: float) -> str:
    return f"{digits(value / MIB)} MiB"


def metric_name(key: str) -> str:
    """`held-out mean token accuracy` for `eval_mean_token_accuracy`."""
    return f"held-out {key.removeprefix('eval_').replace('_', ' ')}"


# ---- what is compared


class Quantity(NamedTuple):
    """A number that each run may have."""

    key: str
    label: str
    value: Callable[[Run], float | None]
    text: Callable[[float], str]
    lower_is_better: bool | None = None
    relative: bool = True
    """Whether the difference from the first run, in per cent, says something."""


def _at(pick: Callable[[Series], float | None]) -> Callable[[Run], float | None]:
    def value(run: Run) -> float | None:
        series = run.series(HELD_OUT_LOSS)
        return pick(series) if series else None

    return value


def _lowest(run: Run) -> float | None:
    return min((value for _, value in run.series(HELD_OUT_LOSS) if math.isfinite(value)), default=None)


_LOSSES = (
    Quantity("training_loss", "training loss, mean of the last tenth", lambda run: run.training_loss, _loss, True),
    Quantity("eval_loss_first", "held-out loss, first", _at(lambda at: at[0][1]), _loss, relative=False),
    Quantity("eval_loss_last", "held-out loss, last", _at(lambda at: at[-1][1]), _loss, True),
    Quantity("eval_loss_lowest", "held-out loss, lowest", _lowest, _loss, True),
)
_COSTS = (
    Quantity("step_seconds", "step time, median", lambda run: run.step_seconds, _seconds, True),
    Quantity("tokens_per_second", "tokens per second, median", lambda run: run.tokens_per_second, digits, False),
    Quantity("peak_memory_gib", "peak memory", lambda run: run.peak_memory_gib, _gib, True),
    Quantity("optimizer_bytes", "optimizer state", lambda run: run.optimizer_bytes, _mib, True),
)
_TIMES = (
    Quantity("seconds_in_steps", "time of the steps", lambda run: run.seconds_in_steps, duration, True),
    Quantity("training_seconds", "training time, with evaluations", lambda run: run.training_seconds, duration, True),
)


def quantities(runs: Sequence[Run]) -> list[Quantity]:
    """The quantities that are compared of `runs`; of metrics, those that all of them have."""

    def metric(key: str) -> Quantity:
        return Quantity(key, f"{metric_name(key)}, last", lambda run: run.metrics.get(key), _loss)

    times: Sequence[Quantity] = _TIMES
    if len({run.step for run in runs}) > 1:  # then a shorter time is no merit
        times = [quantity._replace(lower_is_better=None, relative=False) for quantity in _TIMES]
    return [*_LOSSES, *map(metric, shared_metrics(runs)), *_COSTS, *times]


# ---- tables


def settings_table(runs: Sequence[Run], *, everything: bool = False) -> Table:
    """The table of the runs' settings.

    Args:
        runs: the columns.
        everything: the whole of what is known, or what mostly differs.
    """
    rows = [
        _texts("method", runs, lambda run: run.method),
        _texts("model", runs, lambda run: run.model),
        _texts("learning rate", runs, _learning_rate),
        _texts("parameters", runs, lambda run: f"{run.facts.parameters:,}" if run.facts else None),
        _texts("trained", runs, _trained),
        _texts("device", runs, _fact("device")),
    ]
    if everything:
        rows += [_texts(name, runs, _fact(name)) for name in ("data", "optim", "optim_args")]
    else:
        rows += [row for row in [_texts("data", runs, _fact("data"))] if len(set(row.cells)) > 1]
    shown = (*SHOWN, "optim_args", "optim_target_modules") if everything else SHOWN
    rows += [_texts(key, runs, setting(key)) for key in differing(runs) if key not in shown]
    if everything:
        rows += [_texts("optim_target_modules", runs, _targets)]
        rows += [_texts(name, runs, _fact(name)) for name in ("command", "recipe", "started")]
        rows += [_texts("folder", runs, lambda run: str(run.folder))]
    return Table("Settings", _names(runs), _known(rows))


def results_table(runs: Sequence[Run]) -> Table:
    """The table of the runs' results, with the differences from the first run."""
    rows = [_row(quantity, runs) for quantity in quantities(runs)]
    steps = Row("steps", [_steps(run) for run in runs])
    title = "Results" if len(runs) == 1 else f"Results; in brackets the difference from {runs[0].name}"
    return Table(title, _names(runs), [*_known(rows), steps])


def versions_table(runs: Sequence[Run]) -> Table:
    """The table of the versions of libraries that the runs were made with."""
    packages = sorted({package for run in runs if run.facts for package in run.facts.versions})

    def version(package: str) -> Callable[[Run], str | None]:
        return lambda run: run.facts.versions.get(package) if run.facts else None

    return Table("Versions", _names(runs), [_texts(package, runs, version(package)) for package in packages])


def _names(runs: Sequence[Run]) -> list[str]:
    return [run.name for run in runs]


def _fact(name: str) -> Callable[[Run], str | None]:
    return lambda run: getattr(run.facts, name) if run.facts else None


def _texts(label: str, runs: Sequence[Run], text: Callable[[Run], str | None]) -> Row:
    return Row(label, [text(run) or UNKNOWN for run in runs])


def _known(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if any(cell != UNKNOWN for cell in row.cells)]


def _learning_rate(run: Run) -> str | None:
    if run.learning_rate is None:
        return None
    return f"{run.learning_rate:g}" if run.facts else f"{run.learning_rate:.3g} (highest logged)"


def _trained(run: Run) -> str | None:
    if run.facts is None:
        return None
    trained, all_of_them = run.facts.trainable_parameters, run.facts.parameters
    return "all" if trained == all_of_them else f"{trained:,} ({digits(100 * trained / max(1, all_of_them))} %)"


def _targets(run: Run) -> str | None:
    targets = run.facts.optim_target_modules if run.facts else None
    return ", ".join(targets) if isinstance(targets, list) else targets


def _steps(run: Run) -> str:
    how = "" if run.step >= run.max_steps and run.finished else "stopped early" if run.finished else "interrupted"
    text = f"{_of_all(run)}, {how}" if how else f"{run.step:,}"
    return text if run.broken is None else f"{text}, broken at {run.broken[1]:,}"


def _of_all(run: Run) -> str:
    return f"{run.step:,} of {run.max_steps:,}" if run.max_steps else f"{run.step:,}"


def _row(quantity: Quantity, runs: Sequence[Run]) -> Row:
    values = [quantity.value(run) for run in runs]
    first = values[0]
    cells = []
    for place, value in enumerate(values):
        if value is None:
            cells.append(UNKNOWN)
        elif place and quantity.relative and first and is_finite(first) and is_finite(value):
            cells.append(f"{quantity.text(value)} ({_per_cent(value / first - 1)})")
        else:
            cells.append(quantity.text(value))
    sound = [None if run.broken else value for run, value in zip(runs, values, strict=True)]
    return Row(quantity.label, cells, _best(sound, quantity.lower_is_better))


def _per_cent(difference: float) -> str:
    text = f"{100 * difference:+,.1f}".replace("-", "−")
    return f"{text[1:] if text[1:] == '0.0' else text} %"


def _best(values: Sequence[float | None], lower_is_better: bool | None) -> frozenset[int]:
    found = {place: value for place, value in enumerate(values) if value is not None and math.isfinite(value)}
    if lower_is_better is None or len(set(found.values())) < 2:
        return frozenset()
    best = (min if lower_is_better else max)(found.values())
    return frozenset(place for place, value in found.items() if value == best)


# ---- notes


def notes(runs: Sequence[Run]) -> list[str]:
    """Notes that are needed to read the tables rightly, one sentence or two each."""
    found = [_unfinished(run) for run in runs if not run.finished]
    for run in runs:
        if run.facts is None:
            found.append(f"{run.name} was made by another program: what is not in its log is not known.")
        if run.times_whole_training and run.step_seconds is not None:
            found.append(
                f"{run.name}: step time and tokens per second are those of all its time, evaluations included."
            )
        if run.training_seconds is None and run.last("train_runtime") is not None:
            found.append(f"{run.name} was resumed: its training time is known of the last part only, and left out.")
        if run.broken is not None:
            key, step = run.broken
            label = {TRAINING_LOSS: "the training loss", HELD_OUT_LOSS: "the held-out loss"}.get(key, key)
            found.append(f"{run.name} is broken: {label} is not finite, first at step {step:,}. It is best at nothing.")
    work = [key for key in differing(runs) if key in WORK]
    if work:
        found.append(
            f"The runs did not do the same work: {', '.join(work)} differ{'s' if len(work) == 1 else ''}. A lower loss "
            "or a shorter time may come of that."
        )
    measured = [run for run in runs if run.peak_memory_gib is not None and run.facts is not None]
    devices = {run.facts.device == "cpu" for run in measured if run.facts}
    if devices == {True}:
        found.append("Peak memory is of the whole process, Python and libraries included: it ran on a CPU.")
    elif len(devices) == 2:
        found.append("Peak memory is of tensors on a GPU, but of the whole process on a CPU: do not compare those.")
    missing = [label for label, key in _MEASURED.items() if not any(run.series(key) for run in runs)]
    if missing:
        found.append(f"Logged by no run: {', '.join(missing)}.")
    return found


_MEASURED = {
    "training loss": TRAINING_LOSS,
    "held-out loss": HELD_OUT_LOSS,
    "learning rate": "learning_rate",
    "step time": STEP_SECONDS,
    "tokens per second": TOKENS_PER_SECOND,
    "peak memory": PEAK_MEMORY,
}


def _unfinished(run: Run) -> str:
    return (
        f"{run.name} was interrupted, or is running: its figures are those of its last checkpoint, step {_of_all(run)}."
    )


# ---- for programs


def as_dict(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The contents of the tables as numbers; `None` for what is not known or is not finite."""
    return [
        {
            "name": run.name,
            "folder": str(run.folder),
            "finished": run.finished,
            "broken": None if run.broken is None else {"key": run.broken[0], "step": run.broken[1]},
            "step": run.step,
            "max_steps": run.max_steps,
            "method": run.method,
            "model": run.model,
            "learning_rate": _json_number(run.learning_rate),
            "results": {quantity.key: _json_number(quantity.value(run)) for quantity in quantities(runs)},
            "facts": None if run.facts is None else dataclasses.asdict(run.facts),
        }
        for run in runs
    ]


def _json_number(value: float | None) -> float | None:
    return value if is_finite(value) else None
