"""A real terminal for a command: 80 columns, keys that are pressed, and the screen as a person sees it."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import termios
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

import pexpect
import pyte
from pexpect.fdpexpect import fdspawn

from tests.support import warm

COLUMNS, LINES = 80, 40


class Terminal:
    """`hf-galore ...` in a terminal; a context manager, at whose end the command has ended.

    Its process begins with the libraries imported (see `tests.support.warm`).

    Args:
        arguments: of the command.
        folder: where it runs.
        environment: what it gets beside this process's own environment.
    """

    def __init__(self, arguments: Sequence[str], folder: Path, environment: dict[str, str] | None = None) -> None:
        self.screen = pyte.HistoryScreen(COLUMNS, LINES, history=2000)
        self._stream = pyte.Stream(self.screen)
        self._ours, self._its = pty.openpty()
        fcntl.ioctl(self._its, termios.TIOCSWINSZ, struct.pack("HHHH", LINES, COLUMNS, 0, 0))
        size = {"COLUMNS": str(COLUMNS), "LINES": str(LINES)}  # whatever those of this process's terminal are
        self._process = warm.begun(
            warm.hf_galore,
            *arguments,
            streams=[os.ttyname(self._its)] * 3,
            folder=folder,
            environment={"TERM": "xterm-256color", **size, **(environment or {})},
        )
        self._keys = fdspawn(self._ours, encoding="utf-8", timeout=None)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        warm.end(self._process)
        os.close(self._its)
        os.close(self._ours)

    def text(self) -> str:
        """All that has been on the screen, with what has scrolled away; each line without spaces at its end."""
        history = ["".join(line[column].data for column in range(COLUMNS)) for line in self.screen.history.top]
        return "\n".join(line.rstrip() for line in [*history, *self.screen.display]).rstrip()

    def wait_for(self, pattern: str, seconds: float = 240) -> str:
        """Wait until something stands on the screen.

        Args:
            pattern: a regular expression.
            seconds: how long at most.

        Returns:
            What was found.

        Raises:
            AssertionError: it never came; the message has the screen.
        """

        def found() -> re.Match[str] | None:
            return re.search(pattern, self.text())

        self._read_until(found, seconds)
        match = found()
        assert match is not None, f"{pattern!r} never came:\n{self.text()}"
        return match[0]

    def type(self, text: str) -> None:
        """Press the keys of a text; "\\n" is the return key."""
        self._keys.send(text.replace("\n", "\r"))

    def press_ctrl(self, key: str) -> None:
        """Press Ctrl and a letter."""
        self._keys.send(chr(ord(key.upper()) - ord("@")))

    def status(self, seconds: float = 240) -> int:
        """Wait until the command has ended, and return its exit status, as a shell has it."""
        self._read_until(lambda: False, seconds)
        ended = self._process.exitcode
        assert ended is not None, f"it runs on:\n{self.text()}"
        return 128 - ended if ended < 0 else ended

    def _read_until(self, done: Callable[[], object], seconds: float) -> None:
        """Show what comes, until something is so or the command has ended and no more comes."""
        end = time.monotonic() + seconds
        while not done() and time.monotonic() < end:
            runs = self._process.is_alive()
            if self._keys.expect([r"(?s).+", pexpect.TIMEOUT], timeout=0.2 if runs else 0) == 0:
                self._stream.feed(self._keys.after)
            elif not runs:
                return
