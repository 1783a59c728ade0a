"""Runs side by side, as tables of text that a terminal and a page show alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from .differences import SHOWN, TOLD, differing, joined, setting
from .quantities import Quantity, quantities, spread_text
from .runs import Run, is_finite
from .seeds import Compared, Seeds, is_broken, spread
from .words import UNKNOWN, digits, per_cent

MOST_COLUMNS = 3
"""Runs that stand side by side; more stand below each other, a line each."""


class Row(NamedTuple):
    """A quantity of each run, as text."""

    label: str
    cells: list[str]
    best: frozenset[int] = frozenset()
    """The runs that do best, where it is known what that is and not all do."""
    brief: str | None = None
    """The label where room is scarce; `None` where the row is left out then."""
    brief_cells: list[str] | None = None
    """The cells where room is scarce, if they are others."""


class Table(NamedTuple):
    """A table with a column for each run; in lines, with a line for each."""

    title: str
    names: list[str]
    rows: list[Row]
    marks: Mapping[int, str] = MappingProxyType({})
    """What is said beside a run's name, by its place: `3 seeds`, `broken`, `interrupted`."""
    broken: frozenset[int] = frozenset()
    """The runs that are broken."""


def settings_table(compared: Sequence[Compared], *, everything: bool = False) -> Table:
    """The table of the settings.

    Args:
        compared: the columns.
        everything: all that is known; or of several runs what is not the same in all.
    """
    rows = _told(compared)
    if everything:
        rows += [_texts(name, compared, _fact(name)) for name in ("optim", "optim_args")]
    shown = (*SHOWN, "optim_args", "optim_target_modules") if everything else (*SHOWN, *TOLD)
    rows += [_texts(key, compared, setting(key)) for key in differing(compared) if key not in shown]
    if everything:
        rows += [_texts("optim_target_modules", compared, _targets)]
        rows += [_texts(name, compared, _fact(name)) for name in ("command", "recipe", "started")]
        rows += [_texts("folder", compared, lambda run: str(run.folder))]
    elif len(compared) > 1:
        rows = [row for row in rows if len(_values(row)) > 1]
    if everything:
        title = "All settings"
    else:
        title = "Settings" if len(compared) == 1 else "Settings that differ"
    return _table(title, compared, _known(rows))


def same_in_all(compared: Sequence[Compared]) -> list[tuple[str, str]]:
    """What is told of settings and is the same in all runs that tell it, with its name; nothing of a single run."""
    if len(compared) == 1:
        return []
    return [(row.label, values.pop()) for row in _told(compared) if len(values := _values(row)) == 1]


def results_table(compared: Sequence[Compared], *, with_differences: bool = True) -> Table:
    """The table of the results; of few runs with the differences from the first, unless told otherwise."""
    with_differences = with_differences and 1 < len(compared) <= MOST_COLUMNS
    rows = [_row(quantity, compared, with_differences) for quantity in quantities(compared)]
    steps = [
        [joined(one, text) or UNKNOWN for one in compared]
        for text in (_steps, lambda run: steps_of_all(run) if run.step < run.max_steps else f"{run.step:,}")
    ]
    title = f"Results; in brackets the difference from {compared[0].name}" if with_differences else "Results"
    return _table(title, compared, [*_known(rows), Row("steps", steps[0], brief="steps", brief_cells=steps[1])])


def versions_table(runs: Sequence[Run]) -> Table:
    """The table of the versions of libraries that the runs were made with."""
    packages = sorted({package for run in runs if run.facts for package in run.facts.versions})

    def version(package: str) -> Callable[[Run], str | None]:
        return lambda run: run.facts.versions.get(package) if run.facts else None

    return _table("Versions", runs, [_texts(package, runs, version(package)) for package in packages])


def in_lines(table: Table, *, brief: bool = False) -> Table:
    """`table` with a line for each run: its rows become columns.

    Args:
        table: with a column for each run.
        brief: under brief names, and without what has none.
    """
    rows = [row for row in table.rows if row.brief is not None] if brief else table.rows
    lines = [
        Row(
            label=table.names[place],
            cells=[(row.brief_cells if brief and row.brief_cells else row.cells)[place] for row in rows],
            best=frozenset(column for column, row in enumerate(rows) if place in row.best),
        )
        for place in range(len(table.names))
    ]
    return Table(
        table.title, [row.brief if brief and row.brief else row.label for row in rows], lines, table.marks, table.broken
    )


