"""Colours of pictures: Okabe and Ito's, which colour-blind people can tell apart."""

from __future__ import annotations

from typing import NamedTuple

BLACK = "#000000"
ORANGE = "#E69F00"
SKY = "#56B4E9"
GREEN = "#009E73"
YELLOW = "#F0E442"
BLUE = "#0072B2"
VERMILION = "#D55E00"
PURPLE = "#CC79A7"
GRAY = "#555555"
GRID = "#DDDDDD"
INK = "#1B1F24"
"""Of axes and text."""

# Yellow is hard to see on white. Black itself is what an SVG does not write down, so that it could not be replaced.
ON_WHITE = (BLUE, VERMILION, GREEN, PURPLE, "#101010", ORANGE, SKY)
ON_BLACK = ("#4C9BE8", "#F2793A", "#2FC79B", "#E09AC4", "#F0F6FC", "#F0B93A", "#8FD3FF")
"""The same, where the page is dark: lighter, in the same order."""
_DASHES: tuple[tuple[float, ...], ...] = ((), (5, 1.5), (1, 1.2), (6, 1.5, 1, 1.5))


class Style(NamedTuple):
    """How a run is drawn wherever it is."""

    color: int
    """Its place in `ON_WHITE` and `ON_BLACK`."""
    dashes: tuple[float, ...]
    """Lengths of dashes and gaps, in widths of the line; none for a solid one."""


def style(place: int) -> Style:
    """The style of the run at `place`: 28 before a pair is repeated, and nobody has to see colours."""
    return Style(place % len(ON_WHITE), _DASHES[place % len(_DASHES)])
