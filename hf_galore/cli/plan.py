"""`hf-galore plan`: whether a recipe fits a card, and what its memory goes into."""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..plan.planner import CONTEXT_BYTES, FRAGMENTATION, GIB, MemoryPlan, card_bytes, parse_size, plan
from ..plan.rehearsal import EVALUATION, SAVING, STEPS, Progress
from ..plan.tracking import FORWARD
from . import colors, stand_in
from .errors import Stopped, UserError, reporting_complaints
from .options import take_options
from .spinner import spinner

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
    try:
        with reporting_complaints():
            return _run(arguments)
    except KeyboardInterrupt:
        raise Stopped("interrupted.") from None


def _run(arguments: Sequence[str]) -> int:
    own, rest = _take_own(arguments)
    if not rest:
        raise UserError("give a recipe: --config recipe.yaml, and --key value to override what it says.")

    def parse(overrides: Sequence[str] = ()) -> stand_in.Arguments:
        return stand_in.parse([*rest, *overrides], PROG, ABOUT)

    parsed = parse()
    vram = card_bytes() if own.vram is None else _size(own.vram)
    if own.suggest:
        if vram is None:
            raise UserError("--suggest needs to know the card: give its memory, as --vram 24GiB.")
        if own.plot is not None:
            raise UserError("--plot draws the plan of one recipe, which --suggest is not about: leave out one of them.")
        from .suggest import suggest

        return suggest(parse, vram, own.json)
    picture = None if own.plot is None else _picture(own.plot)
    name = parsed.recipe.name if parsed.recipe else str(stand_in.model_name(parsed))
    # Whatever a library prints has no place in a pipe.
    with contextlib.redirect_stdout(sys.stderr), _progress() as progress:
        found = plan(parsed, vram=vram, progress=progress)
    if own.json:
        print(json.dumps(found.as_dict(), indent=2))
    else:
        _show(found, name)
    if picture is not None:
        _save(found, name, picture)
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
    """A plan's own options, and the other arguments."""
    given, rest = take_options(arguments, _VALUES, _SWITCHES)
    vram, plot = (given.get(flag, [None])[0] for flag in _VALUES)
    return _Own(vram, plot, "--json" in given, "--suggest" in given), rest


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise UserError(f"--vram: {error}") from error


def _picture(name: str) -> Path:
    """Where a picture is to go.

    Raises:
        UserError: it cannot be written there, or is no kind of picture.
    """
    from matplotlib.backend_bases import FigureCanvasBase  # only a picture is worth its import

    path = Path(name).expanduser()
    # pgf is for LaTeX, and wants one installed.
    kinds = sorted(set(FigureCanvasBase.get_supported_filetypes()) - {"pgf"})
    if path.suffix.lower().removeprefix(".") not in kinds:
        raise UserError(f"--plot {name}: its name has to end in one of {', '.join(f'.{kind}' for kind in kinds)}.")
    if not path.parent.is_dir():
        raise UserError(f"--plot {name}: there is no folder {path.parent}. Make it, or give another file.")
    if path.is_dir():
        raise UserError(f"--plot {name} is a folder. Give a file.")
    try:  # permissions alone do not say it: file systems have rules of their own
        with path.open("r+b") if path.exists() else tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise UserError(f"--plot {name} cannot be written ({error}). Give another file.") from error
    return path


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


def _gib(nbytes: int, whole: int) -> str:
    """GiB to two places; to four, where all there is is less than one."""
    return f"{nbytes / GIB:.{2 if whole >= GIB else 4}f}"


def _breakdown_table(found: MemoryPlan) -> Table:
    peak = found.peak_bytes
    table = Table(show_footer=True)
    table.add_column("what", footer="all")
    table.add_column("GiB", justify="right", footer=_gib(peak, peak))
    table.add_column("share", justify="right", footer="100.0 %")
    for kind, nbytes in found.breakdown.items():
        table.add_row(kind, _gib(nbytes, peak), f"{100 * nbytes / peak:.1f} %")
    return table


def _summary_table(found: MemoryPlan) -> Table:
    def size(nbytes: int) -> str:
        return f"{_gib(nbytes, found.peak_bytes)} GiB"

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
        f"{_gib(found.needed_bytes, found.needed_bytes)} GiB: the peak, {100 * FRAGMENTATION:g} % of it for "
        f"fragmentation of the allocator (with PYTORCH_ALLOC_CONF=expandable_segments:True), and "
        f"{CONTEXT_BYTES / GIB:g} GiB for CUDA's context. The last two are assumptions, not measured."
    )
    if found.vram_bytes is None:
        return f"{name} needs a card of {assumed} Which card is not known: {NO_CARD}."
    verdict = "fits" if found.fits else "does not fit"
    return f"{name} {verdict} into {found.vram_bytes / GIB:.2f} GiB; it needs {assumed}"


