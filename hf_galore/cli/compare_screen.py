"""What `hf-galore compare` shows in a terminal: tables that are as wide as that, and no wider."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import rich.box
import rich.table
from rich.console import Console
from rich.text import Text

from ..compare.notes import notes
from ..compare.seeds import Compared
from ..compare.tables import MOST_COLUMNS, Table, in_brief, in_lines, results_table, same_in_all, settings_table
from ..compare.words import shortened

_LONG_NAME, _SHORT_NAME = 48, 16  # characters in a line, where there is room and where there is not
_NARROWEST = 12  # characters that a cell has at least


class _Layout(NamedTuple):
    """How a table stands on a screen."""

    lines: bool
    """Whether each run has a line."""
    between: int
    """What a column takes beside its text."""
    outside: int
    """What the first takes besides."""
    longest_label: int
    longest_cell: int


_COLUMNS = _Layout(lines=False, between=3, outside=1, longest_label=_LONG_NAME, longest_cell=200)
_LINES = _Layout(lines=True, between=2, outside=0, longest_label=28, longest_cell=32)


def show(compared: Sequence[Compared]) -> None:
    """Print the tables, settings that differ first, and the notes."""
    console = Console(highlight=False)
    if len(compared) > MOST_COLUMNS:
        settings = in_lines(_named(settings_table(compared), _LINES), brief=True)
        results = in_lines(_named(results_table(compared), _LINES), brief=True)
        layouts = (_LINES, _LINES)
    else:
        settings = _named(settings_table(compared), _COLUMNS)
        results = _named(results_table(compared), _COLUMNS)
        if not _fits(results, console.width):
            results = in_brief(results)
        if not _fits(results, console.width):
            results = in_brief(_named(results_table(compared, with_differences=False), _COLUMNS))
        layouts = (_folded(settings, console.width), _COLUMNS)
    _print(console, settings, layouts[0])
    same = "; ".join(f"{label} {text}" for label, text in same_in_all(compared))
    if same:
        _say(console, f"The same in all: {same}.")
        console.print()
    _print(console, results, layouts[1])
    for note in notes(compared):
        _say(console, note)


def _say(console: Console, text: str) -> None:
    # A person reads lines that end between words, a program or a pager whole ones.
    console.print(Text(text), soft_wrap=not console.is_terminal)


def _print(console: Console, table: Table, layout: _Layout) -> None:
    for part in _parts(table, console.width, layout):
        console.print(part)
        if layout.lines:
            console.print()


def _fits(table: Table, width: int) -> bool:
    """Whether a table with a column for each run fits into `width` in one part."""
    return len(list(_parts(table, width, _COLUMNS))) <= 1


def _folded(table: Table, width: int) -> _Layout:
    """A layout in which all columns fit side by side, if they are not too narrow for words then."""
    label = max((len(row.label) for row in table.rows), default=0)
    room = (width - label - _COLUMNS.between - _COLUMNS.outside) // max(1, len(table.names)) - _COLUMNS.between
    return _COLUMNS._replace(longest_cell=max(room, _NARROWEST))


def _named(table: Table, layout: _Layout) -> Table:
    return table._replace(names=_names(table, layout))


def _names(table: Table, layout: _Layout) -> list[str]:
    """The runs' names with what is said beside them; in lines they are shortened where that leaves them distinct."""
    names = table.names
    if layout.lines:
        rooms = [layout.longest_label - (len(table.marks[n]) + 3 if n in table.marks else 0) for n in range(len(names))]
        short = [shortened(name, max(room, _SHORT_NAME)) for name, room in zip(names, rooms, strict=True)]
        names = short if len(set(short)) == len(short) else names
    return [f"{name} ({table.marks[place]})" if place in table.marks else name for place, name in enumerate(names)]


def _parts(table: Table, width: int, layout: _Layout) -> Iterator[rich.table.Table]:
    """Yield the table in as many parts as its columns need to fit `width`."""
    if not table.rows or not table.names:  # nothing is known of the settings of other programs
        return
    label = min(layout.longest_label, max(len(row.label) for row in table.rows))
    left = label + layout.between + layout.outside
    columns = _widths(table, layout, _LONG_NAME)
    if left + sum(columns) > width:
        columns = _widths(table, layout, _SHORT_NAME)
    start = 0
    while start < len(columns):
        end = start + 1
        while end < len(columns) and left + sum(columns[start : end + 1]) <= width:
            end += 1
        yield _part(table, range(start, end), label, columns, layout)
        start = end


def _widths(table: Table, layout: _Layout, longest_name: int) -> list[int]:
    """The widths of the columns, with what is between them; a name that is longer goes on in the next line."""
    found = []
    for place, name in enumerate(table.names):
        of_name = max(map(len, name.split())) if layout.lines else min(len(name), longest_name)
        widest = max(of_name, *(len(row.cells[place]) for row in table.rows))
        found.append(layout.between + min(layout.longest_cell, widest))
    return found


def _part(table: Table, places: range, label: int, columns: Sequence[int], layout: _Layout) -> rich.table.Table:
    shown = rich.table.Table(
        title=Text(table.title) if places.start == 0 else None,
        title_justify="left",
        box=rich.box.SIMPLE_HEAD if layout.lines else rich.box.HEAVY_HEAD,
        show_edge=not layout.lines,
        pad_edge=not layout.lines,
        padding=(0, 1, 0, 0) if layout.lines else (0, 1),
    )
    shown.add_column("", overflow="fold", max_width=label)
    for place in places:
        name = Text(table.names[place], overflow="fold")
        shown.add_column(name, justify="right", overflow="fold", max_width=columns[place] - layout.between)
    for line, row in enumerate(table.rows):
        cells = [
            Text(row.cells[place], _style(table, line if layout.lines else place, place in row.best), overflow="fold")
            for place in places
        ]
        shown.add_row(Text(row.label, _style(table, line) if layout.lines else "", overflow="fold"), *cells)
    return shown


def _style(table: Table, run: int, best: bool = False) -> str:
    if best:
        return "bold"
    return "red" if run in table.broken else ""
