"""Mistakes of the person at the terminal: each is one line, without a traceback."""

from __future__ import annotations


class UserError(ValueError):
    """Something that was given is wrong; the message names it, what is allowed and what to do."""

    def __init__(self, message: str) -> None:
        # Libraries wrap their messages over lines; a person reads one.
        super().__init__(" ".join(message.split()))
