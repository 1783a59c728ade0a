"""Hooks into the backward pass: layerwise updates, low-rank accumulation, and the projected backward's gradients.

The optimizer stays an ordinary one: its `param_groups` are what schedulers move and its `state` is what checkpoints
hold. The hooks either update a weight as soon as its gradient appears, or hold its low-rank gradient for `step()`:

===============================  ===================================================
situation                        what happens to a target's low-rank gradient R
===============================  ===================================================
layerwise, one micro-batch,      the weight is updated at once, nothing is held
nothing held on request
accumulation window              R of the micro-batches adds up (projection is linear)
`hold_gradients` (clipping)      R is held
layer run more than once         R of the runs adds up
not layerwise                    R is held (there is only a projected backward)
===============================  ===================================================

The basis is fixed within a window. A refresh that is due happens at its first micro-batch, from that micro-batch's
whole gradient, which autograd builds for that one layer; the projected backward serves the others.
"""

from __future__ import annotations

import functools
import weakref
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from accelerate.state import GradientState
from torch import Tensor, nn

from .backward import ProjectedLinear, patch_linear, why_not_patchable
from .groups import Group, is_target
from .log import logger
from .projection import Bases, FactoredGradient, Gradient, norm_of, project, side_of

if TYPE_CHECKING:
    from .base import GaLoreOptimizer


