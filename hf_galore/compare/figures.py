"""Runs side by side, as pictures."""

from __future__ import annotations

import io
import math
import re
import statistics
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from matplotlib.figure import Figure  # not pyplot, which would want to know about a display
from matplotlib.ticker import MaxNLocator

from . import colors
from .runs import (
    HELD_OUT_LOSS,
    MIB,
    STEP_SECONDS,
    TOKENS_PER_SECOND,
    TRAINING_LOSS,
    Run,
    Series,
    first_not_finite,
    shared_metrics,
)
from .tables import digits, metric_name

# Yellow is hard to see on white. Styles differ too: 28 runs before a pair is repeated, and nobody has to see colours.
_COLORS = (
    colors.BLUE,
    colors.VERMILION,
    colors.GREEN,
    colors.PURPLE,
    colors.BLACK,
    colors.ORANGE,
    colors.SKY,
)
_STYLES: tuple[Any, ...] = ("solid", (0, (5, 1.5)), (0, (1, 1.2)), (0, (6, 1.5, 1, 1.5)))
_WIDTH, _HEIGHT = 8.0, 4.2  # inches
_DPI = 150
_GRID = "#DDDDDD"
_FEW_POINTS = 30  # are marked
_NOISY = 100  # points, from where a running median is drawn over them
_WINDOW = 40  # a running median is over this part of the points
_SPREAD = 30  # from where a linear axis would hide most of a curve
_LONGEST_NAME = 48
_LEGEND_WIDTH = 104  # characters
_RARE = 20  # one value in so many, and at least one, is not ordinary
_FAR_OUT = 3  # times the highest ordinary value: a step, mostly the first, that would flatten all the others
_DECADES = 1e3  # that a logarithmic axis goes below the lowest curve's middle: schedules end at 0


class Picture(NamedTuple):
    """A PNG, with its name and what it shows."""

    file: str
    title: str
    png: bytes


def pictures(runs: Sequence[Run]) -> list[Picture]:
    """Draw a picture of each quantity that any of `runs` has."""
    lines = [
        _Lines(TRAINING_LOSS, "training_loss", "Training loss", "loss"),
        _Lines(HELD_OUT_LOSS, "held_out_loss", "Held-out loss", "loss"),
        *(_Lines(key, _file_name(key), _sentence(metric_name(key)), _unit(key)) for key in shared_metrics(runs)),
        _Lines("learning_rate", "learning_rate", "Learning rate", "learning rate", noisy=False),
        _Lines(STEP_SECONDS, "step_time", "Step time", "seconds per step", True, lambda run: run.step_seconds),
        _Lines(TOKENS_PER_SECOND, "tokens_per_second", "Speed", "tokens / s", True, lambda run: run.tokens_per_second),
    ]
    bars = [
        _Bars("peak_memory", "Peak memory", "GiB", lambda run: run.peak_memory_gib),
        _Bars(
            "optimizer_state", "Optimizer state", "MiB", lambda run: run.optimizer_bytes and run.optimizer_bytes / MIB
        ),
    ]
    drawn = [*(line.draw(runs) for line in lines), *(bar.draw(runs) for bar in bars)]
    return [picture for picture in drawn if picture is not None]


# ---- lines


class _Lines(NamedTuple):
    """A quantity over the steps."""

    key: str
    file: str
    title: str
    unit: str
    from_zero: bool = False
    whole: Callable[[Run], float | None] | None = None
    """What to show as one level of a run that did not log it by step."""
    noisy: bool = True

    def draw(self, runs: Sequence[Run]) -> Picture | None:
        found = [(place, run, run.series(self.key)) for place, run in enumerate(runs)]
        if not any(math.isfinite(value) for _, _, series in found for _, value in series):
            whole = self.whole
            return None if whole is None else _Bars(self.file, self.title, self.unit, whole).draw(runs)
        figure = Figure(figsize=(_WIDTH, _HEIGHT))
        axes = figure.add_subplot()
        handles, labels, smoothed = [], [], False
        for place, run, series in found:
            level = self.whole(run) if self.whole and not series else None
            if level is not None:
                series = [(0, level), (run.step, level)]
            if not series:
                continue
            window = len(series) // _WINDOW if self.noisy and len(series) > _NOISY else 1
            smoothed |= window > 1
            handles.append(_line(axes, series, place, window, marked=level is None))
            labels.append(_label(run, series, level is not None))
        _finish(axes, self.unit, max(run.step for run in runs))
        said = [f"thick: running median over a {_WINDOW}th of the log"] if smoothed else []
        said += _scale(axes, [series for _, _, series in found], self.from_zero)
        title = self.title + (f" ({'; '.join(said)})" if said else "")
        if len(runs) == 1:
            title = f"{title}: {labels[0]}"
            handles = []
        return _picture(figure, axes, self.file, title, handles, labels)


