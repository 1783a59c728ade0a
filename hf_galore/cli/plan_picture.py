"""The picture of a memory plan: `hf-galore plan --plot FILE.png`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..compare import colors
from ..errors import UserError
from ..plan.planner import GIB, MemoryPlan
from ..recipes import writable


def file_for(name: str) -> Path:
    """The file that `--plot name` means, checked before the plan.

    Raises:
        UserError: it cannot be written there, or is no kind of picture.
    """
    from matplotlib.backend_bases import FigureCanvasBase  # only a picture is worth its import

    path = Path(name).expanduser()
    # pgf is for LaTeX, and wants one installed.
    kinds = sorted(set(FigureCanvasBase.get_supported_filetypes()) - {"pgf"})
    if path.suffix.lower().removeprefix(".") not in kinds:
        raise UserError(f"--plot {name}: its name has to end in one of {', '.join(f'.{kind}' for kind in kinds)}.")
    writable.check_file("--plot", path)
    return path


def gib(nbytes: int, whole: int) -> str:
    """A size in GiB, to two places; to four, where the whole that it is a part of is less than one."""
    return f"{nbytes / GIB:.{2 if whole >= GIB else 4}f}"


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


def save(found: MemoryPlan, name: str, path: Path) -> None:
    """Draw a plan and write the picture.

    Args:
        found: the plan.
        name: that of the recipe, for the title.
        path: from `file_for`.

    Raises:
        UserError: the file cannot be written.
    """
    from matplotlib.figure import Figure  # not pyplot, which would want to know about a display

    figure = Figure(figsize=(10, 4), layout="constrained")
    draw(figure, found, name)
    try:
        figure.savefig(path, format=path.suffix.lower().removeprefix("."), dpi=150)
    except OSError as error:
        raise UserError(f"--plot {path} cannot be written: {error}") from error


def draw(figure: Any, found: MemoryPlan, name: str) -> None:
    """Draw a plan into an empty figure of matplotlib."""
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
        label = f"{kind}, {gib(nbytes, found.peak_bytes)} GiB"
        _bar(axes, 1, left, nbytes, label=label, color=_COLORS.get(kind, _OTHER))
        left += nbytes
    rest = found.needed_bytes - found.peak_bytes
    _bar(
        axes,
        1,
        left,
        rest,
        label=f"allocator and libraries, {gib(rest, found.peak_bytes)} GiB",
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
    """Draw a piece of a bar, with its size on it where there is room."""
    drawn = axes.barh(y, nbytes / GIB, left=left / GIB, height=0.6, **{"edgecolor": "white", "linewidth": 0.5, **style})
    if nbytes / GIB >= _ROOM_FOR_A_NUMBER * axes.get_xlim()[1]:
        dark = style["color"] in (colors.BLUE, colors.GREEN, colors.VERMILION, colors.GRAY)
        box = {"facecolor": "white", "edgecolor": "none", "pad": 2} if "hatch" in style else None
        axes.bar_label(
            drawn,
            [gib(nbytes, int(GIB * axes.get_xlim()[1]))],
            label_type="center",
            color="white" if dark else "black",
            bbox=box,
        )


def _title(found: MemoryPlan, name: str) -> str:
    needs = f"needs {gib(found.needed_bytes, found.needed_bytes)} GiB"
    if found.vram_bytes is None:
        return f"{name}: {needs}"
    verdict = "fits" if found.fits else "does not fit"
    return f"{name}: {needs}, {verdict} into {found.vram_bytes / GIB:.4g} GiB"