class BackwardHooks:
    """Hooks on a model that hand gradients to an optimizer during the backward pass.

    They go with the optimizer, with `optimizer.close()`, and when another optimizer's hooks take the model over.

    Args:
        optimizer: updates the parameters; referred to weakly.
        model: whose modules own the parameters; referred to weakly.
        layerwise: whether weights are updated during the backward pass.
        projected_backward: whether linear targets compute R without building their gradient.
        hold_gradients: whether layerwise keeps R until `step()`.
    """

    def __init__(
        self,
        optimizer: GaLoreOptimizer,
        model: nn.Module,
        *,
        layerwise: bool,
        projected_backward: bool,
        hold_gradients: bool,
    ) -> None:
        self.layerwise = layerwise
        self.projected_backward = projected_backward
        self.hold_gradients = hold_gradients
        self._optimizer = weakref.ref(optimizer)
        self._model = weakref.ref(model)
        self._handles: list[Any] = []  # each with a remove()
        # A model outlives its trainers: hooks must not outlive theirs.
        self._finalizer = weakref.finalize(self, _remove, self._handles)
        self._group_index: dict[int, int] = {}  # of each hooked parameter, by its id
        self._said_why_not = False
        # Of the present window, by the parameter's id:
        self._runs: Counter[int] = Counter()  # of the modules that own it
        self._held: dict[int, Tensor] = {}  # R so far
        self._norms: dict[int, Tensor] = {}  # of the whole gradient, or of the R of an update that is done
        self._refreshed: set[int] = set()
        self._put_off: set[int] = set()  # the refresh failed: the window is lost
        self._updated: set[int] = set()
        self._accumulating = False  # the window has more than one micro-batch
        self.attach()

    # ---- on and off the model

    @property
    def attached(self) -> bool:
        """Whether the hooks are on the model."""
        return bool(self._handles)

    def attach(self) -> None:
        """Put the hooks on the model; takes those of any other optimizer off first. Does nothing if they are on."""
        optimizer, model = self._optimizer(), self._model()
        if self.attached or optimizer is None or model is None:
            return
        detach_all(model)
        me = weakref.ref(self)
        targets: set[int] = set()
        self._group_index.clear()
        for index, group in enumerate(optimizer.param_groups):
            for param in group["params"]:
                if not param.requires_grad:
                    continue
                if is_target(param, group):
                    targets.add(id(param))
                elif not self.layerwise:
                    continue
                self._group_index[id(param)] = index
                self._handles.append(param.register_post_accumulate_grad_hook(_GradientHook(me)))
        not_served: dict[str, str] = {}
        for name, module in model.named_modules():
            owned = tuple(id(param) for param in module.parameters(recurse=False) if id(param) in self._group_index)
            if not owned:
                continue
            self._handles.append(module.register_forward_pre_hook(_RunCounter(me, weakref.ref(module), owned)))
            if self.projected_backward and targets.intersection(owned):
                reason = why_not_patchable(module)
                if reason is None:
                    self._handles.append(patch_linear(module, me))
                else:
                    not_served[name] = reason
        self._say_why_not(not_served)

    def detach(self) -> None:
        """Take the hooks off the model, and forget what they hold."""
        _remove(self._handles)
        self.start_window()

    def _say_why_not(self, not_served: dict[str, str]) -> None:
        if not_served and not self._said_why_not:
            self._said_why_not = True
            name, reason = next(iter(not_served.items()))
            others = f", nor {len(not_served) - 1} other(s)" if len(not_served) > 1 else ""
            logger.info(
                "The projected backward cannot serve %s (%s)%s: gradients are built there.", name, reason, others
            )

    # ---- what the optimizer asks

    @property
    def has_updated(self) -> bool:
        """Whether weights have been updated in the present window."""
        return bool(self._updated)

    def held(self) -> list[Tensor]:
        """The low-rank gradients held."""
        return list(self._held.values())

    def norms(self) -> list[Tensor]:
        """Norms of what is held and of what updates have used in this window, one a parameter."""
        known = list(self._norms.values())
        return known + [norm_of(held) for key, held in self._held.items() if key not in self._norms]

    def take_held(self, param: Tensor) -> Tensor | None:
        """The low-rank gradient held for a parameter, which is forgotten."""
        return self._held.pop(id(param), None)

    def start_window(self) -> None:
        """Forget everything about the window that is over."""
        self.forget_gradients()
        self._runs.clear()

    def forget_gradients(self) -> None:
        """Forget what the backward passes of this window brought; a forward pass may have begun the next."""
        for of_window in (self._held, self._norms, self._refreshed, self._put_off, self._updated):
            of_window.clear()
        self._accumulating = False

    # ---- what autograd brings

    def serves(self, weight: Tensor) -> bool:
        """Whether the projected backward is for this weight: not for a copy of it, nor after `detach()`."""
        return id(weight) in self._group_index and self.attached

    def take(self, weight: Tensor, output_gradient: Tensor, inputs: Tensor) -> Callable[[], None] | None:
        """Use δ (T × m) and X (T × n) of one run of a target's layer; `None` where autograd has to build G.

        What is returned updates the weight, if that is to happen now.
        """
        optimizer, group = self._optimizer_and_group(weight)
        if optimizer is None or group is None:
            return None
        refresh = self._refresh_due(optimizer, weight, group)
        if refresh and not self._refreshes_from_factors(optimizer, weight, group, len(inputs)):
            return None
        self._check_first_update(weight)
        if id(weight) in self._put_off:
            return _nothing
        with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
            gradient = FactoredGradient(output_gradient, inputs)
            held = self._held.get(id(weight))
            if held is not None:
                project(gradient, optimizer.bases_of(weight, group), out=held)
                self._norms.pop(id(weight), None)
                return _nothing
            low_rank = self._project(optimizer, weight, group, gradient, refresh)
        if low_rank is None:
            return _nothing
        return functools.partial(self.take_low_rank, weight, low_rank.to(weight.dtype))

    def count_run(self, weight: Tensor) -> None:
        """Note that a forward pass uses a weight without running its module, as a fused loss uses the head's."""
        if id(weight) in self._group_index:
            self._runs[id(weight)] += 1

    def bases_for_rows(self, weight: Tensor) -> Bases | None:
        """The bases that rows of a gradient can be projected with by themselves; `None` where autograd has to build it.

        Only a projection of the right side takes rows by themselves, and only between refreshes.
        """
        optimizer, group = self._optimizer_and_group(weight)
        if optimizer is None or group is None or not self.projected_backward or not is_target(weight, group):
            return None
        if side_of(weight.shape, group["proj_type"]) != "right" or id(weight) in self._put_off:
            return None
        if self._refresh_due(optimizer, weight, group):
            return None
        return optimizer.bases_of(weight, group)

    def take_low_rank(self, weight: Tensor, low_rank: Tensor) -> None:
        """Use the R of one run of a target's layer."""
        optimizer, group = self._optimizer_and_group(weight)
        assert optimizer is not None
        assert group is not None
        self._check_first_update(weight)
        with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
            self._add(optimizer, weight, group, low_rank, norm=None)

    def _refreshes_from_factors(self, optimizer: GaLoreOptimizer, weight: Tensor, group: Group, tokens: int) -> bool:
        # With several runs this is the gradient of one of them only: autograd sums them all.
        return self._runs[id(weight)] == 1 and optimizer.refreshes_from_factors(weight, group, tokens)

    def on_gradient(self, param: Tensor) -> None:
        """Use a gradient that autograd has put into `param.grad`."""
        optimizer, group = self._optimizer_and_group(param)
        if optimizer is None or group is None or param.grad is None:
            return
        if is_target(param, group):
            # Backward may run inside somebody's autocast; the update's precision is its own business.
            with torch.no_grad(), torch.autocast(param.device.type, enabled=False):
                self._on_target_gradient(optimizer, param, group, param.grad)
        elif not self._must_hold(param):
            self._check_first_update(param)
            with torch.autocast(param.device.type, enabled=False):
                self._norms[id(param)] = norm_of(param.grad)
                optimizer.update_parameter(param, group)
            self._updated.add(id(param))
            param.grad = None

    def _on_target_gradient(self, optimizer: GaLoreOptimizer, param: Tensor, group: Group, gradient: Tensor) -> None:
        key = id(param)
        refresh = self._refresh_due(optimizer, param, group)
        if refresh and self._runs[key] > 1:
            return  # it may be the gradient of one run only: let it gather for step(), and take the basis from the sum
        self._check_first_update(param)
        param.grad = None
        if key in self._put_off:
            return
        low_rank = self._project(optimizer, param, group, gradient, refresh)
        if low_rank is None:
            return
        # With a projected backward the others' norms are those of R: be consistent.
        norm = None if self.projected_backward or key in self._held else norm_of(gradient)
        self._add(optimizer, param, group, low_rank, norm)

    def _project(
        self, optimizer: GaLoreOptimizer, param: Tensor, group: Group, gradient: Gradient, refresh: bool
    ) -> Tensor | None:
        """R, noting whether its refresh has happened or, with `None`, was put off."""
        low_rank = optimizer.project_gradient(param, group, gradient, refresh=refresh)
        if low_rank is None:
            self._put_off.add(id(param))
            self._held.pop(id(param), None)
        elif refresh:
            self._refreshed.add(id(param))
        return low_rank

    def _add(
        self, optimizer: GaLoreOptimizer, param: Tensor, group: Group, low_rank: Tensor, norm: Tensor | None
    ) -> None:
        held = self._held.get(id(param))
        if held is not None:
            held.add_(low_rank)
            self._norms.pop(id(param), None)  # that of the first part, no longer of the whole
        else:
            self._use_or_hold(optimizer, param, group, low_rank, norm)

    def _use_or_hold(
        self, optimizer: GaLoreOptimizer, param: Tensor, group: Group, low_rank: Tensor, norm: Tensor | None
    ) -> None:
        if self._must_hold(param):
            self._held[id(param)] = low_rank
            if norm is not None:
                self._norms[id(param)] = norm
            return
        low_rank_norm = norm_of(low_rank)
        self._norms[id(param)] = low_rank_norm if norm is None else norm
        optimizer.update_low_rank(param, group, low_rank, low_rank_norm)
        self._updated.add(id(param))

    def _must_hold(self, param: Tensor) -> bool:
        # accelerate knows whether this micro-batch closes the window; the last of several holds as the others did.
        self._accumulating = self._accumulating or not GradientState().sync_gradients
        return not self.layerwise or self.hold_gradients or self._accumulating or self._runs[id(param)] > 1

    def _refresh_due(self, optimizer: GaLoreOptimizer, param: Tensor, group: Group) -> bool:
        return id(param) not in self._refreshed and optimizer.refresh_due(param, group)

    def _check_first_update(self, param: Tensor) -> None:
        if id(param) in self._updated:
            optimizer = self._optimizer()
            name = "a parameter" if optimizer is None else optimizer.name_of(param)
            raise RuntimeError(
                f"A second gradient arrived for {name}, which this step's backward pass has already updated: backward "
                "ran twice before optimizer.step(), or a checkpointed segment used the weight without calling its "
                "module. Make the optimizer with hold_gradients=True (a Trainer does for max_grad_norm above 0), or "
                "call backward once a step."
            )

    def _optimizer_and_group(self, param: Tensor) -> tuple[GaLoreOptimizer | None, Group | None]:
        optimizer, index = self._optimizer(), self._group_index.get(id(param))
        if optimizer is None or index is None:
            return None, None
        # By index: loading a checkpoint makes new groups, and schedulers move those.
        return optimizer, optimizer.param_groups[index]