def _line(axes: Any, series: Series, place: int, window: int, *, marked: bool) -> Any:
    # NaN leaves a gap; an infinite value would have no place on the axis.
    steps = [step for step, _ in series]
    values = [value if math.isfinite(value) else math.nan for _, value in series]
    color = _COLORS[place % len(_COLORS)]
    if window > 1:
        axes.plot(steps, values, color=color, linewidth=0.6, alpha=0.3)
        values = _running_median(values, window)
    (line,) = axes.plot(
        steps,
        values,
        color=color,
        linestyle=_STYLES[place % len(_STYLES)],
        linewidth=1.8,
        marker="o" if marked and len(series) <= _FEW_POINTS else None,
        markersize=4,
    )
    return line


def _running_median(values: Sequence[float], window: int) -> list[float]:
    """The median of the `window` values around each, without those that are NaN; NaN stays NaN."""
    half = window // 2
    medians = []
    for place, value in enumerate(values):
        near = [v for v in values[max(0, place - half) : place + half + 1] if not math.isnan(v)]
        medians.append(math.nan if math.isnan(value) else statistics.median(near))
    return medians


def _label(run: Run, series: Series, whole: bool) -> str:
    said = []
    broken = first_not_finite(series)
    if broken is not None:
        said.append(f"not finite from step {broken:,}")
    if whole:
        said.append("mean of all its time")
    if not run.finished:
        said.append("interrupted")
    return _short(run.name) + (f" ({', '.join(said)})" if said else "")


def _scale(axes: Any, found: Sequence[Series], from_zero: bool) -> list[str]:
    """Set the vertical axis so that all curves can be told apart; return what a reader has to know of it."""
    finite = [values for values in ([v for _, v in series if math.isfinite(v)] for series in found) if values]
    # Not the lowest or highest: a learning rate begins at 0, and a first step compiles.
    middles = [statistics.median(values) for values in finite]
    lowest, highest = min(map(min, finite)), max(map(max, finite))
    if lowest >= 0 and max(middles) > _SPREAD * min(middles) > 0:
        axes.set_yscale("log", nonpositive="mask")
        axes.set_ylim(bottom=max(axes.get_ylim()[0], min(middles) / _DECADES))
    elif from_zero:
        axes.set_ylim(bottom=0)
        ordinary = max(sorted(values)[max(0, len(values) - 1 - max(1, len(values) // _RARE))] for values in finite)
        if highest > _FAR_OUT * ordinary > 0:
            axes.set_ylim(top=1.15 * ordinary)
            return [f"highest {digits(highest)}, beyond the axis"]
    return []


def _finish(axes: Any, unit: str, steps: int) -> None:
    axes.set_xlabel("step")
    axes.set_ylabel(unit)
    axes.set_xlim(-0.01 * steps, 1.02 * steps or 1)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.grid(color=_GRID)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


# ---- bars


class _Bars(NamedTuple):
    """A quantity that is one number of a run."""

    file: str
    title: str
    unit: str
    value: Callable[[Run], float | None]

    def draw(self, runs: Sequence[Run]) -> Picture | None:
        values = [self.value(run) for run in runs]
        if all(value is None for value in values):
            return None
        figure = Figure(figsize=(_WIDTH, 1.1 + 0.38 * len(runs)))
        axes = figure.add_subplot()
        shown = [value or 0.0 for value in values]
        places = range(len(runs))
        bars = axes.barh(places, shown, height=0.62, color=[_COLORS[place % len(_COLORS)] for place in places])
        axes.bar_label(bars, ["not known" if value is None else digits(value) for value in values], padding=4)
        axes.set_yticks(places, [_short(run.name) for run in runs], parse_math=False)
        axes.invert_yaxis()
        axes.set_xlim(0, 1.15 * max(shown) or 1)
        axes.set_xlabel(self.unit)
        axes.grid(axis="x", color=_GRID)
        axes.set_axisbelow(True)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
        return _picture(figure, axes, self.file, self.title, [], [])


# ---- both


def _picture(figure: Any, axes: Any, file: str, title: str, handles: Sequence[Any], labels: Sequence[str]) -> Picture:
    axes.set_title(title, loc="left", parse_math=False)  # a folder may have dollars in its name
    if handles:
        columns = max(1, min(len(labels), _LEGEND_WIDTH // (max(map(len, labels)) + 8)))
        rows = math.ceil(len(labels) / columns)
        figure.set_size_inches(_WIDTH, _HEIGHT + 0.22 * rows)
        legend = figure.legend(
            handles, labels, loc="outside lower center", ncols=columns, frameon=False, handlelength=3.5, fontsize=9
        )
        for text in legend.get_texts():
            text.set_parse_math(False)
    figure.set_layout_engine("constrained")
    written = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # a name in a script that the font lacks
        figure.savefig(written, format="png", dpi=_DPI)
    return Picture(f"{file}.png", title, written.getvalue())


def _short(name: str) -> str:
    """`name` with its middle left out where it is long: runs differ at either end."""
    if len(name) <= _LONGEST_NAME:
        return name
    half = (_LONGEST_NAME - 1) // 2
    return f"{name[:half]}…{name[-half:]}"


def _file_name(key: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]", "_", key)


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _unit(key: str) -> str:
    return key.removeprefix("eval_").replace("_", " ")
