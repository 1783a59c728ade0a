"""Will it fit? The memory of a training run, found without a GPU, weights or data.

The package can be called: `hf_galore.plan(...)` is `hf_galore.plan.plan(...)`.
"""

from __future__ import annotations

import sys
import types
from typing import Any

from .planner import MemoryPlan, measure, plan

__all__ = ["MemoryPlan", "measure", "plan"]


class _Callable(types.ModuleType):
    """A module that is its own main function, so that importing it does not hide `hf_galore.plan(...)`."""

    def __call__(self, *args: Any, **kwargs: Any) -> MemoryPlan:
        return plan(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
