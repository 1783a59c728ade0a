"""Trainings that are lines of a file once they are finished, so that a benchmark can be made in pieces."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
from collections.abc import Callable, Hashable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, Generic, TypeVar

from rich.console import Console
from rich.progress import track

R = TypeVar("R", bound=Hashable)


class Runs(Generic[R]):
    """What came of each run, by the dataclass that it is made from.

    Args:
        kind: the frozen dataclass; a line of the file has its fields besides what came of it.
        path: the file to read and to add to, or `None` to forget.
    """

    def __init__(self, kind: type[R], path: Path | None) -> None:
        self._names = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
        self._kind = kind
        self._path = path
        self.found: dict[R, dict[str, Any]] = {}
        if path is not None and path.exists():
            for line in path.read_text().splitlines():
                self._keep(json.loads(line))

    def _keep(self, line: dict[str, Any]) -> None:
        self.found[self._kind(**{name: line[name] for name in self._names})] = line

    def of(self, runs: Iterable[R]) -> list[dict[str, Any]] | None:
        """What came of `runs`, or `None` where one of them is missing."""
        found = [self.found.get(run) for run in runs]
        known = [line for line in found if line is not None]
        return known if len(known) == len(found) else None

    def perform(self, runs: Iterable[R], train: Callable[[R], dict[str, Any]], workers: int, console: Console) -> None:
        """Do the runs that are missing, `workers` at a time, each in a process that `train` can be imported in."""
        missing = [run for run in dict.fromkeys(runs) if run not in self.found]
        if not missing:
            return
        with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
            futures = {pool.submit(train, run): run for run in missing}
            for future in track(as_completed(futures), "Runs", total=len(futures), console=console, transient=True):
                line = {**{name: getattr(futures[future], name) for name in self._names}, **future.result()}
                self._keep(line)
                if self._path is not None:
                    with self._path.open("a") as file:
                        file.write(json.dumps(line) + "\n")
