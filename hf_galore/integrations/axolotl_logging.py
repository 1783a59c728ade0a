"""Where axolotl's log goes while a command prints something of its own; imports nothing of axolotl."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def quiet_axolotl() -> Iterator[None]:
    """Within, axolotl and what it configures the logging of leave stdout alone, and say on stderr what warns."""
    names = (None, "axolotl")
    handlers = [handler for name in names for handler in logging.getLogger(name).handlers]
    on_stdout = [
        handler
        for handler in handlers
        if isinstance(handler, logging.StreamHandler) and handler.stream in (sys.stdout, sys.__stdout__)
    ]
    level, streams = logging.root.manager.disable, [handler.setStream(sys.stderr) for handler in on_stdout]
    logging.disable(max(level, logging.INFO))
    try:
        yield
    finally:
        logging.disable(level)
        for handler, stream in zip(on_stdout, streams, strict=True):
            handler.setStream(stream)
