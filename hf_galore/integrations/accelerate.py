"""All contact with the internals of accelerate: whether a micro-batch closes the window, and what its wrapper holds."""

from __future__ import annotations

from typing import Any

from accelerate.state import GradientState


def closes_window() -> bool:
    """Whether the present micro-batch is the last before the optimizer's step.

    accelerate knows it, from a Trainer's `gradient_accumulation_steps` or from `accelerator.accumulate(model)`. Where
    nobody accumulates with accelerate each micro-batch closes a window.
    """
    return bool(GradientState().sync_gradients)


def unwrapped(optimizer: Any) -> Any:
    """The optimizer inside accelerate's wrapper (`AcceleratedOptimizer`), or the one given where it has none."""
    return getattr(optimizer, "optimizer", optimizer)
