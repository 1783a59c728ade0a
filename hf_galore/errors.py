"""Mistakes of the person at the terminal: each is one line, without a traceback."""

from __future__ import annotations

import signal


class UserError(ValueError):
    """Something that was given is wrong; the message names it, what is allowed and what to do."""

    def __init__(self, message: str) -> None:
        # Libraries wrap their messages over lines; a person reads one.
        super().__init__(" ".join(message.split()))


class Interrupted(KeyboardInterrupt):
    """A signal ended what was done; `number` is its number."""

    def __init__(self, number: int = signal.SIGINT) -> None:
        super().__init__()
        self.number = number
