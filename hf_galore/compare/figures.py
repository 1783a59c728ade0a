"""Runs side by side, as pictures: PNG with a legend each, and SVG for a page that has one legend for all."""

from __future__ import annotations

import io
import math
import re
import statistics
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
from matplotlib.figure import Figure  # not pyplot, which would want to know about a display
from matplotlib.ticker import EngFormatter, MaxNLocator

from . import colors
from .bars import Bars
from .curves import Curve, curve, level, remarks, smoothed, window_in_words
from .progress import AXES, axes_of
from .runs import HELD_OUT_LOSS, MIB, STEP_SECONDS, TOKENS_PER_SECOND, TRAINING_LOSS, Run, shared_metrics
from .seeds import Compared, Seeds
from .svg import SETTINGS, drawn_as_svg, run_mark
from .tables import name_of
from .words import digits, metric_name, shortened

WIDTH, HEIGHT = 8.0, 4.2  # inches
SMALL_WIDTH, SMALL_HEIGHT = 5.4, 3.1  # of SVG, whose text grows with it
_DPI = 150
_FEW_POINTS = 30  # are marked
_FEW_CURVES = 4  # may have the noise that is behind a running median drawn too
_SPREAD = 30  # from where a linear axis would hide most of a curve
_LONGEST_NAME = 48
_LEGEND_WIDTH = 104  # characters
_RARE = 20  # one value in so many, and at least one, is not ordinary
_FAR_OUT = 3  # times the highest ordinary value: a step, mostly the first, that would flatten all the others
_DECADES = 1e3  # that a logarithmic axis goes below the lowest curve's middle: schedules end at 0
_MARGINS = {"left": 0.12, "right": 0.98, "top": 0.97, "bottom": 0.15}  # of SVG


class Picture(NamedTuple):
    """What shows one quantity."""

    file: str
    """A name without its ending."""
    title: str
    unit: str
    said: list[str]
    """What a reader has to know of it."""
    png: bytes
    """With a title and a legend."""
    svgs: Mapping[str, str]
    """By axis, without title, unit and legend: what an HTML page takes; of bars one, by an empty name."""


def pictures(compared: Sequence[Compared], axis: str = "steps", *, for_page: bool = True) -> list[Picture]:
    """Draw a picture of each quantity that any of `compared` has.

    Args:
        compared: runs, or several seeds of one.
        axis: what the PNGs' curves are drawn over, one of `progress.AXES`.
        for_page: whether SVGs are drawn, over each axis.
    """
    runs = [run for one in compared for run in one.runs]
    lines = [
        _Lines(TRAINING_LOSS, "training_loss", "Training loss", "loss"),
        _Lines(HELD_OUT_LOSS, "held_out_loss", "Held-out loss", "loss"),
        *(_Lines(key, _file_name(key), _sentence(metric_name(key)), _unit(key)) for key in shared_metrics(runs)),
        _Lines("learning_rate", "learning_rate", "Learning rate", "learning rate", noisy=False),
        _Lines(STEP_SECONDS, "step_time", "Step time", "seconds per step", True, lambda run: run.step_seconds),
        _Lines(TOKENS_PER_SECOND, "tokens_per_second", "Speed", "tokens / s", True, lambda run: run.tokens_per_second),
    ]
    bars = [
        Bars("peak_memory", "Peak memory", "GiB", lambda run: run.peak_memory_gib),
        Bars("optimizer_state", "Optimizer state", "MiB", _optimizer_mib),
    ]
    with matplotlib.rc_context(SETTINGS):
        drawn = [_lines(one, compared, axis, for_page) for one in lines]
        drawn += [_bars(one, compared, for_page) for one in bars]
    return [picture for picture in drawn if picture is not None]


class _Lines(NamedTuple):
    """A quantity over the course of the training."""

    key: str
    file: str
    title: str
    unit: str
    from_zero: bool = False
    whole: Callable[[Run], float | None] | None = None
    """What to show as one level of a run that did not log it by step."""
    noisy: bool = True


class _Drawn(NamedTuple):
    """Curves on axes."""

    handles: list[Any]
    labels: list[str]
    said: list[str]
    """What a reader has to know of the picture."""


def _lines(what: _Lines, compared: Sequence[Compared], axis: str, for_page: bool) -> Picture | None:
    logged = [value for one in compared for run in one.runs for _, value in run.series(what.key)]
    if not any(map(math.isfinite, logged)):
        whole = what.whole
        return None if whole is None else _bars(Bars(what.file, what.title, what.unit, whole), compared, for_page)
    figure = Figure(figsize=(WIDTH, HEIGHT))
    axes = figure.add_subplot()
    # The runs that have it may have no place on that axis.
    drawn = _draw(axes, what, compared, axis) or _draw(axes, what, compared, AXES[0])
    if drawn is None:
        return None
    title = titled(what.title, drawn.said)
    alone = len(compared) == 1
    handles = [] if alone else drawn.handles
    png = _png(figure, f"{title}: {drawn.labels[0]}" if alone else title, handles, drawn.labels)
    svgs = {}
    for other in axes_of([run for one in compared for run in one.runs]) if for_page else ():
        small = Figure(figsize=(SMALL_WIDTH, SMALL_HEIGHT), facecolor="none")
        if _draw(small.add_subplot(), what, compared, other) is not None:
            small.axes[0].set_ylabel("")
            small.subplots_adjust(**_MARGINS)
            svgs[other] = drawn_as_svg(small, f"{what.file}-{other}", title)
    return Picture(what.file, what.title, what.unit, drawn.said, png, svgs)


