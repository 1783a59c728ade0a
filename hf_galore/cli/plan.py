"""`hf-galore plan`: whether a recipe fits a card, and what its memory goes into."""

from __future__ import annotations

import contextlib
import json
import re
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..errors import UserError
from ..plan.cards import DESKTOP, DESKTOP_GIB, parse_size, present_card
from ..plan.needs import CONTEXT, OUTSIDE
from ..plan.planner import MemoryPlan
from ..plan.rehearsal import EVALUATION, REFERENCE, SAVING, STEPS, Progress
from ..plan.tracking import FORWARD
from ..recipes import any_recipe
from ..recipes.any_recipe import Arguments
from ..recipes.errors import reporting_complaints
from ..recipes.planning import plan_recipe
from ..recipes.planning_processes import check_processes, plan_processes
from ..recipes.suggestions import Parse
from . import plan_picture
from .interrupts import stoppable
from .options import need_recipe, take_options
from .plan_picture import gib
from .spinner import spinner

PROG = "hf-galore plan"
ABOUT = """Find out how much memory a recipe takes and whether that fits a card, from its real training steps with
tensors that have no numbers: no GPU, no weights and no data are needed. Options of its own: --vram CARD, a card's name
(4090), label (24GB) or exact memory (23.5GiB), by default the card of this machine if there is one; --json, for one
JSON object on stdout; --plot FILE.png, for a picture of the memory (or .svg, .pdf); --suggest, for settings that fit;
--num_processes N, for what each of N processes has and sends under DDP, and with --sharded under FSDP2, beside AdamW.
The exit status is 0 if it fits or no card is known, 1 if it does not fit, 2 if something that was given is wrong. All
other options are those of hf-galore sft, below, and override what the recipe says."""

FITS, DOES_NOT_FIT = 0, 1
NO_CARD = "give --vram 4090, or 24GB, for a verdict"


def run(arguments: Sequence[str]) -> int:
    """`hf-galore plan --config FILE [--vram 4090] [--json] [--plot FILE.png] [--suggest] [--key value ...]`.

    With `--num_processes N [--sharded]`, of several processes.

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

    if own.sharded and own.num_processes is None:
        raise UserError("--sharded needs --num_processes N, over which the model is sharded.")
    if own.num_processes is not None and (own.suggest or own.plot is not None):
        other = "--suggest" if own.suggest else "--plot"
        raise UserError(f"{other} is about one process, and --num_processes about several: leave out one of them.")
    parsed = parse()
    vram = None if own.vram is None else card_size(own.vram)
    if own.suggest:
        if vram is None:
            present = present_card(OUTSIDE[CONTEXT])
            if present is None:
                raise UserError("--suggest needs to know the card: give it, as --vram 4090 or --vram 24GB.")
            vram = present.total
        if own.plot is not None:
            raise UserError("--plot draws the plan of one recipe, which --suggest is not about: leave out one of them.")
        from .suggest import suggest

        return suggest(parse, vram, own.json)
    if own.num_processes is not None and (own.num_processes > 1 or own.sharded):
        return _of_processes(parse, parsed, own, own.num_processes, vram)
    picture = None if own.plot is None else plan_picture.file_for(own.plot)
    name = _name_of(parsed)
    # Whatever a library prints has no place in a pipe.
    with contextlib.redirect_stdout(sys.stderr), shown_progress() as progress:
        found = plan_recipe(parsed, vram=vram, progress=progress)
    if own.json:
        print(json.dumps(found.as_dict(), indent=2))
    else:
        show(found, name)
    if picture is not None:
        plan_picture.save(found, name, picture)
        print(f"The picture is in {picture}.", file=sys.stderr if own.json else sys.stdout)
    return DOES_NOT_FIT if found.fits is False else FITS


def _name_of(parsed: Arguments) -> str:
    return parsed.recipe.name if parsed.recipe else str(parsed.model_name)


# ---- what was given


class _Own(NamedTuple):
    """The options that only a plan has."""

    vram: str | None
    plot: str | None
    json: bool
    suggest: bool
    num_processes: int | None
    sharded: bool


_VALUES = {
    "--vram": "a card, as --vram 4090 or --vram 24GB",
    "--plot": "a file, as --plot memory.png",
    "--num_processes": "a number, as --num_processes 8",
}
_SWITCHES = ("--json", "--suggest", "--sharded")


def _take_own(arguments: Sequence[str]) -> tuple[_Own, list[str]]:
    """Split the arguments into a plan's own options and those of the recipe."""
    given, rest = take_options(arguments, _VALUES, _SWITCHES)
    vram, plot, number = (given.get(flag, [None])[0] for flag in _VALUES)
    processes = None if number is None else _processes(number, sharded="--sharded" in given)
    switches = {flag.removeprefix("--"): flag in given for flag in _SWITCHES}
    return _Own(vram, plot, num_processes=processes, **switches), rest


def _processes(text: str, *, sharded: bool) -> int:
    """The number that `--num_processes` names."""
    if not re.fullmatch(r"[+-]?\d+", text):
        raise UserError(f"--num_processes is a number of processes, each with a card, such as 8, but is {text!r}.")
    try:
        check_processes(int(text), sharded=sharded)
    except ValueError as error:
        raise UserError(f"--num_processes {text}: {error}") from error
    return int(text)


