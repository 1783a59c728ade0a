"""Hooks into the backward pass: layerwise updates, low-rank accumulation, and the projected backward's gradients.

The optimizer stays an ordinary one: its `param_groups` are what schedulers move and its `state` is what checkpoints
hold. Autograd sums up what all uses of a weight in a backward pass contribute; then the weight's hook either updates it
at once, or leaves its low-rank gradient in `.grad` for `step()` (`hf_galore.backward.gradient`):

===============================  ===================================================
situation                        what happens to a target's low-rank gradient R
===============================  ===================================================
layerwise, one micro-batch,      the weight is updated at once; `.grad` says that the
nothing held on request          gradient has been used
accumulation window              R of the micro-batches adds up (projection is linear)
`hold_gradients` (clipping)      R is held
weight used by several           R of the segments adds up
reentrant checkpoints
not layerwise                    R is held (there is only a projected backward)
===============================  ===================================================

The basis is fixed within a window. A refresh that is due happens at its first micro-batch whose gradient is not zero,
from that micro-batch's whole gradient, which autograd builds for that one layer; the projected backward serves the
others. Of a backward pass whose gradients are dropped (`.grad = None`) before `step()`, nothing stays, nor does a
refresh.
"""

from __future__ import annotations

import dataclasses
import sys
import weakref
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from accelerate.state import GradientState
from torch import Tensor, nn

from ..log import logger
from ..lowrank.projection import Bases, FactoredGradient, norm_of, project, side_of
from ..optim.bases import Before
from ..optim.groups import Group, is_target
from .gradient import LowRankGradient, UncommittedRefresh, UsedGradient, in_backward
from .linear import ProjectedLinear, patch_linear, why_not_patchable

if TYPE_CHECKING:
    from ..optim.optimizer import GaLoreOptimizer


@dataclasses.dataclass(slots=True)
class _Window:
    """What the hooks have done with one parameter since the last step."""

    filled: bool = False
    """Whether they have left a low-rank gradient in `.grad`."""
    before: Before | None = None
    """The basis before this window's refresh."""
    updated: bool = False
    norm: Tensor | None = None
    """Of the gradient that the weight was updated with."""


