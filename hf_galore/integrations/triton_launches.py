"""Kernels that are written in Triton, in plans: Liger's, and whatever else a model or a trainer brings along."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
from collections.abc import Iterator
from typing import Any
from unittest import mock

# Triton's classes whose `run` is what `kernel[grid](...)` calls, by their module. The last is that of its interpreter.
LAUNCHERS = (
    ("triton.runtime.jit", "JITFunction"),
    ("triton.runtime.autotuner", "Autotuner"),
    ("triton.runtime.interpreter", "InterpretedFunction"),
)


@contextlib.contextmanager
def without_launches() -> Iterator[None]:
    """Within, kernels of Triton do nothing: they fill what is there and allocate nothing.

    On tensors without numbers they would be launched with addresses that are none, which on a card ends the process's
    CUDA context, and without a card they cannot be launched.
    """
    with contextlib.ExitStack() as stack:
        for module, name in LAUNCHERS if importlib.util.find_spec("triton") is not None else ():
            launcher = getattr(importlib.import_module(module), name)
            stack.enter_context(mock.patch.object(launcher, "run", _launch_nothing))
        yield


def _launch_nothing(self: Any, *args: Any, **kwargs: Any) -> None:
    """Instead of a launch."""
