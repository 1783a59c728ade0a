"""stdout and stderr whose reader may go: a training outlasts it, and all else ends as quietly as programs in a pipe do.

Ctrl-C ends the `tee` of `hf-galore sft ... | tee log` too, and a lost connection the terminal: what is printed then has
no place to go, and must not cost the checkpoint that is being written.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any

from ..errors import UserError

READER_GONE = 128 + 13
"""The exit status of what ends as its reader has gone, as shells have it for SIGPIPE, which Windows has not."""


class Outlasting:
    """A stream that goes on as if nothing were the matter, where its reader has gone or its disk is full.

    Args:
        stream: the one that is written to.
        name: stdout or stderr, for the error.
    """

    def __init__(self, stream: Any, name: str) -> None:
        self._stream, self._name = stream, name
        self.lasts = False
        """Whether the command goes on without it."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write a text, and return its length."""
        try:
            self._stream.write(text)
        except OSError as error:
            self._failed(error)
        return len(text)

    def writelines(self, lines: Any) -> None:
        """Write texts."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Write what is held back."""
        try:
            self._stream.flush()
        except OSError as error:
            self._failed(error)

    def _failed(self, error: OSError) -> None:
        """Let what comes, and what is still held back, go nowhere; end the command, if it does not last."""
        with contextlib.suppress(OSError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
        if self.lasts:
            return
        if isinstance(error, BrokenPipeError):
            raise SystemExit(READER_GONE) from None
        raise UserError(f"{self._name} cannot be written to: {error.strerror or error}.") from None


@contextlib.contextmanager
def outlasting() -> Iterator[tuple[Outlasting, Outlasting]]:
    """Wrap stdout and stderr. What was closed from the start is open to nowhere; what has no letter for a sign of ours,
    as a file in Windows' code page, gets a question mark.
    """
    before = sys.stdin, sys.stdout, sys.stderr
    with contextlib.ExitStack() as opened:
        if sys.stdin is None:
            sys.stdin = opened.enter_context(open(os.devnull, encoding="utf-8"))
        elif hasattr(sys.stdin, "reconfigure"):
            sys.stdin.reconfigure(errors="replace")  # what is no text in its encoding, a tokenizer cannot take
        wrapped = []
        for name in ("stdout", "stderr"):
            stream = getattr(sys, name)
            if stream is None:
                stream = opened.enter_context(open(os.devnull, "w", encoding="utf-8"))
            elif getattr(stream, "errors", None) == "strict" and hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="replace")
            wrapped.append(Outlasting(stream, name))
        sys.stdout, sys.stderr = wrapped
        try:
            yield wrapped[0], wrapped[1]
        finally:
            sys.stdin, sys.stdout, sys.stderr = before
