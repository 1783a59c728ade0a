"""Runs side by side, as one HTML page that needs nothing but itself."""

from __future__ import annotations

import base64
import datetime
from collections.abc import Sequence
from html import escape

from ..version import __version__
from .figures import Picture
from .runs import Run
from .tables import Table, notes, results_table, settings_table, versions_table

PAGE = "index.html"

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #59636e; --paper: #ffffff; --line: #d1d9e0; --best: #d9f2e6; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --soft: #9198a1; --paper: #0d1117; --line: #3d444d; --best: #12402c; }
}
body { background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; margin: 0 auto;
  max-width: 1280px; padding: 1.5rem; }
h1 { font-size: 1.6rem; margin: 0; }
h2 { font-size: 1.2rem; margin: 2rem 0 0.5rem; }
p.about { color: var(--soft); margin: 0.25rem 0 0; }
div.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.9rem; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid var(--line); padding: 0.35rem 0.8rem; text-align: right; vertical-align: top; }
thead th { border-bottom-width: 2px; overflow-wrap: anywhere; }
td, thead th { min-width: 6rem; }
td { max-width: 24rem; overflow-wrap: anywhere; }
table.numbers td { white-space: nowrap; }
tbody th, thead th:first-child { background: var(--paper); font-weight: 500; left: 0; position: sticky;
  text-align: left; white-space: nowrap; }
td.best { background: var(--best); font-weight: 600; }
div.pictures { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 34rem), 1fr)); }
figure { background: #ffffff; border: 1px solid var(--line); border-radius: 6px; margin: 0; padding: 0.5rem; }
img { display: block; height: auto; margin: 0 auto; max-width: 100%; }
li { margin: 0.2rem 0; }
"""

# The browser is told too: nothing is fetched, and nothing in a name or a log is run.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def page(runs: Sequence[Run], drawn: Sequence[Picture]) -> str:
    """Return the page: tables, pictures, notes, versions; light or dark as the reader's system is."""
    title = f"{runs[0].name}" if len(runs) == 1 else f"{len(runs)} runs compared"
    made = datetime.datetime.now().astimezone().isoformat(sep=" ", timespec="minutes")
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en">',
        "<head>",
        '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}</title>",
        f"<style>{_STYLE}</style>",
        "</head>",
        "<body>",
        f"<h1>{escape(title)}</h1>",
        f'<p class="about">Made by hf-galore compare {escape(__version__)} on {escape(made)}.</p>',
        *_table(results_table(runs), kind="numbers"),
        *_notes(notes(runs)),
        *_pictures(drawn),
        *_table(settings_table(runs, everything=True), kind="words"),
        *_table(versions_table(runs), kind="words"),
        "</body>",
        "</html>",
    ]
    return "\n".join(parts) + "\n"


def _table(table: Table, kind: str) -> list[str]:
    if not table.rows:
        return []
    names = "".join(f'<th scope="col">{escape(name)}</th>' for name in table.names)
    lines = [
        f"<h2>{escape(table.title)}</h2>",
        '<div class="wide">',
        f'<table class="{kind}">',
        f'<thead><tr><th scope="col">run</th>{names}</tr></thead>',
        "<tbody>",
    ]
    for row in table.rows:
        cells = "".join(
            f'<td class="best">{escape(cell)}</td>' if place in row.best else f"<td>{escape(cell)}</td>"
            for place, cell in enumerate(row.cells)
        )
        lines.append(f'<tr><th scope="row">{escape(row.label)}</th>{cells}</tr>')
    return [*lines, "</tbody>", "</table>", "</div>"]


def _notes(texts: Sequence[str]) -> list[str]:
    if not texts:
        return []
    return ["<h2>Notes</h2>", "<ul>", *(f"<li>{escape(text)}</li>" for text in texts), "</ul>"]


def _pictures(drawn: Sequence[Picture]) -> list[str]:
    if not drawn:
        return []
    lines = ["<h2>Curves and bars</h2>", '<div class="pictures">']
    for picture in drawn:
        data = base64.b64encode(picture.png).decode("ascii")
        lines.append(f'<figure><img alt="{escape(picture.title)}" src="data:image/png;base64,{data}"></figure>')
    return [*lines, "</div>"]
