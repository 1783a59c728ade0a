"""A quantity that is one number of a run, as bars."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from . import colors
from .runs import Run
from .seeds import Compared, spread
from .svg import run_mark
from .tables import name_of
from .words import digits, shortened


class Bars(NamedTuple):
    """A quantity that is one number of a run."""

    file: str
    title: str
    unit: str
    value: Callable[[Run], float | None]

    def draw(self, axes: Any, compared: Sequence[Compared], longest_name: int) -> bool:
        """Draw a bar for each of `compared`; of several seeds the mean, with its deviation.

        Args:
            axes: matplotlib's.
            compared: from top to bottom.
            longest_name: characters that the names beside the bars may have; 0 for no names.

        Returns:
            Whether there was anything to draw.
        """
        found = [spread(one, self.value) for one in compared]
        if all(value is None for value in found):
            return False
        shown = [value.mean if value else 0.0 for value in found]
        places = range(len(compared))
        drawn = [colors.ON_WHITE[colors.style(place).color] for place in places]
        bars = axes.barh(places, shown, height=0.62, color=drawn)
        told = ["not known" if value is None else digits(value.mean) for value in found]
        texts = axes.bar_label(bars, told, padding=4)
        for place, (bar, text, value) in enumerate(zip(bars, texts, found, strict=True)):
            bar.set_gid(run_mark(place))
            text.set_gid(run_mark(place))
            if value and value.deviation:
                ends = [value.mean - value.deviation, value.mean + value.deviation]
                (line,) = axes.plot(ends, [place, place], color=colors.GRAY, linewidth=1.2)
                line.set_gid(run_mark(place))
        if longest_name:
            axes.set_yticks(places, [shortened(name_of(one), longest_name) for one in compared], parse_math=False)
        else:
            axes.set_yticks([])
        axes.invert_yaxis()
        axes.set_xlim(0, 1.15 * max(shown) or 1)
        axes.set_xlabel(self.unit)
        axes.grid(axis="x", color=colors.GRID)
        axes.set_axisbelow(True)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
        return True
