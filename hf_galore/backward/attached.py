"""Which optimizer's hooks are on a model: what they leave on its parameters and layers, by which they are found."""

from __future__ import annotations

import weakref
from typing import Any, Protocol

from torch import Tensor, nn


class Owner(Protocol):
    """The hooks of one optimizer."""

    def receive(self, param: Tensor) -> None:
        """Use the gradient that autograd has put into `param.grad`."""

    def detach(self) -> None:
        """Take them off the model."""


class GradientHook:
    """A parameter's post-accumulate-grad hook; a class, so that `detach_all` can tell it from other hooks."""

    def __init__(self, hooks: weakref.ref[Any]) -> None:
        self.hooks = hooks

    def __call__(self, param: Tensor) -> None:
        hooks: Owner | None = self.hooks()
        if hooks is not None:
            hooks.receive(param)


def gradient_hooks_on(param: Tensor) -> list[GradientHook]:
    """The hooks of GaLore optimizers on a parameter."""
    hooks = getattr(param, "_post_accumulate_grad_hooks", None) or {}
    return [hook for hook in hooks.values() if isinstance(hook, GradientHook)]


def detach_all(model: nn.Module) -> None:
    """Take the hooks of every GaLore optimizer off `model`."""
    refs: list[weakref.ref[Any]] = [hook.hooks for param in model.parameters() for hook in gradient_hooks_on(param)]
    refs += [module.__dict__["_galore_sink"] for module in model.modules() if "_galore_sink" in module.__dict__]
    for ref in refs:
        owner: Owner | None = ref()
        if owner is not None:
            owner.detach()
