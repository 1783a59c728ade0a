"""The signals that stop a command, as a terminal's shell leaves them: what starts the tests may have them ignored."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator

from hf_galore.cli.interrupts import STOPPING

DEFAULTS = {number: signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL for number in STOPPING}


def set_defaults() -> None:
    """Let each of them do what it does by default."""
    for number, handler in DEFAULTS.items():
        signal.signal(number, handler)


@contextlib.contextmanager
def of_a_terminal() -> Iterator[None]:
    """Let each of them do what it does by default, within; as `nohup` and a shell in the background have not."""
    before = {number: signal.getsignal(number) for number in DEFAULTS}
    set_defaults()
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
