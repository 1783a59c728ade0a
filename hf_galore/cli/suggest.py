"""`hf-galore plan --suggest`: which ranks and batches a card has room for.

Planning a model with a few of its layers takes seconds, and memory grows by the same with each further one. So the
settings are compared by estimates from such plans, and those worth showing are then planned as they are: what is listed
fits by a plan of the whole model.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import math
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..config import GaLoreConfig
from ..plan.planner import GIB, MemoryPlan, in_gib, needed_bytes, plan
from .errors import UserError
from .spinner import spinner
from .stand_in import Arguments, Shape, shape_of
from .training import galore_config

RANKS = (64, 128, 256, 512, 1024, 2048)
BATCHES = (1, 2, 4, 8, 16, 32, 64)
# The fewest bits that a basis is kept in, which cost nothing that could be measured.
PROJ_BITS: Literal[4] = 4
_FEW_LAYERS = (4, 8)
_MOST_ROWS = 6
# An estimate this far above the card is not worth a plan.
_HOPELESS = 1.05

Parse = Callable[[Sequence[str]], Arguments]


@dataclasses.dataclass(frozen=True)
class Choice:
    """Settings that may fit."""

    rank: int
    batch: int
    checkpointing: bool

    def overrides(self, config: GaLoreConfig) -> list[str]:
        """What a recipe's command line needs for them."""
        return [
            "--optim_args",
            dataclasses.replace(config, rank=self.rank, proj_bits=PROJ_BITS).optim_args(),
            "--per_device_train_batch_size",
            str(self.batch),
            "--activation_checkpointing",
            str(self.checkpointing).lower(),
        ]


def suggest(parse: Parse, vram: int, as_json: bool) -> int:
    """Print the settings that fit, best first: the largest rank, then the most tokens a step.

    Args:
        parse: reads the recipe, with more overrides.
        vram: bytes of the card's memory.
        as_json: one JSON list on stdout instead of a table.

    Returns:
        0 if anything fits, else 1.

    Raises:
        UserError: the recipe is not one for GaLore, or something that was given is wrong.
    """
    base = parse([])
    config = galore_config(base.training)
    if config is None:
        raise UserError(
            f"--suggest looks for a rank, and optim {base.training.optim} has none. Give a galore_* optim, such as "
            "--optim galore_adamw_8bit_layerwise."
        )
    shape = shape_of(base)
    # Whatever a library prints has no place in a pipe.
    with contextlib.redirect_stdout(sys.stderr), spinner("estimating") as say:
        advance = say or (lambda text: None)
        estimate = _Estimate(parse, config, shape, advance)
        found = list(itertools.islice(_search(parse, config, shape, estimate, vram, advance), _MOST_ROWS))
    if as_json:
        print(json.dumps([_row(choice, planned, config) for choice, planned in found], indent=2))
    elif found:
        _show(found, config, vram)
    else:
        print(
            f"Nothing fits into {vram / GIB:.4g} GiB: not even rank {min(_ranks(shape))} with a batch of 1 and "
            "activation checkpointing. A smaller max_length or model, or a card with more memory, would help.",
        )
    return 0 if found else 1


def _search(
    parse: Parse,
    config: GaLoreConfig,
    shape: Shape,
    estimate: _Estimate,
    vram: int,
    advance: Callable[[str], None],
) -> Iterator[tuple[Choice, MemoryPlan]]:
    """For each rank the largest batch that fits, with checkpointing and, where that fits too, without."""
    most = {True: 0, False: 0}  # that fits: a smaller rank leaves room for as much
    for rank in sorted(_ranks(shape), reverse=True):
        rows = []
        for checkpointing in (True, False):

            def planned(batch: int) -> tuple[Choice, MemoryPlan] | None:
                choice = Choice(rank, batch, checkpointing)  # noqa: B023 - called in this very round
                advance(f"planning rank {choice.rank}, batch {choice.batch}")
                found = plan(parse(choice.overrides(config)), vram=vram)
                return (choice, found) if found.fits else None

            likely = [b for b in BATCHES if needed_bytes(estimate(Choice(rank, b, checkpointing))) <= vram]
            start = max(len(likely) - 1, most[checkpointing])
            if not likely and needed_bytes(estimate(Choice(rank, BATCHES[0], checkpointing))) > _HOPELESS * vram:
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


def _ranks(shape: Shape) -> list[int]:
    ranks = [rank for rank in RANKS if rank < shape.smaller_side]
    return ranks or [max(1, shape.smaller_side // 4)]


class _Estimate:
    """The peak of a choice in bytes, from plans of few layers at the corners of what is searched."""

    def __init__(self, parse: Parse, config: GaLoreConfig, shape: Shape, advance: Callable[[str], None]) -> None:
        self._parse, self._config, self._shape, self._advance = parse, config, shape, advance
        self._corners: dict[Choice, int] = {}
        self._ranks = (min(_ranks(shape)), max(_ranks(shape)))
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
        return plan(self._parse(choice.overrides(self._config)), layers=layers).peak_bytes


# ---- what came of it


def _row(choice: Choice, planned: MemoryPlan, config: GaLoreConfig) -> dict[str, object]:
    return {
        **dataclasses.asdict(choice),
        "proj_bits": PROJ_BITS,
        "tokens_per_step": planned.tokens_per_step,
        "peak_bytes": planned.peak_bytes,
        "needed_bytes": planned.needed_bytes,
        "overrides": choice.overrides(config),
    }


def _show(found: Sequence[tuple[Choice, MemoryPlan]], config: GaLoreConfig, vram: int) -> None:
    console = Console(highlight=False)
    table = Table(title=f"What fits into {vram / GIB:.4g} GiB, the best first", title_justify="left")
    for name in ("rank", "batch", "tokens a step", "checkpointing", "peak", "card needed"):
        table.add_column(name, justify="right")
    for choice, planned in found:
        table.add_row(
            str(choice.rank),
            str(choice.batch),
            f"{planned.tokens_per_step:,}",
            "yes" if choice.checkpointing else "no",
            in_gib(planned.peak_bytes),
            in_gib(planned.needed_bytes),
        )
    console.print(table)
    best, _ = found[0]
    console.print(Text(f"For the first: {shlex.join(best.overrides(config))}"), soft_wrap=True)
    console.print(
        Text(
            "Bases in 4 bits (proj_bits=4): more bits cost memory and gain nothing that could be measured. TRL "
            "computes the loss in chunks in any case."
        ),
        soft_wrap=True,
    )
