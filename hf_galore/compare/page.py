"""Runs side by side, as one HTML page that needs nothing but itself, and no script."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from html import escape

from ..version import __version__
from . import colors
from .curves import remarks
from .figures import Picture
from .notes import notes
from .page_style import CHOSEN_AXIS, STYLE, rules_for_runs
from .progress import AXES
from .runs import Run
from .seeds import Compared, is_broken
from .svg import run_mark
from .tables import (
    MOST_COLUMNS,
    Table,
    in_lines,
    name_of,
    results_table,
    same_in_all,
    settings_table,
    versions_table,
)

PAGE = "index.html"

# The browser is told too: nothing is fetched, and nothing in a name or a log is run.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def page(compared: Sequence[Compared], drawn: Sequence[Picture], axis: str = "steps") -> str:
    """Return the page: tables, pictures, notes, versions; light or dark as the reader's system is.

    Args:
        compared: runs, or several seeds of one.
        drawn: their pictures, with SVGs.
        axis: what curves are over until the reader chooses.
    """
    runs = [run for one in compared for run in one.runs]
    title = f"{runs[0].name}" if len(runs) == 1 else f"{len(runs)} runs compared"
    made = datetime.datetime.now().astimezone().isoformat(sep=" ", timespec="minutes")
    marks = list(range(len(compared)))
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en">',
        "<head>",
        '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}</title>",
        f"<style>{STYLE}{rules_for_runs(len(compared))}</style>",
        "</head>",
        "<body>",
        f"<h1>{escape(title)}</h1>",
        f'<p class="about">Made by hf-galore compare {escape(__version__)} on {escape(made)}.</p>',
        *_titled(settings_table(compared), marks, kind="words"),
        *_same(same_in_all(compared)),
        *_titled(results_table(compared), marks, kind="numbers"),
        *_notes(notes(compared)),
        *_pictures(compared, drawn, axis),
        *_each_seed(compared, runs),
        *_folded("All settings", _table(settings_table(runs, everything=True), kind="words", lines=False), runs),
        *_folded("Versions", _table(versions_table(runs), kind="words", lines=False), runs),
        "</body>",
        "</html>",
    ]
    return "\n".join(parts) + "\n"


# ---- tables


def _titled(table: Table, marks: Sequence[int], *, kind: str) -> list[str]:
    lines = _table(table, marks, kind=kind, lines=len(table.names) > MOST_COLUMNS)
    return [f"<h2>{escape(table.title)}</h2>", *lines] if lines else []


def _table(table: Table, marks: Sequence[int] = (), *, kind: str, lines: bool) -> list[str]:
    """A table without its title.

    Args:
        table: with a column for each run.
        marks: what the runs are marked with, to be hidden and to show their colour; nothing for neither.
        kind: of its cells, for the style.
        lines: whether each run has a line of it, in place of a column.
    """
    if not table.rows:
        return []
    shown = in_lines(table) if lines else table
    names = [_name(table, place) for place in range(len(table.names))]
    heads = [escape(name) for name in shown.names] if lines else names
    if marks and not lines:
        heads = [_swatch(mark) + head for mark, head in zip(marks, heads, strict=True)]
    columns = [f' class="{run_mark(mark)}"' for mark in marks] if marks and not lines else [""] * len(heads)
    head = "".join(f'<th scope="col"{mark}>{text}</th>' for mark, text in zip(columns, heads, strict=True))
    body = []
    for place, row in enumerate(shown.rows):
        mark = f' class="{run_mark(marks[place])}"' if marks and lines else ""
        swatch = _swatch(marks[place]) if marks and lines else ""
        cells = ""
        for column, cell in enumerate(row.cells):
            of_run = place if lines else column
            told = [run_mark(marks[column])] if marks and not lines else []
            told += ["best"] if column in row.best else ["broken"] if of_run in table.broken else []
            cells += f"<td{_classes(told)}>{escape(cell)}</td>"
        body.append(
            f'<tr{mark}><th scope="row">{swatch}{names[place] if lines else escape(row.label)}</th>{cells}</tr>'
        )
    return [
        '<div class="wide" tabindex="0">',
        f'<table class="{kind}">',
        f'<thead><tr><th scope="col">run</th>{head}</tr></thead>',
        "<tbody>",
        *body,
        "</tbody>",
        "</table>",
        "</div>",
    ]


def _name(table: Table, place: int) -> str:
    mark = table.marks.get(place)
    return escape(table.names[place]) + (_small(f"({mark})", place in table.broken) if mark else "")


def _small(text: str, is_broken: bool) -> str:
    return f" <small{_classes(['broken'] if is_broken else [])}>{escape(text)}</small>"


def _classes(names: Sequence[str]) -> str:
    return f' class="{" ".join(names)}"' if names else ""


def _same(found: Sequence[tuple[str, str]]) -> list[str]:
    if not found:
        return []
    told = "; ".join(f"{escape(label)} <b>{escape(text)}</b>" for label, text in found)
    return [f'<p class="same">The same in all: {told}.</p>']


def _each_seed(compared: Sequence[Compared], runs: Sequence[Run]) -> list[str]:
    if len(compared) == len(runs):
        return []
    return _folded("Each seed by itself", _table(results_table(runs), kind="numbers", lines=True), runs)


def _folded(title: str, lines: Sequence[str], runs: Sequence[Run]) -> list[str]:
    """`lines` below a title, open where runs are few."""
    if not lines:
        return []
    is_open = " open" if len(runs) <= MOST_COLUMNS else ""
    return [f"<details{is_open}>", f"<summary>{escape(title)}</summary>", *lines, "</details>"]


def _notes(texts: Sequence[str]) -> list[str]:
    if not texts:
        return []
    return ["<h2>Notes</h2>", "<ul>", *(f"<li>{escape(text)}</li>" for text in texts), "</ul>"]


# ---- pictures


def _pictures(compared: Sequence[Compared], drawn: Sequence[Picture], axis: str) -> list[str]:
    if not drawn:
        return []
    axes = [one for one in AXES if any(one in picture.svgs for picture in drawn)]
    lines = ["<h2>Curves and bars</h2>", '<div class="drawn">', '<div class="keys">']
    if len(axes) > 1:
        lines += ['<fieldset class="axes"><legend>over</legend>', *(_choice(one, axis) for one in axes), "</fieldset>"]
    if len(compared) > 1:
        entries = [_legend(place, one) for place, one in enumerate(compared)]
        lines += ['<fieldset class="runs"><legend>runs shown</legend>', *entries, "</fieldset>"]
    lines += ["</div>", '<div class="pictures">']
    for picture in drawn:
        over = ("",) if "" in picture.svgs else axes
        svgs = [
            f'<div class="{_axis_class(one, axis)}">{picture.svgs.get(one, f"<p>Of no run over {one}.</p>")}</div>'
            for one in over
        ]
        lines += ["<figure>", f"<figcaption>{_caption(picture)}</figcaption>", *svgs, "</figure>"]
    return [*lines, "</div>", "</div>"]


def _caption(picture: Picture) -> str:
    # Bars have their unit below them.
    unit = [] if "" in picture.svgs or picture.unit in picture.title.lower() else [picture.unit]
    said = "; ".join([*unit, *picture.said])
    return escape(picture.title) + (f" <small>{escape(said)}</small>" if said else "")


def _axis_class(one: str, chosen: str) -> str:
    if not one:
        return "any-axis"
    return f"axis {one} {CHOSEN_AXIS}" if one == chosen else f"axis {one}"


def _choice(one: str, chosen: str) -> str:
    # A browser would otherwise remember what was chosen when the page is loaded again, of other runs perhaps.
    checked = " checked" if one == chosen else ""
    return f'<label><input type="radio" name="axis" id="over-{one}" autocomplete="off"{checked}>{one}</label>'


def _legend(place: int, one: Compared) -> str:
    told = ", ".join(remarks(one))
    said = _small(told, is_broken(one)) if told else ""
    box = f'<input type="checkbox" id="show-{place}" autocomplete="off" checked>'
    return f"<label>{box}{_swatch(place)}<span>{escape(name_of(one))}{said}</span></label>"


def _swatch(place: int) -> str:
    """A piece of the run's line."""
    style = colors.style(place)
    width = 2.5
    dashes = f' stroke-dasharray="{" ".join(f"{width * length:g}" for length in style.dashes)}"' if style.dashes else ""
    line = (
        f'<line x1="1" x2="29" y1="5" y2="5" stroke="var(--run-{style.color})" stroke-width="{width}"{dashes}></line>'
    )
    return f'<svg class="swatch" viewBox="0 0 30 10" aria-hidden="true">{line}</svg>'
