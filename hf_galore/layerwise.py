"""Layerwise updates: hooks that update each weight during the backward pass, as its gradient appears.

No more than one parameter's gradient is alive at a time. The optimizer stays an ordinary one: its `param_groups` are
what schedulers move and its `state` is what checkpoints hold; `step()` finishes what the hooks left.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

if TYPE_CHECKING:
    from .optimizers import GaLoreOptimizer


class LayerwiseHooks:
    """Hooks on a model's parameters that make an optimizer update each one during the backward pass.

    A parameter whose module runs several times before the backward pass may get its gradient in several pieces (it
    does under reentrant checkpointing): its gradient is left to gather, and `optimizer.step()` updates it.

    The hooks die with the optimizer, with `optimizer.close()`, and when other layerwise hooks take the model over.

    Args:
        optimizer: updates the parameters; referred to weakly.
        model: whose modules own the parameters; referred to weakly.
    """

    def __init__(self, optimizer: GaLoreOptimizer, model: nn.Module) -> None:
        self._optimizer = weakref.ref(optimizer)
        self._model = weakref.ref(model)
        self._handles: list[RemovableHandle] = []
        # A model outlives its trainers: hooks must not outlive theirs.
        self._finalizer = weakref.finalize(self, _remove, self._handles)
        self._runs: Counter[int] = Counter()  # forward passes of a parameter's modules in this step
        self._norms: dict[int, Tensor] = {}  # of the gradients that this step has used, by parameter
        self.attach()

    @property
    def attached(self) -> bool:
        """Whether the hooks are on the model."""
        return bool(self._handles)

    def attach(self) -> None:
        """Put the hooks on the model; detaches those of any other optimizer first. Does nothing if they are on."""
        optimizer, model = self._optimizer(), self._model()
        if self.attached or optimizer is None or model is None:
            return
        detach_all(model)
        me = weakref.ref(self)
        hooked: set[int] = set()
        for index, group in enumerate(optimizer.param_groups):
            for param in group["params"]:
                if param.requires_grad:
                    hooked.add(id(param))
                    self._handles.append(param.register_post_accumulate_grad_hook(_GradientHook(me, index)))
        for module in model.modules():
            owned = [id(param) for param in module.parameters(recurse=False) if id(param) in hooked]
            if owned:
                self._handles.append(module.register_forward_pre_hook(_count_run(me, owned)))

    def detach(self) -> None:
        """Take the hooks off the model."""
        _remove(self._handles)
        self._start_step()

    def end_step(self) -> None:
        """Called by `optimizer.step()` when it is done."""
        self._start_step()

    def grad_norm(self) -> Tensor | None:
        """Norm of this step's whole gradient, a 0-dimensional tensor; asked before `optimizer.step()`.

        `None` where there was no gradient.
        """
        optimizer = self._optimizer()
        groups = optimizer.param_groups if optimizer is not None else []
        left = [param.grad for group in groups for param in group["params"] if param.grad is not None]
        norms = [*self._norms.values(), *map(_norm, left)]
        if not norms:
            return None
        return _norm(torch.stack([norm.to(norms[0].device) for norm in norms]))

    def _start_step(self) -> None:
        self._runs.clear()
        self._norms.clear()

    def _on_gradient(self, param: Tensor, group_index: int) -> None:
        optimizer = self._optimizer()
        if optimizer is None or param.grad is None:
            return
        if id(param) in self._norms:
            raise RuntimeError(
                f"A second gradient arrived for a parameter of shape {tuple(param.shape)} that this step's backward "
                "pass has already updated: backward ran twice before optimizer.step(), or a checkpointed segment "
                "used the parameter without calling its module. Call backward once a step, and use "
                "gradient_checkpointing_kwargs={'use_reentrant': False}; or use the optimizer without layerwise."
            )
        if self._runs[id(param)] > 1:
            return
        # Backward may run inside somebody's autocast; the update's precision is its own business.
        with torch.autocast(param.device.type, enabled=False):
            self._norms[id(param)] = _norm(param.grad)
            optimizer.update_parameter(param, optimizer.param_groups[group_index])
        param.grad = None


class _GradientHook:
    """A parameter's post-accumulate-grad hook; a class, so that `detach_all` can tell it from other hooks."""

    def __init__(self, hooks: weakref.ref[LayerwiseHooks], group_index: int) -> None:
        self.hooks = hooks
        # Not the group itself: loading a checkpoint makes new ones, and schedulers move those.
        self.group_index = group_index

    def __call__(self, param: Tensor) -> None:
        hooks = self.hooks()
        if hooks is not None:
            hooks._on_gradient(param, self.group_index)


def detach_all(model: nn.Module) -> None:
    """Take every layerwise hook off the parameters of `model`, whichever optimizer it serves."""
    for param in model.parameters():
        for hook in list((getattr(param, "_post_accumulate_grad_hooks", None) or {}).values()):
            owner = hook.hooks() if isinstance(hook, _GradientHook) else None
            if owner is not None:
                owner.detach()


def _count_run(me: weakref.ref[LayerwiseHooks], owned: list[int]) -> Callable[[nn.Module, Any], None]:
    def count(module: nn.Module, args: Any) -> None:
        hooks = me()
        # Recomputation during the backward pass is the same run again, and evaluation is none.
        if hooks is not None and module.training and not _in_backward():
            hooks._runs.update(owned)

    return count


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def _norm(gradient: Tensor) -> Tensor:
    return gradient.norm(dtype=torch.promote_types(gradient.dtype, torch.float32))


def _remove(handles: list[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()
    handles.clear()
