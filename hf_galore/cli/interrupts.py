"""How a person stops a command: Ctrl-C becomes one line that says how to go on."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

INTERRUPTED = 130  # 128 + SIGINT, as shells have it


class Stopped(Exception):  # noqa: N818 - not an error: somebody pressed Ctrl-C
    """The person stopped the command; the message says how to go on."""


@contextlib.contextmanager
def stoppable(message: Callable[[], str]) -> Iterator[None]:
    """Turn Ctrl-C into `Stopped`, with the message that the function returns then."""
    try:
        yield
    except KeyboardInterrupt:
        raise Stopped(message()) from None
