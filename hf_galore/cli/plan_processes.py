"""The screen of `hf-galore plan --num_processes N [--sharded]`."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..plan.planner import GIB
from ..plan.processes import ProcessesPlan, RankPlan
from ..plan.ranks import PARTS, WORKING
from .plan_picture import gib

AS_PLANNED = "planned for one"


def show(found: ProcessesPlan, name: str, no_card: str) -> None:
    """Print a plan of several processes, and the verdict on each card.

    Args:
        found: the plan.
        name: of the recipe.
        no_card: how to say which card there is, where that is not known.
    """
    console = Console(highlight=False)
    devices = found.devices
    for note in found.notes:
        console.print(Text(note), soft_wrap=True)
    console.print(
        Text(
            f"{name} on {devices.processes:,} processes under {devices.engine}, each with a card, a rank at its peak:"
        ),
        soft_wrap=True,
    )
    console.print(_memory(found))
    console.print(Text("On the wire in an optimizer step, the mean over the gap between refreshes:"), soft_wrap=True)
    console.print(_wire(found))
    console.print(Text(_further(found)), soft_wrap=True)
    console.print(Text(_verdict(found, name, no_card)), soft_wrap=True)


def _memory(found: ProcessesPlan) -> Table:
    run, adamw = found.run, found.adamw
    whole = max(run.memory.total, adamw.memory.total)
    table = Table(show_footer=True)
    table.add_column("what", footer="a card needs")
    for column, plan in zip(_heads(found), (run, adamw), strict=True):
        table.add_column(column, justify="right", footer=gib(plan.needed_bytes, whole))
    table.add_column("how it is known")
    for part in PARTS:
        sizes = [plan.memory.parts.get(part, 0) for plan in (run, adamw)]
        if any(sizes):
            table.add_row(part, *(gib(size, whole) for size in sizes), AS_PLANNED if part == WORKING else "calculated")
    table.add_section()
    table.add_row("a rank", *(gib(plan.memory.total, whole) for plan in (run, adamw)), "")
    besides = (gib(plan.needed_bytes - plan.memory.total, whole) for plan in (run, adamw))
    table.add_row("allocator and CUDA", *besides, "at a guess")
    return table


def _wire(found: ProcessesPlan) -> Table:
    run, adamw = found.run, found.adamw
    whole = int(max(sum(run.payload.values()), sum(adamw.payload.values())))
    table = Table(show_footer=True)
    table.add_column("payload of", footer="sent by a rank")
    for column, plan in zip(_heads(found), (run, adamw), strict=True):
        table.add_column(column, justify="right", footer=_gib(plan.sent, whole))
    table.add_column("how it is known", footer="by a ring")
    kinds = dict.fromkeys([*run.payload, *adamw.payload])
    for kind in sorted(kinds, key=lambda kind: -max(plan.payload.get(kind, 0.0) for plan in (run, adamw))):
        table.add_row(kind, *(_gib(plan.payload.get(kind, 0.0), whole) for plan in (run, adamw)), "calculated")
    return table


def _heads(found: ProcessesPlan) -> tuple[str, str]:
    return "recipe, GiB", "AdamW, GiB"


def _gib(nbytes: float, whole: int) -> str:
    return gib(round(nbytes), whole)


def _further(found: ProcessesPlan) -> str:
    devices, run = found.devices, found.run
    tokens = "" if found.tokens_per_step is None else f", {found.tokens_per_step:,} tokens a step of all"
    exchanged = ""
    if not devices.sharded and devices.hooked:
        exchanged = {
            "low_rank": " Low-rank gradients are exchanged, and no whole ones.",
            "dense": " Whole gradients are exchanged.",
        }[devices.exchange]
    first = sum(run.refresh_payload.values())
    return (
        f"The recipe's optimizer is {run.optim}, the other {found.adamw.optim}: as the weights are, so are its moments."
        f"{exchanged}\n"
        f"A step that refreshes all targets, as the first does: {first / GIB:.2f} GiB of payload.\n"
        f"{found.parameters:,} parameters{tokens}; {found.seconds:.1f} s. NCCL's buffers are not counted."
    )


def _verdict(found: ProcessesPlan, name: str, no_card: str) -> str:
    card = found.vram_bytes
    if card is None:
        return f"{name} needs cards of {_size(found.run)}, AdamW of {_size(found.adamw)}. Which they are: {no_card}."
    beside = "fits" if found.adamw.fits(card) else "does not fit"
    size = f"{card / GIB:.2f} GiB of each card"
    if found.fits:
        return f"{name} fits: it needs {_size(found.run)} of {size}. AdamW {beside}: {_size(found.adamw)}."
    return f"{name} does not fit: it needs {_size(found.run)} of {size}. AdamW {beside}: {_size(found.adamw)}."


def _size(plan: RankPlan) -> str:
    return f"{plan.needed_bytes / GIB:.2f} GiB"