def _bars(what: Bars, compared: Sequence[Compared], for_page: bool) -> Picture | None:
    figure = Figure(figsize=(WIDTH, 1.1 + 0.38 * len(compared)))
    if not what.draw(figure.add_subplot(), compared, _LONGEST_NAME):
        return None
    svgs = {}
    if for_page:
        small = Figure(figsize=(SMALL_WIDTH, 0.7 + 0.26 * len(compared)), facecolor="none")
        what.draw(small.add_subplot(), compared, 0)
        small.set_layout_engine("constrained")
        svgs[""] = drawn_as_svg(small, what.file, what.title)
    return Picture(what.file, what.title, what.unit, [], _png(figure, what.title, [], []), svgs)


# ---- lines


def _draw(axes: Any, what: _Lines, compared: Sequence[Compared], axis: str) -> _Drawn | None:
    found: list[tuple[int, Compared, Curve, bool]] = []
    for place, one in enumerate(compared):
        line, whole = curve(one, what.key, axis), False
        if line is None and what.whole is not None and not isinstance(one, Seeds) and not one.series(what.key):
            value = what.whole(one)
            line, whole = (None if value is None else level(one, value, axis)), True
        if line is not None:
            found.append((place, one, line, whole))
    if not any(math.isfinite(value) for _, _, line, _ in found for value in line.y):
        return None
    unit, times = _unit_of(axis, max(max(line.x) for _, _, line, _ in found))
    handles, labels, is_smooth = [], [], False
    for place, one, line, whole in found:
        placed = line._replace(x=[times * x for x in line.x])
        smooth = smoothed(placed) if what.noisy else None
        is_smooth |= smooth is not None
        if smooth is not None and len(found) <= _FEW_CURVES:
            (noise,) = axes.plot(placed.x, placed.y, color=_color(place), linewidth=0.6, alpha=0.3)
            noise.set_gid(run_mark(place))
        few = not whole and len(placed.x) <= _FEW_POINTS
        handles.append(_line(axes, smooth or placed, place, marked=few))
        told = [*remarks(one, [what.key]), *(["mean of all its time"] if whole else [])]
        labels.append(shortened(name_of(one), _LONGEST_NAME) + (f" ({', '.join(told)})" if told else ""))
    thick = "thick: " if len(found) <= _FEW_CURVES else ""
    said = [thick + window_in_words()] if is_smooth else []
    if any(line.deviation and max(line.deviation) > 0 for _, _, line, _ in found):
        said.append("band: ± standard deviation")
    said += _scale(axes, [line.y for _, _, line, _ in found], what.from_zero)
    _finish(axes, what.unit, unit, times * max(max(line.x) for _, _, line, _ in found), axis)
    return _Drawn(handles, labels, said)


def _line(axes: Any, line: Curve, place: int, *, marked: bool) -> Any:
    dashes = colors.style(place).dashes
    (drawn,) = axes.plot(
        line.x,
        line.y,
        color=_color(place),
        linestyle=(0, dashes) if dashes else "solid",
        linewidth=1.8,
        marker="o" if marked else None,
        markersize=4,
        gid=run_mark(place),
    )
    if line.deviation is not None:
        low = [y - d for y, d in zip(line.y, line.deviation, strict=True)]
        high = [y + d for y, d in zip(line.y, line.deviation, strict=True)]
        band = axes.fill_between(line.x, low, high, color=_color(place), alpha=0.2, linewidth=0)
        band.set_gid(run_mark(place))
    return drawn


def _color(place: int) -> str:
    return colors.ON_WHITE[colors.style(place).color]


def _unit_of(axis: str, longest: float) -> tuple[str, float]:
    """The axis in words, and how many of its units are one of `longest`'s."""
    if axis == "hours":
        return ("hours of training steps", 1.0) if longest >= 1 else ("minutes of training steps", 60.0)
    return ("tokens" if axis == "tokens" else "step"), 1.0


def _scale(axes: Any, found: Sequence[Sequence[float]], from_zero: bool) -> list[str]:
    """Set the vertical axis so that all curves can be told apart; return what a reader has to know of it."""
    finite = [values for values in ([v for v in series if math.isfinite(v)] for series in found) if values]
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


def _finish(axes: Any, unit: str, along: str, longest: float, axis: str) -> None:
    axes.set_xlabel(along)
    axes.set_ylabel(unit)
    axes.set_xlim(-0.01 * longest, 1.02 * longest or 1)
    axes.xaxis.set_major_locator(MaxNLocator(integer=axis == "steps", nbins=7, steps=[1, 2, 5, 10]))
    if axis == "tokens":
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(color=colors.GRID)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


# ---- both


def _optimizer_mib(run: Run) -> float | None:
    return None if run.optimizer_bytes is None else run.optimizer_bytes / MIB


def _png(figure: Any, title: str, handles: Sequence[Any], labels: Sequence[str]) -> bytes:
    (axes,) = figure.axes
    axes.set_title(title, loc="left", parse_math=False)  # a folder may have dollars in its name
    if handles:
        columns = max(1, min(len(labels), _LEGEND_WIDTH // (max(map(len, labels)) + 8)))
        rows = math.ceil(len(labels) / columns)
        figure.set_size_inches(WIDTH, HEIGHT + 0.22 * rows)
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
    return written.getvalue()


def titled(title: str, said: Sequence[str]) -> str:
    """A title with what a reader has to know."""
    return f"{title} ({'; '.join(said)})" if said else title


def _file_name(key: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]", "_", key)


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _unit(key: str) -> str:
    return key.removeprefix("eval_").replace("_", " ")
