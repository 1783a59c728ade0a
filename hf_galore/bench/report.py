"""What a bench has measured so far: of each contender its runs, and what they come to."""

from __future__ import annotations

import dataclasses
import statistics
from typing import Any

from .jobs import ADAMW_8BIT, GALORE, TRAINERS_OWN, WARM_UP, Contender, Failed, Look, Measured, Planned
from .others import ANCHORS

GIB = 2**30
FORMAT = 1
"""Of the JSON: raised where a key changes its meaning or goes."""


@dataclasses.dataclass
class Row:
    """A contender with so many layers, and what came of each of its processes."""

    contender: Contender
    name: str
    layers: int
    rounds: list[Measured | Failed] = dataclasses.field(default_factory=list)
    """In the order of the rounds that it was in."""
    planned: Planned | None = None

    @property
    def runs(self) -> list[Measured]:
        """The runs that ended well."""
        return [run for run in self.rounds if isinstance(run, Measured)]

    @property
    def failed(self) -> str | None:
        """Why there is no figure; `None` where there is one, or nothing was tried yet."""
        failures = [run for run in self.rounds if isinstance(run, Failed)]
        return failures[0].reason if failures and not self.runs else None

    @property
    def seconds(self) -> float | None:
        """Seconds a step: the median of all that are not for warming up."""
        found = [second for run in self.runs for second in run.seconds[WARM_UP:]]
        return statistics.median(found) if found else None

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens a second, of such a step."""
        return None if self.seconds is None else self.runs[0].tokens_per_step / self.seconds

    @property
    def first_seconds(self) -> float | None:
        """Seconds of the first step, with the first refreshes."""
        return statistics.median(run.seconds[0] for run in self.runs) if self.runs else None

    @property
    def refresh_seconds(self) -> float | None:
        """Seconds of one refresh after the first step."""
        counts = [run.refreshes or 0 for run in self.runs]
        return sum(run.refresh_seconds or 0.0 for run in self.runs) / sum(counts) if sum(counts) else None

    def most(self, key: str) -> int | None:
        """The most bytes of any run: `allocated`, `reserved`, `resident` or `outside_torch`."""
        found = [getattr(run, key) for run in self.runs]
        return max((size for size in found if size is not None), default=None)


def ratio(row: Row, baseline: Row) -> float | None:
    """A step's time in that of another: the median of the rounds' own ratios, since a card's clock changes with time.

    Only rounds count in which both ended well; `None` where there is none.
    """
    found = []
    for one, other in zip(row.rounds, baseline.rounds, strict=False):
        if isinstance(one, Measured) and isinstance(other, Measured):
            found.append(statistics.median(one.seconds[WARM_UP:]) / statistics.median(other.seconds[WARM_UP:]))
    return statistics.median(found) if found else None


@dataclasses.dataclass
class Report:
    """All that a bench knows."""

    look: Look
    rows: list[Row]
    """The whole recipe first, where fewer layers are compared than it has."""
    overrides: tuple[str, ...]
    """What was given over the recipe, `--key value ...`."""
    svd: bool
    vram_bytes: int | None = None
    """The card that was pretended, if one was."""
    complete: bool = False
    """Whether all was measured that was to be."""
    notes: list[str] = dataclasses.field(default_factory=list)

    @property
    def recipe(self) -> str:
        """The recipe, with what was given over it."""
        return " ".join([self.look.recipe, *self.overrides])

    @property
    def compared(self) -> list[Row]:
        """The rows that were measured by turns, of equal layers."""
        return self.rows if self.rows[0].layers == self.rows[-1].layers else self.rows[1:]

    def ratio(self, row: Row) -> float | None:
        """A row's time in that of AdamW8bit; `None` for one that was not measured by turns with it."""
        baseline = next((one for one in self.compared if one.contender == ADAMW_8BIT), None)
        is_compared = any(one is row for one in self.compared)
        return ratio(row, baseline) if is_compared and baseline is not None else None

    def as_dict(self) -> dict[str, Any]:
        """For JSON: all of it, down to the seconds of each step."""
        return {
            "format": FORMAT,
            "measured_on": self.look.card,
            "complete": self.complete,
            "machine": dataclasses.asdict(self.look),
            "vram_bytes": self.vram_bytes,
            "overrides": self.overrides,
            "with_svds": self.svd,
            "warm_up_steps": WARM_UP,
            "rows": [
                {
                    "contender": row.contender,
                    "name": row.name,
                    "layers": row.layers,
                    "failed": row.failed,
                    "seconds_per_step": row.seconds,
                    "ratio_to_adamw_8bit": self.ratio(row),
                    "tokens_per_second": row.tokens_per_second,
                    "first_step_seconds": row.first_seconds,
                    "refresh_seconds": row.refresh_seconds,
                    "allocated_bytes": row.most("allocated"),
                    "reserved_bytes": row.most("reserved"),
                    "planned_bytes": None if row.planned is None else row.planned.peak_bytes,
                    "outside_torch_bytes": row.most("outside_torch"),
                    "rounds": [dataclasses.asdict(run) for run in row.rounds],
                }
                for row in self.rows
            ],
            "notes": self.notes,
            "figures_of_others": [anchor._asdict() for anchor in ANCHORS],
        }


def short_name(contender: Contender, *, svd: bool) -> str:
    """What a contender is called over a column."""
    if contender == TRAINERS_OWN:
        return f"Trainer's own GaLore{'' if svd else ', no SVDs'}"
    return "GaLore" if contender == GALORE else "AdamW8bit"


def name_of(contender: Contender, look: Look, *, svd: bool) -> str:
    """What a contender is called in tables."""
    if contender == GALORE:
        return f"{look.optim}, rank {look.rank}"
    if contender == TRAINERS_OWN:
        spared = "" if svd else ", spared its SVDs"
        return f"the Trainer's own {look.optim} (galore_torch {look.galore_torch}), rank {look.rank}{spared}"
    return "bitsandbytes AdamW8bit"
