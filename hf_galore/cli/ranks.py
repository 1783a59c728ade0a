"""Which of several processes this is, by what a launcher has set before any library is imported: one of them speaks."""

from __future__ import annotations

import os

LAUNCHERS = "torchrun ... -m hf_galore"
"""What stands before a command's name where a launcher has started it, as far as the command knows."""


def number() -> int:
    """The number of this process among those that train together; 0 where it is alone."""
    return _whole_number("RANK", 0)


def count() -> int:
    """How many processes train together."""
    return _whole_number("WORLD_SIZE", 1)


def speaks() -> bool:
    """Whether this is the process that shows what all of them do."""
    return number() == 0


def _whole_number(variable: str, otherwise: int) -> int:
    value = os.environ.get(variable, "")
    return int(value) if value.isdecimal() else otherwise