class BackwardHooks:
    """Hooks on a model that hand gradients to an optimizer during the backward pass.

    They go with the optimizer, with `optimizer.close()`, and when another optimizer's hooks take the model over.

    Args:
        optimizer: updates the parameters; referred to weakly.
        model: whose modules own the parameters; referred to weakly.
        layerwise: whether weights are updated during the backward pass.
        projected_backward: whether linear targets compute R without building their gradient.
        hold_gradients: whether layerwise keeps R until `step()`.

    Raises:
        ValueError: torch.distributed runs more than one process.
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
        self._counted: set[int] = set()  # modules that have a counter, by their ids
        self._used: dict[int, UsedGradient] = {}  # by the parameter's id
        self._said_why_not = False
        self._said_dropped = False
        # Weights that more than one module or function has used in one backward pass, by their ids.
        self._shared: set[int] = set()
        # Of the present window, by the parameter's id:
        self._windows: dict[int, _Window] = {}
        # Reentrant checkpoints that use it, each a backward pass of its own: their nodes, which go with their graphs.
        self._segments: dict[int, list[Callable[[], Any]]] = {}
        self._outside: set[int] = set()  # used outside of them
        self._accumulating = False  # the window has more than one micro-batch
        self.check_processes()
        self.attach()

    def check_processes(self) -> None:
        """Check that no other process trains the same model.

        Raises:
            ValueError: torch.distributed runs more than one process.
        """
        distributed = torch.distributed
        if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
            raise ValueError(
                f"layerwise=True and projected_backward=True do not work with {distributed.get_world_size()} "
                "processes: low-rank gradients are not reduced over them, and the processes' weights would drift "
                "apart. Launch one process, or make the optimizer with layerwise=False and projected_backward=False, "
                "which trains under DistributedDataParallel."
            )

    # ---- on and off the model

    @property
    def attached(self) -> bool:
        """Whether the hooks are on the model."""
        return bool(self._handles)

    def attach(self) -> None:
        """Put the hooks on the model; takes those of any other optimizer off first. Does nothing if they are on."""
        model = self._model()
        if self.attached or self._optimizer() is None or model is None:
            return
        detach_all(model)
        self._group_index.clear()
        self._counted.clear()
        self.attach_new()

    def attach_new(self) -> None:
        """Put hooks on parameters that have none yet: of a new group, or frozen until now."""
        optimizer, model = self._optimizer(), self._model()
        if optimizer is None or model is None:
            return
        me = weakref.ref(self)
        targets: set[int] = set()
        for index, group in enumerate(optimizer.param_groups):
            for param in group["params"]:
                target = is_target(param, group)
                if not param.requires_grad or id(param) in self._group_index or not (target or self.layerwise):
                    continue
                if target:
                    targets.add(id(param))
                self._group_index[id(param)] = index
                self._handles.append(param.register_post_accumulate_grad_hook(_GradientHook(me)))
        not_served: dict[str, str] = {}
        for name, module in model.named_modules():
            owned = tuple(id(param) for param in module.parameters(recurse=False) if id(param) in self._group_index)
            if not owned:
                continue
            if id(module) not in self._counted:
                self._counted.add(id(module))
                self._handles.append(module.register_forward_pre_hook(_RunCounter(me, weakref.ref(module))))
            if self.projected_backward and targets.intersection(owned) and not isinstance(module, ProjectedLinear):
                reason = why_not_patchable(module)
                if reason is None:
                    self._handles.append(patch_linear(module, me))
                else:
                    not_served[name] = reason
        self._say_why_not(not_served)

    def lacks_hooks(self, param: Tensor, group: Group) -> bool:
        """Whether a parameter should have a hook and has none."""
        return (
            param.requires_grad and id(param) not in self._group_index and (self.layerwise or is_target(param, group))
        )

    def detach(self) -> None:
        """Take the hooks off the model, and forget what they hold."""
        self.drop_gradients()
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
        return any(isinstance(param.grad, UsedGradient) for param in self._params())

    def held(self) -> list[Tensor]:
        """The low-rank gradients held."""
        gradients = (param.grad for param in self._params())
        return [gradient.low_rank for gradient in gradients if isinstance(gradient, LowRankGradient)]

    def norms(self) -> list[Tensor]:
        """The norms of the gradients that updates have used in this window, one a parameter."""
        windows = self._windows.values()
        return [window.norm for window in windows if window.updated and window.norm is not None]

    def before(self, param: Tensor) -> Before | None:
        """The basis before the refresh of this window, where there was one and its gradient has not been dropped."""
        return self._look(param).before if id(param) in self._windows else None

    def check_not_dropped(self) -> None:
        """Check that what updates have used in this window is what the step is meant to be made with.

        Raises:
            RuntimeError: somebody has dropped gradients after the backward pass had updated weights with them.
        """
        for param in self._params():
            window, gradient = self._windows.get(id(param)), param.grad
            if window is None or not window.updated:
                continue
            if not isinstance(gradient, UsedGradient) or gradient.was_zeroed:
                optimizer = self._optimizer()
                name = "a weight" if optimizer is None else optimizer.name_of(param)
                raise RuntimeError(
                    f"The gradient of {name} was dropped or replaced before step(), but the backward pass had updated "
                    "the weight with it already. To look at gradients before they are used, make the layerwise "
                    "optimizer with hold_gradients=True (with a Trainer: max_grad_norm above 0)."
                )

    def start_window(self) -> None:
        """Forget everything about the window that is over."""
        for param in self._params():
            if isinstance(param.grad, UsedGradient):
                param.grad = None
        self._windows.clear()
        self._segments.clear()
        self._outside.clear()
        self._accumulating = False

    def drop_gradients(self) -> None:
        """Forget what the backward passes of this window brought; a forward pass may have begun the next."""
        for param in self._params():
            if isinstance(param.grad, (LowRankGradient, UsedGradient)):
                param.grad = None
            if id(param) in self._windows:
                self._look(param)
        self._windows.clear()
        self._accumulating = False
        for key, nodes in self._segments.items():
            self._segments[key] = [node for node in nodes if node() is not None]

    def look(self) -> None:
        """Look whether somebody has dropped what the hooks left in `.grad`, and take back what came of it."""
        for param in self._params():
            if id(param) in self._windows:
                self._look(param)

    def _params(self) -> list[Tensor]:
        optimizer = self._optimizer()
        return [] if optimizer is None else [p for group in optimizer.param_groups for p in group["params"]]

    def _look(self, param: Tensor) -> _Window:
        """The window of a parameter, after looking whether somebody has dropped what the hooks left in `.grad`."""
        window = self._windows.get(id(param))
        if window is None:
            window = self._windows[id(param)] = _Window()
            return window
        gradient = param.grad
        if window.updated:
            used = isinstance(gradient, UsedGradient)
            if not used or (isinstance(gradient, UsedGradient) and gradient.was_zeroed):
                self._say_dropped(param)
                self._windows[id(param)] = window = _Window()
        elif window.filled and (not isinstance(gradient, LowRankGradient) or gradient.is_zero):
            optimizer, group = self._optimizer_and_group(param)
            if window.before is not None and optimizer is not None and group is not None:
                optimizer.take_back_refresh(param, group, window.before)
            self._windows[id(param)] = window = _Window()
        return window

    def _say_dropped(self, param: Tensor) -> None:
        optimizer = self._optimizer()
        if not self._said_dropped and optimizer is not None:
            self._said_dropped = True
            logger.warning(
                "The gradients of a backward pass were dropped, but a layerwise optimizer had updated weights with "
                "them already (%s for one), and these stay. To be able to drop them make the optimizer with "
                "hold_gradients=True (with a Trainer: max_grad_norm above 0). This is said once.",
                optimizer.name_of(param),
            )

    # ---- what autograd brings

    def serves(self, weight: Tensor) -> bool:
        """Whether the projected backward is for this weight: not for a copy of it, nor after `detach()`."""
        return id(weight) in self._group_index and self.attached

    def gradient_of(self, weight: Tensor, output_gradient: Tensor, inputs: Tensor) -> Tensor | None:
        """The low-rank gradient from δ (T × m) and X (T × n) of one use of a target; `None` where G is needed."""
        optimizer, group = self._optimizer_and_group(weight)
        if optimizer is None or group is None or self._needs_whole(weight):
            return None
        factors = FactoredGradient(output_gradient, inputs)
        with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
            if not self._refresh_due(optimizer, weight, group):
                low_rank = project(factors, optimizer.bases_of(weight, group))
                return LowRankGradient(weight, low_rank.to(weight.dtype), optimizer.basis_version(weight, group))
            # With several uses each would be a refresh, and none that of the sum.
            shared = id(weight) in self._shared or self._passes(weight) > 1
            if shared or not optimizer.refreshes_from_factors(weight, group, len(inputs)):
                return None
            made = optimizer.new_basis(weight, group, factors)
            low_rank = made.low_rank.to(weight.dtype)
            if not made.usable:
                version = optimizer.basis_version(weight, group)
                return LowRankGradient(weight, low_rank, version, is_zero=made.is_zero, is_lost=not made.is_zero)
            uncommitted = UncommittedRefresh(made, lambda: self._whole(weight, factors))
            return LowRankGradient(weight, low_rank, optimizer.new_version(weight, group), uncommitted=uncommitted)

    def _whole(self, weight: Tensor, factors: FactoredGradient) -> Tensor:
        self._shared.add(id(weight))
        return (factors.output_gradient.mT @ factors.inputs).to(weight.dtype)

    def _needs_whole(self, weight: Tensor) -> bool:
        """Whether somebody else needs the gradient as it is: a hook on the weight, or one that is there already."""
        return bool(weight._backward_hooks) or not (
            weight.grad is None or isinstance(weight.grad, (LowRankGradient, UsedGradient))
        )

    def bases_for_rows(self, weight: Tensor) -> Bases | None:
        """The bases that rows of a gradient can be projected with by themselves; `None` where autograd has to build it.

        Only a projection of the right side takes rows by themselves, and only between refreshes.
        """
        optimizer, group = self._optimizer_and_group(weight)
        if optimizer is None or group is None or not self.projected_backward or not is_target(weight, group):
            return None
        if side_of(weight.shape, group["proj_type"]) != "right" or self._needs_whole(weight):
            return None
        if self._refresh_due(optimizer, weight, group):
            return None
        return optimizer.bases_of(weight, group)

    def of_rows(self, weight: Tensor, low_rank: Tensor) -> LowRankGradient:
        """The low-rank gradient whose rows were projected with `bases_for_rows`."""
        optimizer, group = self._optimizer_and_group(weight)
        assert optimizer is not None
        assert group is not None
        return LowRankGradient(weight, low_rank, optimizer.basis_version(weight, group))

    def on_gradient(self, param: Tensor) -> None:
        """Use the gradient that autograd has put into `param.grad`."""
        optimizer, group = self._optimizer_and_group(param)
        # With create_graph=True the gradient is part of a graph that is still needed, as it is.
        if optimizer is None or group is None or param.grad is None or torch.is_grad_enabled():
            return
        # Backward may run inside somebody's autocast; the update's precision is its own business.
        with torch.no_grad(), torch.autocast(param.device.type, enabled=False):
            window = self._look(param)
            if isinstance(param.grad, UsedGradient):
                param.grad = param.grad.addend
            if is_target(param, group):
                self._on_target_gradient(optimizer, param, group, window)
            elif not self._must_hold(param):
                assert param.grad is not None
                window.norm = norm_of(param.grad)
                optimizer.update_parameter(param, group)
                self._leave_used(optimizer, param, window)

    def _on_target_gradient(self, optimizer: GaLoreOptimizer, param: Tensor, group: Group, window: _Window) -> None:
        gradient = param.grad
        assert gradient is not None
        if not isinstance(gradient, LowRankGradient) or gradient.addend is not None:
            if self._passes(param) > 1 and self._refresh_due(optimizer, param, group):
                return  # it is that of one segment only: step() takes the basis from the sum
            whole = gradient.addend if isinstance(gradient, LowRankGradient) else gradient
            assert whole is not None
            param.grad = gradient = None
            gradient = self._project(optimizer, param, group, whole, window)
            del whole
        elif gradient.uncommitted is not None:
            made, gradient.uncommitted = gradient.uncommitted.made, None
            window.before = optimizer.use_basis(param, group, made, gradient.basis, keep=self._must_hold(param))
        if self._must_hold(param):
            window.filled = True
            if param.grad is not gradient:
                param.grad = gradient
            return
        param.grad = None
        low_rank_norm = norm_of(gradient.low_rank)
        window.norm = low_rank_norm if gradient.norm_of_whole is None else gradient.norm_of_whole
        optimizer.update_low_rank(param, group, gradient.low_rank, low_rank_norm, before=window.before)
        window.before = None
        self._leave_used(optimizer, param, window)

    def _project(
        self, optimizer: GaLoreOptimizer, param: Tensor, group: Group, whole: Tensor, window: _Window
    ) -> LowRankGradient:
        """The low-rank gradient of G, with a new basis from it where that is due."""
        # With a projected backward the others' norms are those of R: be consistent.
        norm = None if self.projected_backward else norm_of(whole)
        if not self._refresh_due(optimizer, param, group):
            low_rank = project(whole, optimizer.bases_of(param, group))
            return LowRankGradient(param, low_rank, optimizer.basis_version(param, group), norm=norm)
        made = optimizer.new_basis(param, group, whole)
        if made.usable:
            version = optimizer.new_version(param, group)
            window.before = optimizer.use_basis(param, group, made, version, keep=self._must_hold(param))
        return LowRankGradient(
            param,
            made.low_rank,
            optimizer.basis_version(param, group),
            norm=norm,
            is_zero=made.is_zero,
            is_lost=not (made.usable or made.is_zero),
        )

    def _leave_used(self, optimizer: GaLoreOptimizer, param: Tensor, window: _Window) -> None:
        window.updated = True
        used = self._used.get(id(param))
        if used is None or used.device != param.device or used.dtype != param.dtype or used.shape != param.shape:
            used = self._used[id(param)] = UsedGradient(param, optimizer.name_of(param))
        used.start(window.norm)
        param.grad = used

    def _must_hold(self, param: Tensor) -> bool:
        # accelerate knows whether this micro-batch closes the window; the last of several holds as the others did.
        self._accumulating = self._accumulating or not GradientState().sync_gradients
        return not self.layerwise or self.hold_gradients or self._accumulating or self._passes(param) > 1

    def _passes(self, param: Tensor) -> int:
        """How many backward passes bring a parameter gradients, for one micro-batch."""
        segments = sum(node() is not None for node in self._segments.get(id(param), ()))
        return max(1, segments + (segments > 0 and id(param) in self._outside))

    def _refresh_due(self, optimizer: GaLoreOptimizer, param: Tensor, group: Group) -> bool:
        return self._look(param).before is None and optimizer.refresh_due(param, group)

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
    """A module's forward pre-hook: counts the backward passes that will bring its parameters gradients.

    Autograd sums up the uses of a weight within one backward pass. But a reentrant checkpoint runs its segment in a
    function's forward, without a graph, and later in a backward pass of its own.
    """

    def __init__(self, hooks: Callable[[], BackwardHooks | None], module: Callable[[], nn.Module | None]) -> None:
        self.hooks = hooks
        self.module = module

    def __call__(self, module: nn.Module, args: Any) -> None:
        hooks = self.hooks()
        if hooks is None or module is not self.module():  # a copy of the module has this hook too
            return
        # Recomputation during the backward pass is the same run again.
        if in_backward():
            return
        owned = [id(param) for param in module._parameters.values() if param is not None]
        if torch.is_grad_enabled():
            hooks._outside.update(owned)
        elif _in_function_forward():
            node = _present_node()
            for key in owned:
                hooks._segments.setdefault(key, []).append(node)

    def __reduce__(self) -> Any:
        return _RunCounter, (_gone, _gone)  # weak references cannot be pickled


def _gone() -> None:
    """Return what a dead weak reference returns."""


def _in_function_forward() -> bool:
    """Whether this is the forward of an autograd function, which, unlike no_grad, turns off forward-mode gradients."""
    return not torch._C._is_fwd_grad_enabled() and not torch.is_inference_mode_enabled()


def _present_node() -> Callable[[], Any]:
    """A weak reference to the node of the autograd function whose forward this is.

    It goes with its graph: at once where somebody's no_grad makes none. One that cannot be found stays for the window.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_name == "forward" and code.co_varnames[:1] == ("ctx",):
            try:
                return weakref.ref(frame.f_locals["ctx"])
            except TypeError:
                break
        frame = frame.f_back
    return _a_node


def _a_node() -> bool:
    return True


def _remove(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()
    handles.clear()
