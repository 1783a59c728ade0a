"""Expandable segments of torch's allocator: whether they work here, are asked for, and how a command asks for them.

Without them the allocator keeps several per cent of a card for itself: `docs/cards.md` has the figures. They are asked
for by an environment variable, `PYTORCH_ALLOC_CONF=expandable_segments:True`, which torch reads when CUDA starts; where
it is not set, torch reads the older `PYTORCH_CUDA_ALLOC_CONF`. Importing hf_galore sets nothing; its commands do.
"""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Mapping, MutableMapping

VARIABLE, OLDER_VARIABLE = "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"
SETTING = "expandable_segments:True"

# Kernels of Linux on which torch has them and they do not work: CUDA's driver refuses their first allocation, on WSL as
# "unknown error", on Jetson boards as "out of memory". Elsewhere than on Linux torch warns, and has none.
_NOT_ON = ("microsoft", "tegra")

# CUDA's own allocator in place of torch's: the setting is read, and does nothing.
_OTHER_ALLOCATOR = re.compile(r"\bbackend\s*:\s*cudaMallocAsync\b")


def supported() -> bool:
    """Whether they work on this machine."""
    return sys.platform == "linux" and not any(name in platform.release().lower() for name in _NOT_ON)


def in_use(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether a training that a command starts in this environment has them."""
    given = _given(environ)
    return supported() and (given is None or _asks(given[1]))


def use_expandable_segments(environ: MutableMapping[str, str] = os.environ) -> str | None:
    """Ask for them where they work, unless the user has set the allocator up himself; before CUDA starts.

    Returns:
        A sentence for the user where his own settings leave them off; else `None`.
    """
    if not supported():
        return None
    given = _given(environ)
    if given is None:
        environ[VARIABLE] = SETTING
        return None
    name, value = given
    if _asks(value):
        return None
    if _OTHER_ALLOCATOR.search(value):
        return (
            f"{name}={value} asks for CUDA's own allocator, which has no expandable segments, and plans are not for "
            f"it: what it takes is not measured. {name}={SETTING} has torch's."
        )
    return (
        f"{name}={value} leaves expandable segments off, and torch's allocator takes about 4 % more of the card; "
        f"{name}={','.join([*_without_ours(value), SETTING])} has them."
    )


def _given(environ: Mapping[str, str]) -> tuple[str, str] | None:
    """The variable that torch reads, and its value."""
    return next(((name, environ[name]) for name in (VARIABLE, OLDER_VARIABLE) if environ.get(name)), None)


def _asks(value: str) -> bool:
    if _OTHER_ALLOCATOR.search(value):
        return False
    found = re.findall(r"\bexpandable_segments\s*:\s*(\w+)", value)
    return bool(found) and found[-1] == "True"


def _without_ours(value: str) -> list[str]:
    rest = re.sub(r",?\s*\bexpandable_segments\s*:\s*\w*", "", value).strip(", ")
    return [rest] if rest else []
