"""A figure as an SVG for the inside of an HTML page: its colours are the page's, and each run can be hidden."""

from __future__ import annotations

import io
import re
from typing import Any
from xml.etree import ElementTree

from . import colors

_SVG, _LINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}href"
_REFERENCE = re.compile(r"url\(#([^)]+)\)")
_RUN = re.compile(r"run-\d+")
SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",  # text as text: small, and in the reader's own fonts
    "path.simplify_threshold": 0.5,  # of a point: a log of thousands of steps stays small
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), colors.INK),
}
"""matplotlib's, while figures are made."""
# What stands for a colour, as matplotlib writes it, on the page.
_VARIABLES = {
    colors.INK.lower(): "var(--ink)",
    colors.GRID.lower(): "var(--line)",
    colors.GRAY.lower(): "var(--soft)",
    **{color.lower(): f"var(--run-{place})" for place, color in enumerate(colors.ON_WHITE)},
}


def run_mark(place: int) -> str:
    """What marks all that belongs to the run at `place`: `gid` in a figure, a class in an SVG and on the page."""
    return f"run-{place}"


def drawn_as_svg(figure: Any, name: str, title: str) -> str:
    """`figure` as the text of an SVG element.

    Args:
        figure: matplotlib's, with no legend.
        name: what no other on the page is called: its parts are told apart by it.
        title: what it shows, for those who do not see it.
    """
    written = io.StringIO()
    figure.savefig(written, format="svg", transparent=True)
    root = ElementTree.fromstring(written.getvalue())
    for part in list(root):
        # The first says who made it; in the second is a rule for all that is on a page.
        if part.tag == f"{_SVG}metadata" or part.find(f"{_SVG}style") is not None:
            root.remove(part)
    _rename(root, name)
    root.attrib = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-label": title}
    text = ElementTree.tostring(root, encoding="unicode", short_empty_elements=False)
    for color, variable in _VARIABLES.items():
        text = text.replace(color, variable)
    return text


def _rename(root: ElementTree.Element, name: str) -> None:
    """Leave ids to what is referred to, unlike those of all other SVGs, and make classes of the marks of runs."""
    referred = {
        found: f"{name}-{place}"
        for place, found in enumerate(
            dict.fromkeys(
                found
                for element in root.iter()
                for key, value in element.attrib.items()
                for found in ([value[1:]] if key == _LINK else _REFERENCE.findall(value))
            )
        )
    }
    for element in root.iter():
        element.tag = element.tag.removeprefix(_SVG)
        old = element.attrib.pop("id", None)
        if old in referred:
            element.set("id", referred[old])
        elif old is not None and _RUN.fullmatch(old):
            element.set("class", old)
        link = element.attrib.pop(_LINK, None)
        if link is not None:
            element.set("href", f"#{referred[link[1:]]}")
        for key, value in element.attrib.items():
            element.set(key, _REFERENCE.sub(lambda found: f"url(#{referred[found[1]]})", value))
