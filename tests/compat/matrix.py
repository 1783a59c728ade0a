"""The matrix of docs/versions.md: a row of each environment, as `python -m tests.compat --write` makes it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from .environments import COLUMNS

BEGIN, END = "<!-- made by python -m tests.compat --write -->", "<!-- end -->"
HEADING = ("environment", "Python", *COLUMNS.values(), "tests", "result")


class Row(NamedTuple):
    """What an environment had, and what its tests said."""

    name: str
    python: str
    versions: Mapping[str, str]
    """Of everything that hf-galore asks for there, by its normalized name."""
    tests: str
    result: str


def markdown(rows: Iterable[Row]) -> list[str]:
    """The lines of the table, and below it one of each row with the versions that have no column."""
    table, more = [], []
    for row in rows:
        versions = (row.versions.get(name, "–") for name in COLUMNS)
        table.append(_line(row.name, row.python, *versions, row.tests, row.result))
        others = ", ".join(f"{name} {row.versions[name]}" for name in sorted(set(row.versions) - set(COLUMNS)))
        more.append(f"- {row.name}: {others}")
    return [_line(*HEADING), "|" + "---|" * len(HEADING), *table, "", "With them:", "", *more]


def rows_of(text: str) -> list[Row]:
    """The rows that the text of docs/versions.md has.

    Raises:
        ValueError: the marks are missing, or the table has other columns.
    """
    lines = _between(text).splitlines()
    table = [_cells(line) for line in lines if line.startswith("|")]
    if table and table[0] != list(HEADING):
        raise ValueError(f"The table of docs/versions.md has the columns {table[0]}, not {list(HEADING)}.")
    others = dict(re.findall(r"^- ([\w.-]+): (.*)$", "\n".join(lines), re.MULTILINE))
    rows = []
    for name, python, *versions, tests, result in table[2:]:
        known = {key: version for key, version in zip(COLUMNS, versions, strict=True) if version != "–"}
        known |= dict(each.split(" ", 1) for each in others.get(name, "").split(", ") if each)
        rows.append(Row(name, python, known, tests, result))
    return rows


def with_rows(text: str, new: Iterable[Row], order: Iterable[str]) -> str:
    """The text of docs/versions.md with those rows instead of, or beside, the ones that it has.

    Args:
        text: the text.
        new: the rows.
        order: the names of environments; rows with other names go.
    """
    rows = {row.name: row for row in (*rows_of(text), *new)}
    lines = markdown(rows[name] for name in order if name in rows)
    before, _, after = text.partition(f"{BEGIN}{_between(text)}{END}")
    return "\n".join([f"{before}{BEGIN}", "", *lines, "", f"{END}{after}"])


def _between(text: str) -> str:
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"docs/versions.md needs {BEGIN} once, and {END} once.")
    return text.partition(BEGIN)[2].partition(END)[0]


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]