def in_brief(table: Table) -> Table:
    """`table` under brief names, with what has none under its own."""
    return table._replace(rows=[row._replace(label=row.brief or row.label) for row in table.rows])


def name_of(one: Compared) -> str:
    """The name of a run, or of several seeds with how many they are."""
    return f"{one.name} ({len(one.runs)} seeds)" if isinstance(one, Seeds) else one.name


def _table(title: str, compared: Sequence[Compared], rows: list[Row]) -> Table:
    marks = {place: ", ".join(found) for place, one in enumerate(compared) if (found := _marks(one))}
    broken = frozenset(place for place, one in enumerate(compared) if is_broken(one))
    return Table(title, [one.name for one in compared], rows, marks, broken)


def _marks(one: Compared) -> list[str]:
    found = [f"{len(one.runs)} seeds"] if len(one.runs) > 1 else []
    if is_broken(one):
        found.append("broken")
    return found if all(run.finished for run in one.runs) else [*found, "interrupted"]


# ---- settings


def _told(compared: Sequence[Compared]) -> list[Row]:
    """What is told of a run in words of its own."""
    return [
        _texts("method", compared, lambda run: run.method),
        _texts("model", compared, lambda run: run.model),
        _texts("learning rate", compared, _learning_rate),
        _texts("parameters", compared, lambda run: f"{run.facts.parameters:,}" if run.facts else None),
        _texts("trained", compared, _trained),
        _texts("device", compared, _fact("device")),
        _texts("data", compared, _fact("data")),
    ]


def _fact(name: str) -> Callable[[Run], str | None]:
    return lambda run: getattr(run.facts, name) if run.facts else None


def _texts(label: str, compared: Sequence[Compared], text: Callable[[Run], str | None]) -> Row:
    return Row(label, [joined(one, text) or UNKNOWN for one in compared], brief=label)


def _known(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if _values(row)]


def _values(row: Row) -> set[str]:
    return {cell for cell in row.cells if cell != UNKNOWN}


def _learning_rate(run: Run) -> str | None:
    if run.learning_rate is None:
        return None
    return f"{run.learning_rate:g}" if run.facts else f"{run.learning_rate:.3g} at most"


def _trained(run: Run) -> str | None:
    if run.facts is None:
        return None
    trained, all_of_them = run.facts.trainable_parameters, run.facts.parameters
    return "all" if trained == all_of_them else f"{trained:,} ({digits(100 * trained / max(1, all_of_them))} %)"


def _targets(run: Run) -> str | None:
    targets = run.facts.optim_target_modules if run.facts else None
    return ", ".join(targets) if isinstance(targets, list) else targets


# ---- results


def _steps(run: Run) -> str:
    how = "" if run.step >= run.max_steps and run.finished else "stopped early" if run.finished else "interrupted"
    text = f"{steps_of_all(run)}, {how}" if how else f"{run.step:,}"
    return text if run.broken is None else f"{text}, broken at {run.broken[1]:,}"


def steps_of_all(run: Run) -> str:
    """`40 of 100`."""
    return f"{run.step:,} of {run.max_steps:,}" if run.max_steps else f"{run.step:,}"


def _row(quantity: Quantity, compared: Sequence[Compared], with_differences: bool) -> Row:
    found = [spread(one, quantity.value) for one in compared]
    first = found[0].mean if found[0] else None
    cells = []
    for place, (one, value) in enumerate(zip(compared, found, strict=True)):
        text = spread_text(quantity, one, value)
        if place and with_differences and quantity.relative and first and value and is_finite(first):
            text = f"{text} ({per_cent(value.mean / first - 1)})" if is_finite(value.mean) else text
        cells.append(text or UNKNOWN)
    sound = [None if is_broken(one) or not value else value.mean for one, value in zip(compared, found, strict=True)]
    return Row(quantity.label, cells, _best(sound, quantity.lower_is_better), quantity.brief)


def _best(values: Sequence[float | None], lower_is_better: bool | None) -> frozenset[int]:
    found = {place: value for place, value in enumerate(values) if value is not None and math.isfinite(value)}
    if lower_is_better is None or len(set(found.values())) < 2:
        return frozenset()
    best = (min if lower_is_better else max)(found.values())
    return frozenset(place for place, value in found.items() if value == best)
