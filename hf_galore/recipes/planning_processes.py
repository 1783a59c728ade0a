"""A recipe's training on several processes, beside AdamW's: `hf-galore plan --num_processes 8 --sharded`."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence

from transformers import Trainer

from ..config import GaLoreConfig
from ..plan.cards import parse_size
from ..plan.planner import MemoryPlan
from ..plan.processes import ProcessesPlan, RankPlan, rank_plan
from ..plan.rehearsal import Progress, Record
from . import any_recipe
from .any_recipe import Arguments
from .checks import galore_config
from .planning import plan_recipe

ADAMW = "adamw_torch_fused"
"""What stands beside a recipe's own optimizer: torch's AdamW, as it takes least."""

_UPCAST = (
    "Under FSDP2 accelerate keeps trained weights in float32 where bf16 or fp16 is true, and gathers them in 16 bits. "
    "With bf16: false they stay as dtype says."
)


def plan_processes(
    recipe: Callable[[Sequence[str]], Arguments] | str | os.PathLike[str],
    num_processes: int,
    *,
    sharded: bool = False,
    vram: int | str | None = None,
    layers: int | None = None,
    progress: Progress | None = None,
) -> ProcessesPlan:
    """Find the memory of a rank and the bytes on the wire, for a recipe and for the same with AdamW.

    Each is planned for one process first; what a rank has and sends is calculated from that, however many there are.

    Args:
        recipe: its file, or what parses it with more overrides.
        num_processes: how many processes train, each with a card.
        sharded: whether FSDP2 shards the model; else DDP has all of it in each process.
        vram: each card: a name or label, its memory as text or in bytes.
        layers: how many layers the model is to have, instead of its own number.
        progress: called with the phase and the number of the step.

    Raises:
        ValueError: something that was given is wrong; the message says what.
    """
    check_processes(num_processes, sharded=sharded)
    start = time.perf_counter()
    parse = recipe if callable(recipe) else _reader(recipe)
    size = parse_size(vram) if isinstance(vram, str) else vram
    own = parse([])
    config = galore_config(own.training)
    if sharded and config is not None:
        _check_sharded(config)

    def of(arguments: Arguments, config: GaLoreConfig | None) -> tuple[MemoryPlan, RankPlan]:
        found: list[RankPlan] = []
        exchange = None if config is None else config.exchange

        def look(trainer: Trainer, record: Record) -> None:
            found.append(rank_plan(trainer, record, num_processes, sharded=sharded, exchange=exchange))

        return plan_recipe(arguments, layers=layers, progress=progress, look=look), found[0]

    one, run = of(own, config)
    adamw = run if run.optim == ADAMW else of(parse(["--optim", ADAMW]), None)[1]
    return ProcessesPlan(
        run.devices,
        run,
        adamw,
        one.parameters,
        None if one.tokens_per_step is None else num_processes * one.tokens_per_step,
        size,
        time.perf_counter() - start,
        (*one.notes, *([_UPCAST] if run.upcast else [])),
    )


def check_processes(num_processes: int, *, sharded: bool) -> None:
    """Check that there are several processes, or one that is not sharded.

    Raises:
        ValueError: there are not.
    """
    if num_processes < 1:
        raise ValueError(f"num_processes has to be at least 1, but is {num_processes}.")
    if sharded and num_processes == 1:
        raise ValueError(
            "A model that is sharded needs at least 2 processes, but num_processes is 1. Give the number of cards, or "
            "leave sharded out."
        )


def _check_sharded(config: GaLoreConfig) -> None:
    """Check that options are not ones that optimizers of sharded parameters refuse.

    Raises:
        ValueError: one is.
    """
    refused = {
        "exchange": (config.exchange, "it says what the processes of DDP reduce: leave it out"),
        "refresh": (
            config.refresh if config.refresh == "svd" else None,
            "it needs the whole gradient, which no process has: take subspace or randomized",
        ),
    }
    for key, (value, why) in refused.items():
        if value is not None:
            raise ValueError(f"{key}={str(value).lower()} does not go with parameters that FSDP2 shards, for {why}.")


def _reader(path: str | os.PathLike[str]) -> Callable[[Sequence[str]], Arguments]:
    return lambda overrides: any_recipe.parse(["--config", os.fspath(path), *overrides], "plan", "")
