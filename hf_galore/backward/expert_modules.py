"""Modules of experts whose stacks' gradients go to a sink: their class is replaced, as that of a linear layer is."""

from __future__ import annotations

import copyreg
import types
import weakref
from typing import Any, cast

import torch
from torch import nn

from ..integrations.accelerate import forward_attribute
from ..integrations.fully_shard import as_unit, was
from .experts import StackGradientSink, run_watched


class ProjectedExperts:
    """What a patched module's class has before the module's own. Copies and pickles are of the module's own."""

    original: type[nn.Module]
    """The module's own class."""

    @torch.compiler.disable  # type: ignore[untyped-decorator, unused-ignore]
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the module's own."""
        ref: weakref.ref[StackGradientSink] | None = self.__dict__.get("_galore_sink")
        forward: Any = super().forward  # type: ignore[misc]
        return run_watched(forward, cast("nn.Module", self), None if ref is None else ref(), args, kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        plain = self.original.__new__(self.original)
        plain.__dict__.update((key, value) for key, value in self.__dict__.items() if key != "_galore_sink")
        made_by, arguments, *rest = cast("tuple[Any, ...]", plain.__reduce_ex__(protocol))
        return (_new if made_by is copyreg.__newobj__ else made_by, arguments, *rest)  # type: ignore[attr-defined]


def _new(cls: type, *arguments: Any) -> Any:
    return cls.__new__(cls, *arguments)


def why_not_watched(module: nn.Module) -> str | None:
    """Why `patch_experts` cannot serve a module, in words; `None` where it can."""
    return None if forward_attribute(module) is None else "its forward has been replaced"


class ExpertsPatch:
    """A patched module, to be put back with `remove()`."""

    def __init__(self, module: nn.Module, cls: type[nn.Module]) -> None:
        self._module = weakref.ref(module)
        self._cls = cls  # that it had

    def remove(self) -> None:
        """Make the module one of its own class again."""
        module = self._module()
        if module is not None and issubclass(was(type(module)), ProjectedExperts):
            module.__dict__.pop("_galore_sink", None)
            module.__class__ = self._cls


def patch_experts(module: nn.Module, sink: weakref.ref[Any]) -> ExpertsPatch:
    """Send the gradients of a module's stacks to `sink`, which is referred to weakly."""
    cls = type(module)
    own = was(cls)
    subclasses: list[Any] = own.__subclasses__()
    found = next((sub for sub in subclasses if sub.__dict__.get("original") is own), None)
    if found is None:
        bases = (ProjectedExperts, own)
        found = types.new_class(f"Projected{own.__name__}", bases, exec_body=lambda body: body.update(original=own))
    module.__class__ = as_unit(found, cls)
    module.__dict__["_galore_sink"] = sink
    return ExpertsPatch(module, cls)
