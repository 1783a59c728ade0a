"""Ranks and batches that a card has room for.

Planning a model with a few of its layers takes seconds, and memory grows by the same with each further one. So the
settings are compared by estimates from such plans, and those worth showing are then planned as they are: what is listed
fits by a plan of the whole model.
"""

from __future__ import annotations

import dataclasses
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
_FEW_LAYERS = (4, 8)
# An estimate this far above the card is not worth a plan.
_HOPELESS = 1.05

Parse = Callable[[Sequence[str]], Arguments]


@dataclasses.dataclass(frozen=True)
class Choice:
    """A rank, a batch and whether activations are checkpointed: settings that may fit."""

    rank: int
    batch: int
    checkpointing: bool

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
    parse: Parse, config: GaLoreConfig, shape: Shape, vram: int, advance: Callable[[str], None]
) -> Iterator[tuple[Choice, MemoryPlan]]:
    """Search for settings that fit, best first: the largest rank, then the most tokens a step.

    Args:
        parse: reads the recipe, with more overrides.
        config: what the recipe tells GaLore.
        shape: that of the recipe's model.
        vram: bytes of the card's memory.
        advance: told what is being done.

    Yields:
        For each rank the largest batch that fits, with its plan: with checkpointing and, where that fits, without.
    """
    estimate = Estimate(parse, config, shape, advance)
    most = {True: 0, False: 0}  # that fits: a smaller rank leaves room for as much
    for rank in sorted(ranks_for(shape), reverse=True):
        rows = []
        for checkpointing in (True, False):

            def planned(batch: int) -> tuple[Choice, MemoryPlan] | None:
                choice = Choice(rank, batch, checkpointing)  # noqa: B023 - called in this very round
                advance(f"planning rank {choice.rank}, batch {choice.batch}")
                found = plan_recipe(parse(choice.overrides(config)), vram=vram)
                return (choice, found) if found.fits else None

            def guessed(batch: int) -> int:
                return needed_at_a_guess(
                    estimate(Choice(rank, batch, checkpointing)),  # noqa: B023 - likewise
                    expandable=expandable_in_use(),
                )

            likely = [batch for batch in BATCHES if guessed(batch) <= vram]
            start = max(len(likely) - 1, most[checkpointing])
            if not likely and guessed(BATCHES[0]) > _HOPELESS * vram:
                continue
            best = None
            for batch in reversed(BATCHES[: start + 1]):
                best = planned(batch)
                if best is not None:
                    break
            if best is None:
                continue
            if best[0].batch == BATCHES[start]:  # estimates are rather high than low
                for batch in BATCHES[start + 1 :]:
                    larger = planned(batch)
                    if larger is None:
                        break
                    best = larger
            most[checkpointing] = BATCHES.index(best[0].batch)
            rows.append(best)
        yield from sorted(rows, key=lambda row: -row[0].batch)


def ranks_for(shape: Shape) -> list[int]:
    """The ranks to look at for a model, in ascending order."""
    ranks = [rank for rank in RANKS if rank < shape.smaller_side]
    return ranks or [max(1, shape.smaller_side // 4)]


class Estimate:
    """The peak of a choice in bytes, from plans of few layers at the corners of what is searched."""

    def __init__(self, parse: Parse, config: GaLoreConfig, shape: Shape, advance: Callable[[str], None]) -> None:
        self._parse, self._config, self._shape, self._advance = parse, config, shape, advance
        self._corners: dict[Choice, int] = {}
        self._ranks = (min(ranks_for(shape)), max(ranks_for(shape)))
        self._batches = (min(BATCHES), max(BATCHES))

    def __call__(self, choice: Choice) -> int:
        # Between corners the true peak lies below: it is the highest of many that grow evenly with rank and batch.
        low, high = self._ranks
        along_rank = (choice.rank - low) / max(1, high - low)
        first, last = self._batches
        along_batch = (choice.batch - first) / max(1, last - first)
        total = 0.0
        for rank, weight in ((low, 1 - along_rank), (high, along_rank)):
            for batch, other in ((first, 1 - along_batch), (last, along_batch)):
                if weight * other:
                    total += weight * other * self._corner(Choice(rank, batch, choice.checkpointing))
        return math.ceil(total)

    def _corner(self, choice: Choice) -> int:
        if choice not in self._corners:
            few, more = (min(layers, self._shape.layers) for layers in _FEW_LAYERS)
            peaks = {layers: self._peak(choice, layers) for layers in {few, more}}
            each = (peaks[more] - peaks[few]) / max(1, more - few)
            self._corners[choice] = int(peaks[more] + each * (self._shape.layers - more))
        return self._corners[choice]

    def _peak(self, choice: Choice, layers: int) -> int:
        self._advance(f"estimating, from {layers} layers")
        return plan_recipe(self._parse(choice.overrides(self._config)), layers=layers).peak_bytes
