"""The package's logger: its few lines are for the person at the terminal, so they show without being asked for."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator

logger = logging.getLogger("hf_galore")


class _Fallback(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes to the present stderr, and only where nobody has set up logging: then that decides."""

    def emit(self, record: logging.LogRecord) -> None:
        if not logging.getLogger().handlers:
            self.setStream(sys.stderr)
            super().emit(record)


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """Say nothing of what is only tried: a plan, an optimizer that is made to see how large it is."""
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def and_others(count: int, what: str = "other(s)", link: str = " and ") -> str:
    """The end of a list of which one is named: ` and 3 other(s)`, or nothing where there are none."""
    return f"{link}{count} {what}" if count > 0 else ""


if not logger.handlers:
    logger.addHandler(_Fallback())
    logger.setLevel(logging.INFO)