def _of_processes(parse: Parse, parsed: Arguments, own: _Own, num_processes: int, vram: int | None) -> int:
    """Plan for several processes, and print it."""
    from .plan_processes import show as show_processes

    first = [parsed]  # parsed already

    def again(overrides: Sequence[str]) -> Arguments:
        return first.pop() if first and not overrides else parse(overrides)

    with contextlib.redirect_stdout(sys.stderr), shown_progress() as progress:
        found = plan_processes(again, num_processes, sharded=own.sharded, vram=vram, progress=progress)
    if own.json:
        print(json.dumps(found.as_dict(), indent=2))
    else:
        show_processes(found, _name_of(parsed), NO_CARD)
    return DOES_NOT_FIT if found.fits is False else FITS


def card_size(text: str) -> int:
    """The memory of the card that `--vram` names."""
    try:
        return parse_size(text)
    except ValueError as error:
        raise UserError(f"--vram: {error}") from error


# ---- while it runs


@contextlib.contextmanager
def shown_progress() -> Iterator[Progress | None]:
    """A line that says how far a plan is; `None` where nobody would see it."""
    with spinner("making the model") as say:
        yield None if say is None else lambda phase, step: say(_doing(phase, step))


def _doing(phase: str, step: int) -> str:
    if phase in (REFERENCE, EVALUATION, SAVING):  # between steps
        return phase
    return f"step {step} of {STEPS}: {'forward and backward' if phase == FORWARD else phase}"


# ---- what came of it


def show(found: MemoryPlan, name: str, no_card: str = NO_CARD) -> None:
    """Print a plan, and the verdict on the card; `no_card` says how to get one where the card is not known."""
    console = Console(highlight=False)
    for note in found.notes:
        console.print(Text(note), soft_wrap=True)
    console.print(Text(f"{name}, at its peak ({found.phase}):"), soft_wrap=True)
    console.print(_table(found))
    console.print(Text(_further(found)), soft_wrap=True)
    console.print(Text(_verdict(found, name, no_card)), soft_wrap=True)


def _table(found: MemoryPlan) -> Table:
    """What the peak is made of, and what a card has to have besides."""
    peak = found.peak_bytes
    table = Table(show_footer=True)
    table.add_column("what", footer="a card needs")
    table.add_column("GiB", justify="right", footer=gib(found.needed_bytes, peak))
    table.add_column("share", justify="right")
    table.add_column("how it is known")
    for kind, nbytes in found.breakdown.items():
        table.add_row(kind, gib(nbytes, peak), f"{100 * nbytes / peak:.1f} %")
    table.add_section()
    table.add_row("the peak", gib(peak, peak), "100.0 %", "planned")
    table.add_row("torch's allocator", gib(found.reserved_bytes - peak, peak), "", "calculated", end_section=True)
    for part, nbytes in OUTSIDE.items():
        table.add_row(part, gib(nbytes, peak), "", "measured on an H200")
    return table


def _further(found: MemoryPlan) -> str:
    others = [f"{phase} {_size_of(nbytes)}" for phase, nbytes in found.phase_peaks.items() if phase != found.phase]
    parts = [] if found.projection is None else [f"{found.projection}."]
    parts += [f"Peaks elsewhere: {', '.join(others)}; between steps {_size_of(found.resident_bytes)}."]
    other = found.segmented_bytes if found.expandable else found.expandable_bytes
    kinds = ("with", "without") if found.expandable else ("without", "with")
    more = f"{gib(other - found.peak_bytes, found.peak_bytes)} GiB"
    parts.append(f"The allocator's share is that {kinds[0]} expandable segments; {kinds[1]} them it is {more}.")
    tokens = "" if found.tokens_per_step is None else f", {found.tokens_per_step:,} tokens a step"
    parts.append(f"{found.parameters:,} parameters{tokens}; planned for {found.device} in {found.seconds:.1f} s.")
    return "\n".join(parts)


def _verdict(found: MemoryPlan, name: str, no_card: str) -> str:
    needed, card, free = found.needed_bytes, found.vram_bytes, found.free_bytes
    if card is None:
        return f"{name} needs a card of {_size_of(needed)}. Which card is not known: {no_card}."

    def size(nbytes: int) -> str:
        return f"{gib(nbytes, card)} GiB"

    if not found.fits:
        return f"{name} does not fit: it needs {size(needed)} of a card's {size(card)}, {size(needed - card)} too much."
    verdict = f"{name} fits: it needs {size(needed)} of a card's {size(card)}"
    if free is None:
        room = f"{verdict}, and leaves {size(card - needed)}"
        if card - needed < DESKTOP_GIB[0] * 2**30:
            return (
                f"{room}: too little for a desktop, which takes {DESKTOP}. Give the screen to another GPU, or log in "
                "without one (ssh)."
            )
        return f"{room}. A desktop, which takes {DESKTOP}, is not counted."
    if found.fits_now:
        return f"{verdict}, of which {size(free)} are free now."
    return (
        f"{verdict}. But only {size(free)} are free now: other programs hold the rest, a desktop {DESKTOP} of it. "
        "nvidia-smi lists them."
    )


def _size_of(nbytes: int) -> str:
    return f"{gib(nbytes, nbytes)} GiB"
