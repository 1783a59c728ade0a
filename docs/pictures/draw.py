"""Draws the pictures of the docs: `python docs/pictures/draw.py` writes the SVG files beside this one.

Sizes of matrices, and of what a plan is made of, are in proportion; `plans.json` has the figures of the plans, each
with the command that made them, and `ranks.json` the losses that `tests.support.pages` takes from their runs. A panel
of its own behind everything keeps a picture readable on light and dark pages.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from html import escape
from pathlib import Path

HERE = Path(__file__).parent
GIB = 2**30
CARD_GIB = 23.5  # docs/cards.md

INK, FAINT, PANEL, LINE = "#1b1f24", "#57606a", "#ffffff", "#d0d7de"
# Okabe and Ito's, for all eyes.
BLUE, ORANGE, GREEN, YELLOW, SKY, RED, PINK = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#F0E442",
    "#56B4E9",
    "#D55E00",
    "#CC79A7",
)
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Noto Sans', 'DejaVu Sans', Arial, sans-serif"


class Drawing:
    """A picture, in pixels from its upper left corner."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.size = width, height
        self.title = title
        self.parts: list[str] = []

    def box(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        fill: str,
        label: str = "",
        *,
        ink: str = INK,
        dashed: bool = False,
        size: int = 13,
    ) -> None:
        """A rectangle with a label in its middle, whose lines `|` separates."""
        dashes = ' stroke-dasharray="5 4"' if dashed else ""
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="3" fill="{fill}" '
            f'stroke="{FAINT if dashed else INK}" stroke-width="1"{dashes}/>'
        )
        if label:
            self.lines(x + width / 2, y + height / 2, label, ink=ink, size=size)

    def lines(self, x: float, y: float, label: str, *, ink: str = INK, size: int = 13, bold: bool = False) -> None:
        """Lines of text around a middle."""
        rows = label.split("|")
        for number, row in enumerate(rows):
            self.text(x, y + (number - (len(rows) - 1) / 2) * size * 1.3 + size * 0.35, row, ink, size, "middle", bold)

    def text(
        self, x: float, y: float, text: str, ink: str = INK, size: int = 13, anchor: str = "start", bold: bool = False
    ) -> None:
        """One line, from its base."""
        weight = ' font-weight="600"' if bold else ""
        self.parts.append(
            f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="{ink}" text-anchor="{anchor}"{weight}>'
            f"{escape(text)}</text>"
        )

    def arrow(self, points: Sequence[tuple[float, float]], ink: str = FAINT, *, dashed: bool = False) -> None:
        """A line along points, with a head at its end."""
        path = " ".join(f"{x:g},{y:g}" for x, y in points)
        dashes = ' stroke-dasharray="5 4"' if dashed else ""
        self.parts.append(
            f'<polyline points="{path}" fill="none" stroke="{ink}" stroke-width="1.6"{dashes} marker-end="url(#head)"/>'
        )

    def line(self, x1: float, y1: float, x2: float, y2: float, ink: str = LINE, *, dashed: bool = False) -> None:
        """A line from one point to another."""
        dashes = ' stroke-dasharray="6 4"' if dashed else ""
        self.parts.append(f'<path d="M{x1:g} {y1:g}L{x2:g} {y2:g}" stroke="{ink}" stroke-width="1.4"{dashes}/>')

    def svg(self) -> str:
        """The picture's file."""
        width, height = self.size
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
            f'role="img" aria-label="{escape(self.title)}" font-family="{FONT}">'
        )
        marker = (
            '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" '
            f'orient="auto"><path d="M0 0L8 4L0 8z" fill="{FAINT}"/></marker></defs>'
        )
        panel = (
            f'<rect x="0.5" y="0.5" width="{width - 1}" height="{height - 1}" rx="8" fill="{PANEL}" stroke="{LINE}"/>'
        )
        return "\n".join([head, f"<title>{escape(self.title)}</title>", marker, panel, *self.parts, "</svg>", ""])


