"""`hf-galore plan`: whether a recipe fits a card, and what its memory goes into."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..plan.planner import CONTEXT_BYTES, FRAGMENTATION, GIB, MemoryPlan, card_bytes, parse_size
from ..plan.rehearsal import EVALUATION, SAVING, STEPS, Progress
from ..plan.tracking import FORWARD
from ..recipes import any_recipe
from ..recipes.any_recipe import Arguments
from ..recipes.errors import UserError, reporting_complaints
from ..recipes.planning import plan_recipe
from . import plan_picture
from .interrupts import stoppable
from .options import take_options
from .plan_picture import gib
from .spinner import spinner
from .training_command import need_recipe

PROG = "hf-galore plan"
ABOUT = """Find out how much memory a recipe takes and whether that fits a card, from its real training steps with
tensors that have no numbers: no GPU, no weights and no data are needed. Options of its own: --vram 24GiB, the card's
memory, by default that of the GPU if there is one; --json, for one JSON object on stdout; --plot FILE.png, for a
picture of the memory (or .svg, .pdf); --suggest, for settings that fit. The exit status is 0 if it fits or no card is
known, 1 if it does not fit, 2 if something that was given is wrong. All other options are those of hf-galore sft,
below, and override what the recipe says."""

FITS, DOES_NOT_FIT = 0, 1
NO_CARD = "give --vram 24GiB for a verdict"


def run(arguments: Sequence[str]) -> int:
    """`hf-galore plan --config FILE [--vram 24GiB] [--json] [--plot FILE.png] [--suggest] [--key value ...]`.

    Returns:
        0 if it fits or the card is not known, 1 if it does not fit.

    Raises:
        UserError: something that was given is wrong.
        Stopped: Ctrl-C.
    """
    with stoppable(lambda: "interrupted."), reporting_complaints():
        return _run(arguments)


def _run(arguments: Sequence[str]) -> int:
    own, rest = _take_own(arguments)
    need_recipe(rest, "recipe.yaml")

    def parse(overrides: Sequence[str] = ()) -> Arguments:
        return any_recipe.parse([*rest, *overrides], PROG, ABOUT)

    parsed = parse()
    vram = card_bytes() if own.vram is None else _size(own.vram)
    if own.suggest:
        if vram is None:
            raise UserError("--suggest needs to know the card: give its memory, as --vram 24GiB.")
        if own.plot is not None:
            raise UserError("--plot draws the plan of one recipe, which --suggest is not about: leave out one of them.")
        from .suggest import suggest

        return suggest(parse, vram, own.json)
    picture = None if own.plot is None else plan_picture.file_for(own.plot)
    name = parsed.recipe.name if parsed.recipe else str(parsed.model_name)
    # Whatever a library prints has no place in a pipe.
    with contextlib.redirect_stdout(sys.stderr), _progress() as progress:
        found = plan_recipe(parsed, vram=vram, progress=progress)
    if own.json:
        print(json.dumps(found.as_dict(), indent=2))
    else:
        _show(found, name)
    if picture is not None:
        plan_picture.save(found, name, picture)
        print(f"The picture is in {picture}.", file=sys.stderr if own.json else sys.stdout)
    return DOES_NOT_FIT if found.fits is False else FITS


# ---- what was given


class _Own(NamedTuple):
    """The options that only a plan has."""

    vram: str | None
    plot: str | None
    json: bool
    suggest: bool


_VALUES = {"--vram": "a size, as --vram 24GiB", "--plot": "a file, as --plot memory.png"}
_SWITCHES = ("--json", "--suggest")


def _take_own(arguments: Sequence[str]) -> tuple[_Own, list[str]]:
    """Split the arguments into a plan's own options and those of the recipe."""
    given, rest = take_options(arguments, _VALUES, _SWITCHES)
    vram, plot = (given.get(flag, [None])[0] for flag in _VALUES)
    return _Own(vram, plot, "--json" in given, "--suggest" in given), rest


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise UserError(f"--vram: {error}") from error


# ---- while it runs


@contextlib.contextmanager
def _progress() -> Iterator[Progress | None]:
    with spinner("making the model") as say:
        yield None if say is None else lambda phase, step: say(_doing(phase, step))


def _doing(phase: str, step: int) -> str:
    if phase in (EVALUATION, SAVING):  # between steps
        return phase
    return f"step {step} of {STEPS}: {'forward and backward' if phase == FORWARD else phase}"


# ---- what came of it


def _show(found: MemoryPlan, name: str) -> None:
    console = Console(highlight=False)
    for note in found.notes:
        console.print(Text(note), soft_wrap=True)
    console.print(Text(f"{name}, at its peak:"), soft_wrap=True)
    console.print(_breakdown_table(found))
    console.print(_summary_table(found))
    console.print(Text(_verdict(found, name)), soft_wrap=True)


def _breakdown_table(found: MemoryPlan) -> Table:
    peak = found.peak_bytes
    table = Table(show_footer=True)
    table.add_column("what", footer="all")
    table.add_column("GiB", justify="right", footer=gib(peak, peak))
    table.add_column("share", justify="right", footer="100.0 %")
    for kind, nbytes in found.breakdown.items():
        table.add_row(kind, gib(nbytes, peak), f"{100 * nbytes / peak:.1f} %")
    return table


def _summary_table(found: MemoryPlan) -> Table:
    def size(nbytes: int) -> str:
        return f"{gib(nbytes, found.peak_bytes)} GiB"

    table = Table(show_header=False)
    table.add_row("peak", f"{size(found.peak_bytes)} ({found.phase})")
    for phase, nbytes in found.phase_peaks.items():
        if phase != found.phase:
            table.add_row(f"peak of {phase}", size(nbytes))
    table.add_row("between steps", size(found.resident_bytes))
    if found.tokens_per_step is not None:
        table.add_row("tokens per step", f"{found.tokens_per_step:,}")
    table.add_row("parameters", f"{found.parameters:,}")
    table.add_row("device", found.device)
    table.add_row("the plan took", f"{found.seconds:.1f} s")
    return table


def _verdict(found: MemoryPlan, name: str) -> str:
    assumed = (
        f"{gib(found.needed_bytes, found.needed_bytes)} GiB: the peak, {100 * FRAGMENTATION:g} % of it for "
        f"fragmentation of the allocator (with PYTORCH_ALLOC_CONF=expandable_segments:True), and "
        f"{CONTEXT_BYTES / GIB:g} GiB for CUDA's context. The last two are assumptions, not measured."
    )
    if found.vram_bytes is None:
        return f"{name} needs a card of {assumed} Which card is not known: {NO_CARD}."
    verdict = "fits" if found.fits else "does not fit"
    return f"{name} {verdict} into {found.vram_bytes / GIB:.2f} GiB; it needs {assumed}"
