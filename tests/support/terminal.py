"""A real terminal for a command: 80 columns, keys that are pressed, and the screen as a person sees it."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

import pexpect
import pyte

from tests.support.signals import set_defaults

COLUMNS, LINES = 80, 40


class Terminal:
    """A command in a terminal; a context manager, at whose end the command has ended.

    Args:
        command: the program and its arguments.
        folder: where it runs.
        environment: what it gets beside this process's own environment.
    """

    def __init__(self, command: Sequence[str], folder: Path, environment: dict[str, str] | None = None) -> None:
        inherited = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES", "NO_COLOR")}
        self.screen = pyte.HistoryScreen(COLUMNS, LINES, history=2000)
        self._stream = pyte.Stream(self.screen)
        self._process = pexpect.spawn(
            command[0],
            list(command[1:]),
            cwd=str(folder),
            env={**inherited, "TERM": "xterm-256color", **(environment or {})},
            dimensions=(LINES, COLUMNS),
            encoding="utf-8",
            timeout=None,
            preexec_fn=set_defaults,  # or else the keys that stop a command may do nothing
        )

    def __enter__(self) -> Terminal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.close(force=True)

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
        self._process.send(text.replace("\n", "\r"))

    def press_ctrl(self, key: str) -> None:
        """Press Ctrl and a letter."""
        self._process.sendcontrol(key)

    def status(self, seconds: float = 240) -> int:
        """Wait until the command has ended, and return its exit status, as a shell has it."""
        self._read_until(lambda: False, seconds)
        assert not self._process.isalive(), f"it runs on:\n{self.text()}"
        signalled: int | None = self._process.signalstatus
        return int(self._process.exitstatus) if signalled is None else 128 + signalled

    def _read_until(self, done: Callable[[], object], seconds: float) -> None:
        """Show what comes, until something is so or the command has ended."""
        end = time.monotonic() + seconds
        while not done() and time.monotonic() < end:
            what = self._process.expect([r"(?s).+", pexpect.TIMEOUT, pexpect.EOF], timeout=0.2)
            if what == 0:
                self._stream.feed(self._process.after)
            elif what == 2:
                self._process.wait()
                return