def memory() -> Drawing:
    """What a 7B model takes with four optimizers, in proportion."""
    plans = json.loads((HERE / "plans.json").read_text("utf-8"))
    names = {
        "parameters": ("weights", SKY),
        "gradients": ("gradients", RED),
        "moments": ("moments", ORANGE),
        "bases": ("bases", GREEN),
        "activations": ("activations", PINK),
        "other": ("other", LINE),
    }
    picture = Drawing(820, 320, "Llama-2-7B, 4,096 tokens a step, planned peaks of memory with four optimizers")
    picture.text(
        24, 34, "Llama-2-7B, all weights in bfloat16, 4,096 tokens a step: the peak, planned", bold=True, size=15
    )
    left, top, wide, gib = 210, 62, 46, 540 / 54
    for number, (name, found) in enumerate(plans.items()):
        y = top + number * wide
        picture.text(left - 12, y + 22, name, anchor="end")
        x: float = left
        breakdown = {kind: found["breakdown"].get(kind, 0) for kind in names if kind != "other"}
        breakdown["other"] = sum(found["breakdown"].values()) - sum(breakdown.values())
        for kind, nbytes in breakdown.items():
            width = nbytes / GIB * gib
            if width >= 1:
                picture.parts.append(
                    f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="32" fill="{names[kind][1]}" '
                    'stroke="#ffffff" stroke-width="0.8"/>'
                )
            x += width
        x = max(x, left + CARD_GIB * gib) + 10  # clear of the card's line
        picture.text(x, y + 22, f"{found['peak_bytes'] / GIB:.1f} GiB", bold=True)
        if name.startswith("LoRA"):
            picture.text(x + 76, y + 22, "trains adapters", FAINT, 12)
    bottom = top + len(plans) * wide
    card = left + CARD_GIB * gib
    picture.line(card, top - 8, card, bottom + 4, INK, dashed=True)
    picture.text(card, bottom + 20, f"what torch sees of a 24 GB card: {CARD_GIB} GiB", INK, 12, "middle")
    x = 24
    for label, color in names.values():
        picture.box(x, 284, 14, 14, color)
        picture.text(x + 20, 296, label, size=12)
        x += 42 + 7.2 * len(label)
    return picture


def one_step() -> Drawing:
    """One matrix's step: from its gradient to its weight."""
    picture = Drawing(860, 400, "One step of one matrix: the gradient is projected, Adam works on the projection")
    picture.text(24, 34, "One step of a matrix of 4096 × 4096 at rank 1024 (in proportion)", bold=True, size=15)
    side, rank, top, middle = 140, 35, 190, 260
    picture.box(36, top, side, side, SKY, "G|gradient|4096 × 4096")
    picture.lines(222, middle, "project|PᵀG", ink=FAINT)
    picture.arrow([(190, middle + 26), (252, middle + 26)])
    picture.box(272, middle - rank / 2, side, rank, ORANGE, "R   1024 × 4096")
    picture.box(272, middle + 32, side, rank, YELLOW, "m, 8 bits", size=12)
    picture.box(272, middle + 72, side, rank, YELLOW, "v, 8 bits", size=12)
    picture.text(272, middle + 126, "Adam's moments: a quarter of the elements of G", FAINT, 12)
    picture.lines(454, middle, "Adam", ink=FAINT)
    picture.arrow([(428, middle + 16), (482, middle + 16)])
    picture.box(498, middle - rank / 2, side, rank, ORANGE, "N   1024 × 4096")
    picture.lines(664, middle, "back|P N", ink=FAINT)
    picture.arrow([(648, middle + 26), (684, middle + 26)])
    picture.box(694, top, side, side, SKY, "W|weight")
    picture.text(764, top + side + 24, "W − η · scale · P N", INK, 13, "middle")
    picture.box(326, 60, rank, side, GREEN, "P", ink="#ffffff")
    for line, text in enumerate(
        ("the basis, 4096 × 1024, in 4 bits:", "the directions that hold most of G,", "found anew every 200 steps")
    ):
        picture.text(374, 118 + line * 17, text, FAINT, 12)
    picture.arrow([(324, 100), (222, 100), (222, middle - 26)], dashed=True)
    picture.arrow([(364, 100), (664, 100), (664, middle - 26)], dashed=True)
    return picture


def backward() -> Drawing:
    """What is alive during the backward pass, three ways."""
    picture = Drawing(860, 400, "Gradients that are alive during the backward pass, in three ways")
    picture.text(
        24, 34, "What the backward pass keeps, of eight layers, from the last to the first", bold=True, size=15
    )
    rows = (
        ("plain", "every gradient waits|for optimizer.step()", RED),
        ("layerwise", "a layer's weight moves as|soon as its gradient is there", ORANGE),
        ("layerwise, with the|projected backward", "R comes from δ and X;|no G is ever made", GREEN),
    )
    for row, (name, why, color) in enumerate(rows):
        top = 66 + row * 110
        picture.lines(112, top + 22, name, bold=True)
        picture.lines(112, top + 62, why, ink=FAINT, size=12)
        for layer in range(8):
            x = 236 + layer * 60
            picture.box(x, top, 52, 52, PANEL, dashed=True)
            if row == 0:
                picture.box(x, top, 52, 52, color, "G", ink="#ffffff")
            elif row == 1 and layer == 5:
                picture.box(x, top, 52, 52, color, "G")
            elif row == 2 and layer == 5:
                picture.box(x, top + 19.5, 52, 13, color, "R", ink="#ffffff", size=11)
            if row > 0 and layer < 5:
                picture.lines(x + 26, top + 26, "moved", ink=FAINT, size=11)
            picture.text(x + 26, top + 68, f"layer {8 - layer}", FAINT, 11, "middle")
        totals = ("all of them:|12.6 GiB for 7B|in bfloat16", "one layer's", "a quarter of|one layer's")
        picture.lines(782, top + 26, totals[row], size=12)
    picture.text(236, 384, "the backward pass goes this way", FAINT, 12)
    picture.arrow([(436, 380), (708, 380)])
    return picture