class _GradientHook:
    """A parameter's post-accumulate-grad hook; a class, so that `detach_all` can tell it from other hooks."""

    def __init__(self, hooks: weakref.ref[BackwardHooks]) -> None:
        self.hooks = hooks

    def __call__(self, param: Tensor) -> None:
        hooks = self.hooks()
        if hooks is not None:
            hooks.on_gradient(param)


def detach_all(model: nn.Module) -> None:
    """Take the hooks of every GaLore optimizer off `model`."""
    refs: list[weakref.ref[Any]] = [hook.hooks for param in model.parameters() for hook in _hooks_on(param)]
    refs += [module._galore_sink for module in model.modules() if isinstance(module, ProjectedLinear)]
    for ref in refs:
        owner = ref()
        if isinstance(owner, BackwardHooks):
            owner.detach()


def hooks_on(param: Tensor) -> BackwardHooks | None:
    """What looks after a parameter's gradient during the backward pass, if anything does."""
    owners = (hook.hooks() for hook in _hooks_on(param))
    return next((owner for owner in owners if owner is not None and owner.serves(param)), None)


def _hooks_on(param: Tensor) -> list[_GradientHook]:
    hooks = getattr(param, "_post_accumulate_grad_hooks", None) or {}
    return [hook for hook in hooks.values() if isinstance(hook, _GradientHook)]


class _RunCounter:
    """A module's forward pre-hook: counts the runs of the parameters that it owns."""

    def __init__(
        self, hooks: Callable[[], BackwardHooks | None], module: Callable[[], nn.Module | None], owned: tuple[int, ...]
    ) -> None:
        self.hooks = hooks
        self.module = module
        self.owned = owned

    def __call__(self, module: nn.Module, args: Any) -> None:
        hooks = self.hooks()
        if hooks is None or module is not self.module():  # a copy of the module has this hook too
            return
        # Recomputation during the backward pass is the same run again, and evaluation is none.
        if module.training and not _in_backward():
            hooks._runs.update(self.owned)

    def __reduce__(self) -> Any:
        return _RunCounter, (_gone, _gone, ())  # weak references cannot be pickled


def _nothing() -> None:
    """What is left to do where all is done."""


def _gone() -> None:
    """What a dead weak reference returns."""


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def _remove(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()
    handles.clear()
