"""How a command is stopped, and that one line says how to go on.

By Ctrl-C, by SIGTERM, which Slurm and spot machines send, or by SIGHUP, which a lost connection or a closed window is.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING

from ..errors import Interrupted
from . import ranks

if TYPE_CHECKING:  # which brings torch
    from ..recipes.stopping import StopAfterStep

INTERRUPTED = 128 + signal.SIGINT
"""The exit status of what Ctrl-C has ended, as shells have it."""


SIGHUP: signal.Signals | None = getattr(signal, "SIGHUP", None)
"""None on Windows."""
STOPPING = [signal.SIGINT, signal.SIGTERM, *([SIGHUP] if SIGHUP else [])]
"""The signals that stop a command."""


class Stopped(Exception):  # noqa: N818 - not an error: somebody wanted it
    """The command was stopped; the message says how to go on, and `status` is the exit status."""

    def __init__(self, message: str, status: int = INTERRUPTED) -> None:
        super().__init__(message)
        self.status = status


@contextlib.contextmanager
def stoppable(message: Callable[[], str]) -> Iterator[None]:
    """Turn Ctrl-C into `Stopped`, with the message that the function returns then."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        number = interrupt.number if isinstance(interrupt, Interrupted) else signal.SIGINT
        raise Stopped(message(), 128 + number) from None


@contextlib.contextmanager
def finishing_the_step(callback: StopAfterStep, prog: str, message: Callable[[], str]) -> Iterator[None]:
    """Let a training finish its step, and write a checkpoint, where a signal asks it to stop.

    One that has ended saves its model first: all was done for that. Before a training begins, and where the same is
    asked again, all stops at once.

    Args:
        callback: the one that the Trainer has.
        prog: the command, to say what happens.
        message: says how to go on, when all has stopped.

    Raises:
        Stopped: it was stopped.
    """
    asked = set[int]()

    def handle(number: int, frame: FrameType | None) -> None:
        # The same: a terminal and a program that watches may each send one of their own.
        again = number in asked
        if again and number == SIGHUP:  # of the terminal, and of its shell, which passes it on: nobody insists
            return
        # Slurm sends it to all processes of a job, and torchrun passes it on to those that it has started.
        if again and number == signal.SIGTERM and ranks.count() > 1:
            return
        asked.add(number)
        if again or not (callback.waits or callback.ended):
            callback.waits = callback.ended = False
            raise Interrupted(number)
        if callback.ended:
            callback.ask(number)
            _say(f"\n{prog}: the training has ended, and its model is saved first. Ctrl-C once more stops at once.\n")
        elif len(asked) == 1:
            callback.ask(number)
            _say(f"\n{prog}: stopping after this step, with a checkpoint. Ctrl-C once more stops at once.\n")

    with stoppable(message), handled(handle):
        yield


@contextlib.contextmanager
def handled(handle: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Call a function for what stops a command, but for what the process was started to ignore, as `nohup` does."""
    if threading.current_thread() is not threading.main_thread():  # no other thread may
        yield
        return
    numbers = [number for number in STOPPING if signal.getsignal(number) not in (signal.SIG_IGN, None)]
    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _say(text: str) -> None:
    """Write to stderr within a signal's handler, where its stream may be in use; once for several processes."""
    if not ranks.speaks():
        return
    with contextlib.suppress(OSError):
        os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, text.encode())
