"""Ctrl-C while a command's libraries are imported, which takes seconds."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

from .interrupts import INTERRUPTED


@contextlib.contextmanager
def leaving_at_once(message: str) -> Iterator[None]:
    """End the process at once on Ctrl-C, with a line on stderr and exit status 130.

    Nothing has been begun then. An exception in the middle of an import is another one when it arrives ("partially
    initialized module"), or none at all: extension modules clear it, and the command goes on.

    Args:
        message: the line; none where it is empty.
    """
    handled = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not handled or threading.current_thread() is not threading.main_thread():  # somebody else's business
        yield
        return

    def leave(*_: object) -> None:
        if message:
            os.write(2, f"\n{message}\n".encode())  # print() may be in the middle of something
        os._exit(INTERRUPTED)

    signal.signal(signal.SIGINT, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
