"""A line on stderr that says what a command is about, where somebody looks at it."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from . import ranks


@contextlib.contextmanager
def spinner(first: str) -> Iterator[Callable[[str], None] | None]:
    """A spinner with `first`, and a way to say something else; `None` where no terminal or another process shows it."""
    if not sys.stderr.isatty() or not ranks.speaks():
        yield None
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as shown:
        task = shown.add_task(first, total=None)
        yield lambda text: shown.update(task, description=text)
