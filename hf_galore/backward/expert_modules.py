"""Modules of experts whose stacks' gradients go to a sink: their class is replaced, as that of a linear layer is."""

from __future__ import annotations

import functools
import types
import weakref
from typing import Any, cast

import torch
from torch import nn

from ..integrations.accelerate import forward_attribute
from ..integrations.fully_shard import as_unit, was
from .expert_watch import run_watched
from .experts import StackGradientSink
from .patched import Patched, patched_class, why_not_derivable


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
    attribute = forward_attribute(module)
    if attribute is not None and not _is_own(module.__dict__[attribute], module, cls):
        return "its forward has been replaced"
    return why_not_derivable(cls, ProjectedExperts)


def _is_own(forward: Any, module: nn.Module, cls: type) -> bool:
    """Whether this is the `forward` of a class, of that module."""
    function = getattr(forward, "__func__", None)
    return getattr(forward, "__self__", None) is module and function is cls.forward  # type: ignore[attr-defined]


def _rebind(module: nn.Module, old: type, new: type) -> None:
    """Let a module of which somebody has bound `forward`, as accelerate's wrapper does, run that of its new class."""
    for attribute in ("forward", "_old_forward"):
        if _is_own(module.__dict__.get(attribute), module, old):
            setattr(module, attribute, types.MethodType(new.forward, module))  # type: ignore[attr-defined]


class ExpertsPatch:
    """A patched module, to be put back with `remove()`."""

    def __init__(self, module: nn.Module, cls: type[nn.Module]) -> None:
        self._module = weakref.ref(module)
        self._cls = cls  # that it had
        self._patched = was(type(module))

    def remove(self) -> None:
        """Give the module its own class again."""
        module = self._module()
        if module is not None and was(type(module)) is self._patched:
            del module.__dict__["_galore_sink"]
            module.__class__ = self._cls
            _rebind(module, self._patched, was(self._cls))


def patch_experts(module: nn.Module, sink: weakref.ref[Any]) -> ExpertsPatch:
    """Send the gradients of a module's stacks to `sink`, which is referred to weakly.

    Raises:
        ValueError: the module cannot be patched; see `why_not_watched`.
    """
    reason = why_not_watched(module)
    if reason is not None:
        raise ValueError(f"The projected backward cannot serve this module: {reason}.")
    cls = type(module)
    patched = patched_class(was(cls), ProjectedExperts)
    module.__class__ = as_unit(patched, cls)
    module.__dict__["_galore_sink"] = sink
    _rebind(module, was(cls), patched)
    return ExpertsPatch(module, cls)
