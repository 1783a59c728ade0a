"""Graphics cards: what torch sees of one by its name, and of the one in this machine.

A card has less than its name says, because the driver keeps some. Figures of a card are those of torch's own
out-of-memory errors in public reports from Linux, the smallest where they differ: a newer driver keeps more.
`docs/cards.md` has the reports. On Windows torch is told of the whole card, and gets no more of it.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import torch

from ..config import nearest

_GIB = 2**30

DESKTOP_GIB = (0.3, 1)
"""What a desktop takes of a card, at least and at most, as is commonly said."""
DESKTOP = f"{DESKTOP_GIB[0]} to {DESKTOP_GIB[1]} GiB"


class Card(NamedTuple):
    """A card that can be bought."""

    sold: int
    """GB, by its name."""
    seen: float | None = None
    """GiB that torch sees, as reported or measured; `None` where nobody was found to have said it."""


# Names that are sold with several sizes have them. ECC, where it is on, takes a sixteenth.
CARDS = {
    "2080ti": Card(11, 10.76),
    "3060-8gb": Card(8),
    "3060-12gb": Card(12, 11.75),
    "3060ti": Card(8),
    "3070": Card(8, 7.78),
    "3070ti": Card(8),
    "3080-10gb": Card(10, 9.78),
    "3080-12gb": Card(12),
    "3080ti": Card(12),
    "3090": Card(24, 23.59),
    "3090ti": Card(24),
    "4060": Card(8, 7.72),
    "4060ti-8gb": Card(8),
    "4060ti-16gb": Card(16, 15.55),
    "4070": Card(12),
    "4070super": Card(12),
    "4070ti": Card(12),
    "4070tisuper": Card(16),
    "4080": Card(16),
    "4080super": Card(16),
    "4090": Card(24, 23.52),
    "5060": Card(8),
    "5060ti-8gb": Card(8),
    "5060ti-16gb": Card(16),
    "5070": Card(12),
    "5070ti": Card(16),
    "5080": Card(16),
    "5090": Card(32, 31.36),
    "a2000-6gb": Card(6),
    "a2000-12gb": Card(12),
    "a4000": Card(16, 15.61),
    "a4500": Card(20),
    "a5000": Card(24),
    "a6000": Card(48),
    "titanrtx": Card(24),
    "8000": Card(48, 47.46),
    "4000ada": Card(20),
    "6000ada": Card(48, 44.43),  # ECC on
    "a30": Card(24, 23.53),
    "t4": Card(16, 14.56),  # ECC on
    "a100-40gb": Card(40, 39.50),
    "a100-80gb": Card(80, 79.25),
    "h100": Card(80),
    "h200": Card(141, 139.8),  # measured here
}


def labelled_bytes(sold: float) -> int:
    """What torch sees at least of a card that is sold with so many GB, for which there is no figure.

    Half a GiB less than its name, or a fiftieth where that is more. No card without ECC that there is a figure for has
    less.
    """
    return int((sold - max(0.5, sold / 50)) * _GIB)


_EXACT = {"kib": 2**10, "mib": 2**20, "gib": _GIB, "tib": 2**40}
_LARGEST_LABEL = 1000  # GB
_LARGEST_NUMBER = 288  # GB, the most that a card is sold with: without a unit, 409 is a slip for a card's name


def parse_size(text: str) -> int:
    """The bytes that torch sees of a card.

    A card's name (`4090`, `RTX 4060 Ti 16GB`) or its label (`24GB`, `24`) is what such a card has; `24GiB`, `22528MiB`
    and a number of bytes are exact.

    Raises:
        ValueError: it is none of these.
    """
    name = re.sub(r"nvidia|geforce|quadro|tesla|rtx(?=[\s_-]*\w*\d)|gtx|(?<!^)[\s_-]+", "", text.strip().lower())
    names = {known.replace("-", ""): known for known in CARDS}
    if name in names:
        card = CARDS[names[name]]
        return labelled_bytes(card.sold) if card.seen is None else int(card.seen * _GIB)
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kmgt]ib|gb?|b?)", name)
    if match is not None:
        number, unit = float(match[1]), match[2]
        if unit in _EXACT and number * _EXACT[unit] >= 2**20:
            return int(number * _EXACT[unit])
        if unit in ("", "g", "gb") and 1 <= number <= (_LARGEST_LABEL if unit else _LARGEST_NUMBER):
            return labelled_bytes(number)
        if unit in ("", "b") and number >= 2**20:
            return int(number)
    raise ValueError(_explained(text, name))


def _explained(text: str, name: str) -> str:
    sizes = [known for known in CARDS if name and known.startswith(f"{name}-")]
    if sizes:
        return f"{text!r} is sold with several sizes: say {' or '.join(sizes)}."
    return (
        f"A card is given by its name, its label (24GB) or its exact memory (23.5GiB, 22528MiB), but was given "
        f"{text!r}.{nearest(name, list(CARDS))} Names: {', '.join(CARDS)}."
    )


class PresentCard(NamedTuple):
    """The card of this machine, in bytes."""

    total: int
    free: int
    """What others leave of it: this process's own context counts as free."""


def present_card(context: int) -> PresentCard | None:
    """The current card of this machine; `None` where there is none.

    Args:
        context: bytes of a context of CUDA. Asking makes one, in this process; that the run would make is another.
    """
    if not torch.cuda.is_available():
        return None
    free, total = torch.cuda.mem_get_info()
    return PresentCard(total, min(total, free + context))
