"""How a command ends early: each is one line on stderr and an exit status, with no traceback."""

from __future__ import annotations


class UserError(ValueError):
    """Something that was given is wrong; the message names it, what is allowed and what to do."""

    def __init__(self, message: str) -> None:
        # Libraries wrap their messages over lines; a person reads one.
        super().__init__(" ".join(message.split()))


class Stopped(Exception):  # noqa: N818 - not an error: somebody pressed Ctrl-C
    """The person stopped the command; the message says how to go on."""
