"""A comparison for programs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from .quantities import quantities
from .runs import Run, is_finite
from .seeds import Compared, Seeds, spread


def runs_as_dicts(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The contents of the tables as numbers, of each run; `None` for what is not known or is not finite."""
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
            "learning_rate": _number(run.learning_rate),
            "results": {quantity.key: _number(quantity.value(run)) for quantity in quantities(runs)},
            "facts": None if run.facts is None else dataclasses.asdict(run.facts),
        }
        for run in runs
    ]


def seeds_as_dicts(compared: Sequence[Compared]) -> list[dict[str, Any]]:
    """Of runs that differ in their seed: mean, deviation and count of each number, over those that are not broken."""
    found = []
    for one in compared:
        if isinstance(one, Seeds):
            results = {quantity.key: spread(one, quantity.value) for quantity in quantities(compared)}
            found.append(
                {
                    "name": one.name,
                    "runs": [run.name for run in one.runs],
                    "broken": [run.name for run in one.runs if run.broken is not None],
                    "results": {
                        key: None
                        if value is None
                        else {
                            "mean": _number(value.mean),
                            "deviation": _number(value.deviation),
                            "count": value.known,
                        }
                        for key, value in results.items()
                    },
                }
            )
    return found


def _number(value: float | None) -> float | None:
    return value if is_finite(value) else None