# ---- the picture

# In their order in the bar: first what stays.
_COLORS: Mapping[str, str] = {
    "parameters": colors.BLUE,
    "moments": colors.SKY,
    "bases": colors.GREEN,
    "gradients": colors.ORANGE,
    "low-rank gradients": colors.YELLOW,
    "activations": colors.VERMILION,
    "temporaries": colors.PURPLE,
    "batches": colors.GRAY,
}
_OTHER, _ASSUMED, _CARD = "#BBBBBB", "#888888", "#B00000"
_ROOM_FOR_A_NUMBER = 0.05  # of the axis


def _save(found: MemoryPlan, name: str, path: Path) -> None:
    from matplotlib.figure import Figure  # not pyplot, which would want to know about a display

    figure = Figure(figsize=(10, 4), layout="constrained")
    _draw(figure, found, name)
    try:
        figure.savefig(path, format=path.suffix.lower().removeprefix("."), dpi=150)
    except OSError as error:
        raise UserError(f"--plot {path} cannot be written: {error}") from error


def _draw(figure: Any, found: MemoryPlan, name: str) -> None:
    axes = figure.add_subplot()
    card = found.vram_bytes
    # A card many times as large as the run would leave nothing to see of it.
    shows_card = card is not None and card <= 10 * found.needed_bytes
    axes.set_xlim(0, 1.04 * max(found.needed_bytes, card if card is not None and shows_card else 0) / GIB)
    names = [kind for kind in _COLORS if kind in found.breakdown]
    names += [kind for kind in found.breakdown if kind not in _COLORS]
    left = 0
    for kind in names:
        nbytes = found.breakdown[kind]
        label = f"{kind}, {_gib(nbytes, found.peak_bytes)} GiB"
        _bar(axes, 1, left, nbytes, label=label, color=_COLORS.get(kind, _OTHER))
        left += nbytes
    rest = found.needed_bytes - found.peak_bytes
    _bar(
        axes,
        1,
        left,
        rest,
        label=f"fragmentation and context, {_gib(rest, found.peak_bytes)} GiB (assumed)",
        color="white",
        edgecolor=_ASSUMED,
        hatch="////",
    )
    _bar(axes, 0, 0, found.resident_bytes, label=None, color=_OTHER)
    if card is not None and shows_card:
        axes.axvline(card / GIB, color=_CARD, linestyle="--", linewidth=2, label=f"the card, {card / GIB:.4g} GiB")
    axes.set_yticks([1, 0], [f"peak\n({found.phase})", "between\nsteps"])
    axes.set_ylim(-0.5, 1.5)
    axes.set_xlabel("GiB")
    axes.grid(axis="x", color="#DDDDDD")
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.set_title(_title(found, name), loc="left", parse_math=False)  # a file may have dollars in its name
    figure.legend(loc="outside lower center", ncols=3, frameon=False)


def _bar(axes: Any, y: int, left: int, nbytes: int, **style: Any) -> None:
    """A piece of a bar, with its size on it where there is room."""
    drawn = axes.barh(y, nbytes / GIB, left=left / GIB, height=0.6, **{"edgecolor": "white", "linewidth": 0.5, **style})
    if nbytes / GIB >= _ROOM_FOR_A_NUMBER * axes.get_xlim()[1]:
        dark = style["color"] in (colors.BLUE, colors.GREEN, colors.VERMILION, colors.GRAY)
        box = {"facecolor": "white", "edgecolor": "none", "pad": 2} if "hatch" in style else None
        axes.bar_label(
            drawn,
            [_gib(nbytes, int(GIB * axes.get_xlim()[1]))],
            label_type="center",
            color="white" if dark else "black",
            bbox=box,
        )


def _title(found: MemoryPlan, name: str) -> str:
    needs = f"needs {_gib(found.needed_bytes, found.needed_bytes)} GiB"
    if found.vram_bytes is None:
        return f"{name}: {needs}"
    verdict = "fits" if found.fits else "does not fit"
    return f"{name}: {needs}, {verdict} into {found.vram_bytes / GIB:.4g} GiB"
