"""Runs that differ in their seed and in nothing else: taken together, with mean and standard deviation."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import statistics
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, NamedTuple

from .runs import Run

SEEDS = ("seed", "data_seed")
_BETWEEN = " ,_./=-"  # parts of a name
# Of one name: what says the seed, with what parts it from the rest.
_SEED_IN_NAME = re.compile(r"(?:^|[\s,_./-]+)(?:data_)?(?:seed|s)[=_-]?\d+(?=$|[\s,_./-])")


@dataclasses.dataclass(frozen=True)
class Seeds:
    """Runs of the same settings with several seeds."""

    name: str
    runs: tuple[Run, ...]

    @cached_property
    def sound(self) -> tuple[Run, ...]:
        """Those that are not broken: means are of them."""
        return tuple(run for run in self.runs if run.broken is None)

    @property
    def seeds(self) -> list[str]:
        """The seeds, as text."""
        return [_text(_seed_of(run)) for run in self.runs]


Compared = Run | Seeds
"""What has a line or a column in a comparison, and a curve: `name` and `runs` say what it is."""


class Spread(NamedTuple):
    """A number of one run, or of several seeds."""

    mean: float
    deviation: float | None
    """The standard deviation of a sample, divided by n − 1; `None` of a single run."""
    known: int
    """The runs that it is known of."""


def spread(of: Compared, value: Callable[[Run], float | None]) -> Spread | None:
    """The mean and deviation of `value` over the seeds that are not broken; of a run, its value as it is."""
    runs = of.sound if isinstance(of, Seeds) else (of,)
    found = [number for number in map(value, runs) if number is not None]
    if not found:
        return None
    deviation = statistics.stdev(found) if len(found) > 1 else None
    return Spread(found[0] if len(found) == 1 else statistics.fmean(found), deviation, len(found))


def is_broken(of: Compared) -> bool:
    """Whether it is best at nothing: a run that is broken, or seeds one of which is."""
    return any(run.broken is not None for run in of.runs)


def by_seed(runs: Sequence[Run]) -> list[Compared]:
    """`runs` in their order, with those taken together that differ in their seed only.

    Only runs whose settings are known and that came to their end are. Two with the same seed say nothing of how much
    a seed matters: they stay by themselves.
    """
    alike: dict[str, list[Run]] = {}
    for run in runs:
        alike.setdefault(_all_but_seed(run), []).append(run)
    together = {key: found for key, found in alike.items() if len(found) > 1 and _distinct(found)}
    names = _names(together, [run.name for run in runs if _all_but_seed(run) not in together])
    found: dict[str, Compared] = {}
    for run in runs:
        key = _all_but_seed(run)
        if key in together:
            found.setdefault(key, Seeds(names[key], tuple(together[key])))
        else:
            found[f"run {run.folder}"] = run
    return list(found.values())


def _all_but_seed(run: Run) -> str:
    facts = run.facts
    if facts is None or facts.settings is None or not run.finished:
        return f"run {run.folder}"
    settings = {key: value for key, value in facts.settings.items() if key not in SEEDS}
    same: list[Any] = [settings, facts.model, facts.data, facts.device, facts.parameters, facts.trainable_parameters]
    return json.dumps([same, run.max_steps], sort_keys=True)


def _seed_of(run: Run) -> tuple[Any, ...]:
    settings = (run.facts and run.facts.settings) or {}
    return tuple(settings.get(key) for key in SEEDS)


def _distinct(runs: Sequence[Run]) -> bool:
    return len({_seed_of(run) for run in runs}) == len(runs)


def _text(seed: tuple[Any, ...]) -> str:
    first, of_data = seed
    return str(first) if of_data in (None, first) else f"{first} (data {of_data})"


# ---- names


def _names(groups: dict[str, list[Run]], taken: Sequence[str]) -> dict[str, str]:
    """What each group is called: as its runs are but for their seeds; else by its method; else by all their names."""
    common = {key: _common([run.name for run in runs]) for key, runs in groups.items()}
    methods = {key: runs[0].method or "" for key, runs in groups.items()}
    others = [*taken, *common.values(), *methods.values()]
    return {
        key: next(
            (name for name in (common[key], methods[key]) if name and others.count(name) == 1),
            " + ".join(run.name for run in runs),
        )
        for key, runs in groups.items()
    }


def _common(names: Sequence[str]) -> str:
    """What the names are without their seeds; else what all begin or end with; empty where that is nothing."""
    without = {_SEED_IN_NAME.sub("", name).strip(_BETWEEN) for name in names}
    if len(without) == 1:
        return without.pop()
    first = _begin(names)
    if any(name[len(first) : len(first) + 1].isdigit() for name in names):  # of 10 and 11 the 1 is no name
        first = first.rstrip("0123456789")
    last = _begin([name[::-1] for name in names])[::-1]
    return first.strip(_BETWEEN) or last.strip(_BETWEEN)


def _begin(names: Sequence[str]) -> str:
    """What all of `names` begin with."""
    same = itertools.takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))
    return "".join(letters[0] for letters in same)
