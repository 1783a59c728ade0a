"""Modules of experts whose stacks' gradients go to a sink: their class is replaced, as that of a linear layer is."""

from __future__ import annotations

import functools
import weakref
from typing import Any, cast

import torch
from torch import nn

from ..integrations.fully_shard import was
from .expert_watch import run_watched
from .experts import StackGradientSink
from .patched import ModulePatch, Patched, patch_module, why_forward_is_not_of, why_not_derivable


class ProjectedExperts(Patched):
    """What a patched module's class has before the module's own."""

    def __init_subclass__(cls) -> None:
        """Let the `forward` of patched modules have the signature of their own: a Trainer reads names off it."""
        super().__init_subclass__()
        if "original" not in cls.__dict__:
            return  # what FSDP2 makes of a patched class
        patched: Any = ProjectedExperts.forward

        @functools.wraps(cls.original.forward)
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            return patched(self, *args, **kwargs)

        cls.forward = forward  # type: ignore[method-assign]

    @torch.compiler.disable  # type: ignore[untyped-decorator, unused-ignore]
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the module's own."""
        ref: weakref.ref[StackGradientSink] | None = self.__dict__.get("_galore_sink")
        forward: Any = super().forward  # type: ignore[misc]
        return run_watched(forward, cast("nn.Module", self), None if ref is None else ref(), args, kwargs)


def why_not_watched(module: nn.Module) -> str | None:
    """Why `patch_experts` cannot serve a module, in words; `None` where it can."""
    cls = was(type(module))
    if cls.__module__.startswith("torch."):
        return f"it is of class {cls.__name__}, which computes with all of its weights in one operation"
    return why_forward_is_not_of(cls, module) or why_not_derivable(cls, ProjectedExperts)


def patch_experts(module: nn.Module, sink: weakref.ref[Any]) -> ModulePatch:
    """Send the gradients of a module's stacks to `sink`, which is referred to weakly.

    Raises:
        ValueError: the module cannot be patched; see `why_not_watched`.
    """
    return patch_module(module, ProjectedExperts, sink, why_not_watched(module))
