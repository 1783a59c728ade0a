"""The programs in docs/examples, which docs/loops.md shows."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor

from tests.support.helpers import fraction_apart

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"


def example(name: str) -> Any:
    """One of the programs, as a module."""
    full = f"docs_examples_{name}"
    if full not in sys.modules:
        spec = importlib.util.spec_from_file_location(full, EXAMPLES / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module: ModuleType = importlib.util.module_from_spec(spec)
        sys.modules[full] = module
        spec.loader.exec_module(module)
    return sys.modules[full]


def forget_accelerate() -> None:
    """Let the next Accelerator be the first: its precision and its windows are a process's, and not its own."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def all_apart(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> float:
    """How far the ends of all weights are apart, as a fraction of the way that the second went."""
    ends = (torch.cat([end[name].float().flatten() for name in expected]) for end in (found, expected, start))
    return fraction_apart(*ends)