def refreshes() -> Drawing:
    """Refreshes over steps: all at once, or spread."""
    picture = Drawing(860, 300, "Refreshes of 224 matrices over 600 steps: all at once, or spread over the gap")
    picture.text(24, 34, "Refreshes of the 224 matrices of a 7B model, gap 200", bold=True, size=15)
    left, wide = 170, 640
    for row, (name, why) in enumerate(
        (("stagger=false", "as published: all at once"), ("stagger=true", "the default: spread"))
    ):
        base = 130 + row * 120
        picture.text(24, base - 34, name, bold=True)
        picture.text(24, base - 16, why, FAINT, 11)
        picture.line(left, base, left + wide, base, INK)
        if row == 0:
            for step in (0, 200, 400, 600):
                x = left + step / 600 * (wide - 10)
                picture.parts.append(f'<rect x="{x:g}" y="{base - 70}" width="6" height="70" fill="{RED}"/>')
                picture.text(x + 10, base - 56, "224", RED, 12)
        else:
            picture.parts.append(f'<rect x="{left}" y="{base - 70}" width="6" height="70" fill="{RED}"/>')
            picture.text(left + 10, base - 56, "224, once", RED, 12)
            picture.parts.append(f'<rect x="{left + 7}" y="{base - 3}" width="{wide - 7}" height="3" fill="{GREEN}"/>')
            picture.text(left + 320, base - 12, "one or two a step", GREEN, 12, "middle")
        for step in (0, 200, 400, 600):
            picture.text(left + step / 600 * (wide - 10), base + 18, f"step {step}" if step else "step 1", FAINT, 11)
    return picture


def ranks() -> Drawing:
    """The held-out loss of each option by rank, and of optimizers that have none."""
    found: dict[str, dict[str, list[float]]] = json.loads((HERE / "ranks.json").read_text("utf-8"))
    picture = Drawing(
        900, 430, "Held-out loss by rank of GaLore's options, of AdamW and of Muon, at the best of two rates"
    )
    picture.text(24, 34, "Held-out loss by rank, each optimizer at the best of its two rates", bold=True, size=15)
    left, right, top, bottom = 70, 560, 64, 360
    places = {"1": left + 40, "4": left + 180, "16": left + 320, "64": left + 460}
    means = [mean for by_rank in found.values() for mean, _ in by_rank.values()]
    low, high = min(means) - 0.02, max(means) + 0.02

    def height(loss: float) -> float:
        return round(bottom - (loss - low) / (high - low) * (bottom - top), 1)

    tenths = [number / 20 for number in range(round(low * 20), round(high * 20) + 1) if low <= number / 20 <= high]
    for loss in tenths:
        picture.line(left, height(loss), right, height(loss))
        picture.text(left - 8, height(loss) + 4, f"{loss:.2f}", FAINT, 12, "end")
    for rank, x in places.items():
        picture.text(x, bottom + 22, f"rank {rank}", FAINT, 12, "middle")
    picture.text(
        (left + right) / 2, bottom + 46, "of a model 256 wide: 1/256, 1/64, 1/16 and 1/4 of it", FAINT, 12, "middle"
    )
    labels: list[tuple[float, str, str]] = []
    # The last is where the first, whose line is dashed, is too.
    inks = (INK, FAINT, RED, BLUE, GREEN, PINK, ORANGE, SKY, INK)
    for (name, by_rank), ink in zip(found.items(), inks, strict=True):
        if "0" in by_rank:
            y = height(by_rank["0"][0])
            picture.line(left, y, right, y, ink, dashed=True)
            labels.append((y, name, ink))
            continue
        points = sorted((places[rank], height(mean), mean, spread) for rank, (mean, spread) in by_rank.items())
        for (x1, y1, *_), (x2, y2, *_) in itertools.pairwise(points):
            picture.line(x1, y1, x2, y2, ink)
        for x, y, mean, spread in points:
            picture.line(x, height(mean - spread), x, height(mean + spread), ink)
            picture.parts.append(f'<circle cx="{x:g}" cy="{y:g}" r="4" fill="{ink}"/>')
        labels.append((points[-1][1], name, ink))
    lowest = top - 20.0
    for y, name, ink in sorted(labels):
        lowest = max(y, lowest + 18)
        picture.line(right + 4, y, right + 20, lowest, ink)
        picture.text(right + 26, lowest + 4, name, ink, 13)
    return picture


