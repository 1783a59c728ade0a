"""`hf-galore plan --suggest`: settings of a recipe that fit a card."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import itertools
import json
import shlex
import sys
from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..config import GaLoreConfig
from ..errors import UserError
from ..plan.cards import DESKTOP
from ..plan.planner import GIB, MemoryPlan, in_gib
from ..recipes.checks import galore_config
from ..recipes.stand_in import shape_of
from ..recipes.suggestions import PROJ_BITS, Choice, Estimate, Parse, ranks_for, search
from .spinner import spinner

_MOST_ROWS = 6


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
    ranks = ranks_for(shape)
    # Whatever a library prints has no place in a pipe.
    with contextlib.redirect_stdout(sys.stderr), _imports_not_collected(), spinner("reading the shape") as shown:
        say = shown or (lambda text: None)
        estimate = Estimate(parse, config, shape, say)
        found = list(itertools.islice(search(parse, config, estimate, ranks, vram, say), _MOST_ROWS))
        tried = estimate.tried
        of_each_rank = estimate.of_each_rank(found[0][0]) if found and not as_json else 0.0
    if as_json:
        print(json.dumps([_row(choice, planned, config) for choice, planned in found], indent=2))
    elif found:
        _show(found, config, vram)
        print(
            f"{tried} settings were estimated, from a few layers; those listed were planned whole. 128 more of rank "
            f"take {128 * of_each_rank / 2**20:,.1f} MiB."
        )
    else:
        print(
            f"Nothing fits into {vram / GIB:.4g} GiB: not even rank {min(ranks)} with a batch of 1 and "
            "activation checkpointing. A smaller max_length or model, or a card with more memory, would help.",
        )
    return 0 if found else 1


@contextlib.contextmanager
def _imports_not_collected() -> Iterator[None]:
    """Let garbage collections pass over what was imported: going through it takes a third of a small plan's time."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


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
            f"computes the loss in chunks in any case. A desktop, which takes {DESKTOP}, is not counted."
        ),
        soft_wrap=True,
    )
