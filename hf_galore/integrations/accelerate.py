"""All contact with the internals of accelerate: whether a micro-batch closes the window, and what its wrappers hold."""

from __future__ import annotations

import functools
from typing import Any

from accelerate import Accelerator
from accelerate.state import GradientState
from accelerate.utils import DynamoBackend
from torch import nn


def closes_window() -> bool:
    """Whether the present micro-batch is the last before the optimizer's step.

    accelerate knows it, from a Trainer's `gradient_accumulation_steps` or from `accelerator.accumulate(model)`. Where
    nobody accumulates with accelerate each micro-batch closes a window.
    """
    return bool(GradientState().sync_gradients)


def unwrapped(optimizer: Any) -> Any:
    """The optimizer inside accelerate's wrapper (`AcceleratedOptimizer`), or the one given where it has none."""
    return getattr(optimizer, "optimizer", optimizer)


def compiles(accelerator: Accelerator) -> bool:
    """Whether it compiles the models that it prepares: a Trainer's `torch_compile`, or `accelerate launch`'s option."""
    return bool(accelerator.state.dynamo_plugin.backend != DynamoBackend.NO)


def forward_attribute(module: nn.Module) -> str | None:
    """Where a module has the `forward` that its calls end in, if not in its class.

    accelerate puts a wrapper in `module.forward` that moves inputs to the module's device and then calls
    `module._old_forward` (`add_hook_to_module`): so does every model that a `device_map` spreads over devices.

    Returns:
        `"_old_forward"` under accelerate's wrapper, `"forward"` where the module has one of its own otherwise, and
        `None` where it is the class's.
    """
    own = module.__dict__.get("forward")
    if own is None:
        return None
    is_wrapper = (
        isinstance(own, functools.partial)
        and own.func.__module__ == "accelerate.hooks"
        and "_old_forward" in module.__dict__
    )
    return "_old_forward" if is_wrapper else "forward"
