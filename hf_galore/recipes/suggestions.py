"""Ranks and batches that a card has room for.

Planning a model with a few of its layers takes a second, and memory grows by the same with each further one. So the
settings are compared by estimates from such plans, and those worth showing are then planned as they are: what is listed
fits by a plan of the whole model.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

from ..config import GaLoreConfig
from ..expandable_segments import in_use as expandable_in_use
from ..plan.needs import needed_at_a_guess
from ..plan.planner import MemoryPlan
from .any_recipe import Arguments
from .planning import plan_recipe
from .stand_in import Shape

RANKS = (64, 128, 256, 512, 1024, 2048)
BATCHES = (1, 2, 4, 8, 16, 32, 64)
# The fewest bits that a basis is kept in, which cost nothing that could be measured.
PROJ_BITS: Literal[4] = 4
# Even numbers: where layers alternate, as with sliding windows, each kind is in both.
_FEW_LAYERS = (2, 4)
# What is above the card by its estimate, but no further than this, is planned too: estimates are rather high than low.
_NEAR = 1.01

Parse = Callable[[Sequence[str]], Arguments]
Advance = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Choice:
    """A rank, a batch and whether activations are checkpointed: settings that may fit."""

    rank: int
    batch: int
    checkpointing: bool

    def __str__(self) -> str:
        return f"rank {self.rank}, batch {self.batch}, checkpointing {'on' if self.checkpointing else 'off'}"

    def overrides(self, config: GaLoreConfig) -> list[str]:
        """The items of a recipe's command line that set them, `config` giving the other keys of `optim_args`."""
        return [
            "--optim_args",
            dataclasses.replace(config, rank=self.rank, proj_bits=PROJ_BITS).optim_args(),
            "--per_device_train_batch_size",
            str(self.batch),
            "--activation_checkpointing",
            str(self.checkpointing).lower(),
        ]


def search(
    parse: Parse, config: GaLoreConfig, estimate: Estimate, ranks: Sequence[int], vram: int, advance: Advance
) -> Iterator[tuple[Choice, MemoryPlan]]:
    """Search for settings that fit, best first: the largest rank, then the most tokens a step.

    Args:
        parse: reads the recipe, with more overrides.
        config: what the recipe tells GaLore.
        estimate: of the recipe's memory.
        ranks: those to look at.
        vram: bytes of the card's memory.
        advance: told what is being done.

    Yields:
        For each rank the largest batch that fits, with its plan: with checkpointing and, where that fits, without.
    """
    most = {True: 0, False: 0}  # how many batches fit: a smaller rank leaves room for as much

    def guessed(choice: Choice) -> int:
        return needed_at_a_guess(estimate(choice), expandable=expandable_in_use())

    def planned(choice: Choice) -> MemoryPlan | None:
        advance(f"{choice}: planning all layers")
        found = plan_recipe(parse(choice.overrides(config)), vram=vram)
        return found if found.fits else None

    for rank in sorted(ranks, reverse=True):
        rows: list[tuple[Choice, MemoryPlan]] = []
        for checkpointing in (True, False):
            if not checkpointing and not rows:
                continue  # it takes more
            choices = [Choice(rank, batch, checkpointing) for batch in BATCHES]
            known = most[checkpointing]
            likely = list(itertools.takewhile(lambda choice: guessed(choice) <= _NEAR * vram, choices[known:]))
            end = known + len(likely)
            found = ((index, planned(choices[index])) for index in reversed(range(end)))
            index, best = next((pair for pair in found if pair[1] is not None), (0, None))
            if best is not None:
                most[checkpointing] = index + 1
                rows.append((choices[index], best))
        yield from sorted(rows, key=lambda row: -row[0].batch)


def ranks_for(shape: Shape) -> list[int]:
    """The ranks to look at for a model, in ascending order."""
    ranks = [rank for rank in RANKS if rank < shape.smaller_side]
    return ranks or [max(1, shape.smaller_side // 4)]


class Estimate:
    """The peak of a choice in bytes, from plans of a few layers, as that of each phase grows evenly with layers.

    Args:
        parse: reads the recipe, with more overrides.
        config: what the recipe tells GaLore.
        shape: that of the recipe's model.
        advance: told what is being done.
    """

    def __init__(self, parse: Parse, config: GaLoreConfig, shape: Shape, advance: Advance) -> None:
        self._parse, self._config, self._shape, self._advance = parse, config, shape, advance
        self._known: dict[Choice, int] = {}

    def __call__(self, choice: Choice) -> int:
        if choice not in self._known:
            self._known[choice] = self._extrapolated(choice)
        return self._known[choice]

    def of_each_rank(self, choice: Choice) -> float:
        """The bytes that a column more of all bases takes, with its moments: between a choice and half its rank."""
        half = dataclasses.replace(choice, rank=choice.rank // 2)
        return (self(choice) - self(half)) / (choice.rank - half.rank)

    @property
    def tried(self) -> int:
        """How many choices were estimated."""
        return len(self._known)

    def _extrapolated(self, choice: Choice) -> int:
        self._advance(f"{choice}: estimating")
        few, more = (min(layers, self._shape.layers) for layers in _FEW_LAYERS)
        peaks = {layers: self._peaks(choice, layers) for layers in {few, more}}

        def of_all(phase: str) -> float:
            each = (peaks[more][phase] - peaks[few].get(phase, 0)) / max(1, more - few)
            return peaks[more][phase] + each * (self._shape.layers - more)

        return math.ceil(max(map(of_all, peaks[more])))

    def _peaks(self, choice: Choice, layers: int) -> dict[str, int]:
        return plan_recipe(self._parse(choice.overrides(self._config)), layers=layers).phase_peaks