def architecture() -> Drawing:
    """Where a gradient goes, by files."""
    picture = Drawing(900, 560, "Which file does what, from the backward pass to the weight")
    width, height = 190, 62

    def place(x: float, y: float, name: str, what: str, fill: str = PANEL) -> None:
        picture.box(x, y, width, height, fill)
        picture.lines(x + width / 2, y + height / 2, what, size=12, ink=INK)
        picture.text(x + width / 2, y + 15, name, INK, 12, "middle", bold=True)

    picture.parts.append(f'<rect x="20" y="40" width="430" height="190" rx="6" fill="#f6f8fa" stroke="{LINE}"/>')
    picture.text(32, 60, "during the backward pass", FAINT, 12)
    place(36, 72, "backward/linear.py", "|a linear layer: δ and X", "#ddf4ff")
    place(244, 72, "any other layer", "", "#ddf4ff")
    place(140, 156, "backward/window.py", "|one record a parameter:|hold, or use at once", "#ddf4ff")
    picture.arrow([(131, 134), (190, 155)])
    picture.text(86, 152, "R, no G", FAINT, 12)
    picture.arrow([(339, 134), (280, 155)])
    picture.text(316, 152, "G", FAINT, 12)

    place(480, 156, "optim/optimizer.py", "|step(): each target, what|its window holds", "#dafbe1")
    place(300, 282, "optim/target.py", "|one projected parameter", "#dafbe1")
    picture.arrow([(235, 218), (235, 300), (299, 313)])
    picture.text(140, 268, "project(G),", FAINT, 12)
    picture.text(140, 284, "update(R)", FAINT, 12)
    picture.arrow([(575, 218), (575, 300), (491, 313)])
    place(60, 400, "lowrank/", "|projection, refresh,|storages, rounding", "#fff8c5")
    place(300, 400, "rules/", "|adam, adam_8bit,|adafactor, lion", "#fff8c5")
    place(540, 400, "the weight", "|W moves by η · scale · PN", "#ffebe9")
    picture.arrow([(330, 344), (200, 399)])
    picture.text(130, 366, "a new basis, if due", FAINT, 12)
    picture.arrow([(395, 344), (395, 399)])
    picture.text(402, 374, "R to N", FAINT, 12)
    picture.arrow([(460, 344), (590, 399)])

    place(690, 72, "integrations/", "|a Trainer, by optim=", "#f6f8fa")
    picture.arrow([(690, 103), (620, 155)])
    place(480, 40, "optim/build.py", "|make_optimizer,|loops of one's own", "#dafbe1")
    picture.arrow([(575, 102), (575, 155)])
    place(690, 192, "plan/", "|the same steps with|fake tensors", "#f6f8fa")
    picture.arrow([(785, 192), (785, 135)])
    place(690, 312, "recipes/", "|YAML to a Trainer", "#f6f8fa")
    picture.arrow([(785, 312), (785, 255)])
    picture.arrow([(880, 343), (890, 343), (890, 103), (881, 103)])
    place(690, 470, "cli/, compare/, bench/", "|commands", "#f6f8fa")
    picture.arrow([(785, 470), (785, 375)])
    picture.text(
        60,
        506,
        "An arrow is a call, or what is handed on. G gradient, δ and X a layer's output gradient and input,",
        FAINT,
        12,
    )
    picture.text(
        60,
        524,
        "R low-rank gradient, N the direction that a rule makes of it, P basis, W weight, η learning rate.",
        FAINT,
        12,
    )
    return picture


def favicon() -> str:
    """The site's icon: a square that is projected."""
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32"><rect width="32" height="32" rx="6" '
        'fill="#3f51b5"/><rect x="6" y="6" width="20" height="20" fill="none" stroke="#ffffff" stroke-width="2"/>'
        '<rect x="6" y="19" width="20" height="7" fill="#ffffff"/></svg>\n'
    )


def pictures() -> dict[str, str]:
    """The text of each file, by its name."""
    drawings = (memory, one_step, backward, refreshes, ranks, architecture)
    return {f"{draw.__name__}.svg": draw().svg() for draw in drawings} | {"favicon.svg": favicon()}


if __name__ == "__main__":
    for name, text in pictures().items():
        (HERE / name).write_text(text, "utf-8")
