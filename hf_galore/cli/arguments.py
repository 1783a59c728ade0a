"""The parser of commands that read no recipe: every mistake is one line, with the option that was meant."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

from ..config import nearest
from ..errors import UserError


class OneLineParser(argparse.ArgumentParser):
    """argparse's parser, whose errors are `UserError`."""

    def error(self, message: str) -> NoReturn:
        """Raise the error.

        Raises:
            UserError: always.
        """
        raise UserError(f"{message}. See {self.prog} --help.")


class CommandParser(OneLineParser):
    """One that names the nearest option, too.

    Attributes:
        flags: all options, as they are written.
    """

    def __init__(self, prog: str, about: str, **kwargs: Any) -> None:
        self.flags: list[str] = []
        super().__init__(prog=prog, description=about, allow_abbrev=False, **kwargs)

    def add_argument(self, *flags: str, **kwargs: Any) -> argparse.Action:
        """Add an argument."""
        self.flags += [flag for flag in flags if flag.startswith("--")]
        return super().add_argument(*flags, **kwargs)

    def read(self, arguments: Sequence[str]) -> argparse.Namespace:
        """Parse.

        Raises:
            UserError: something that was given is wrong.
            SystemExit: `--help` was among them and has been shown.
        """
        namespace, unknown = self.parse_known_args(list(arguments))
        if unknown:
            flag = unknown[0].partition("=")[0]
            if not flag.startswith("-"):
                raise UserError(f"{flag!r} is too much. See {self.prog} --help.")
            raise UserError(f"there is no option {flag}, only {', '.join(self.flags)}.{nearest(flag, self.flags)}")
        return namespace
