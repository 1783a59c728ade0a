"""Hooks into the backward pass: they hand gradients to the windows of an optimizer's parameters.

The optimizer stays an ordinary one: its `param_groups` are what schedulers move and its `state` is what checkpoints
hold. Autograd sums up what all uses of a weight in a backward pass contribute; then the weight's hook gives that to its
window, which uses it at once or leaves it for `step()` (`hf_galore.backward.window`).
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor, nn

from ..config import Exchange as ExchangeName
from ..lowrank.products import FactoredGradient, GroupedGradient
from ..lowrank.projection import Bases
from ..lowrank.rows import EmbeddingGradient
from .attached import GradientHook, detach_all, gradient_hooks_on
from .gradient import LowRankGradient
from .mode import Mode
from .notices import Notices, is_compiled
from .passes import PassCounter, Passes
from .patched import Patched
from .served import may_be_served, patched, tied_embeddings
from .whole_window import check_may_hold, instead_of_using, window_for
from .window import Window
from .wrapped import Wrappers

if TYPE_CHECKING:
    from ..optim.bases import Before
    from ..optim.trained import Trained


class Source(Protocol):
    """What hooks need of an optimizer."""

    param_groups: list[dict[str, Any]]

    def trained_parameters(self) -> list[Trained]:
        """What each of its parameters is."""

    def trained(self, param: Tensor) -> Trained:
        """What one of them is; a `ValueError` where it is none."""


class BackwardHooks:
    """Hooks on a model that hand gradients to an optimizer's parameters during the backward pass.

    They go with the optimizer, with `optimizer.close()`, and when another optimizer's hooks take the model over.

    Args:
        optimizer: whose parameters they are for; referred to weakly.
        model: whose modules own the parameters. It may be one that nothing else refers to, such as an `nn.ModuleList`
            of two models.
        layerwise: whether weights are updated during the backward pass.
        projected_backward: whether linear targets compute R without building their gradient.
        hold_gradients: whether layerwise keeps R until `step()`.
        exchange: what processes reduce, where the model is in `DistributedDataParallel`.
    """

    def __init__(
        self,
        optimizer: Source,
        model: nn.Module,
        *,
        layerwise: bool,
        projected_backward: bool,
        hold_gradients: bool,
        exchange: ExchangeName,
    ) -> None:
        self._mode = Mode(layerwise, projected_backward, hold_gradients)
        # Where the others' norms are those of what is held, estimates or R's: be consistent.
        self._mode.whole_norms = not projected_backward and exchange == "dense"
        self._optimizer = ref = weakref.ref(optimizer)
        self._model = model
        self._handles: list[Any] = []  # each with a remove()
        groups = lambda: [] if (optimizer := ref()) is None else optimizer.param_groups  # noqa: E731
        self._wrappers = Wrappers(model, self._handles, dense=exchange == "dense", groups=groups)
        # A model outlives its trainers: hooks must not outlive theirs.
        self._finalizer = weakref.finalize(self, _remove, self._handles)
        self._windows: dict[int, Window] = {}  # of each hooked parameter, by its id
        self._counted: set[int] = set()  # modules that have a counter, by their ids
        self._attached = False
        self.notices = Notices(layerwise=layerwise, projected_backward=projected_backward)
        self.attach()

    @property
    def layerwise(self) -> bool:
        """Whether weights are updated during the backward pass."""
        return self._mode.layerwise

    @property
    def projected_backward(self) -> bool:
        """Whether linear targets compute R without building their gradient."""
        return self._mode.projected_backward

    @property
    def hold_gradients(self) -> bool:
        """Whether layerwise keeps R until `step()`; may be set between steps."""
        return self._mode.hold_gradients

    @hold_gradients.setter
    def hold_gradients(self, value: bool) -> None:
        optimizer = self._optimizer()
        if value and self.layerwise and optimizer is not None:
            check_may_hold(optimizer.trained_parameters(), "hold_gradients=True", "Leave it out")
        self._mode.hold_gradients = value

    # ---- on and off the model

    @property
    def attached(self) -> bool:
        """Whether the hooks are on the model."""
        return self._attached

    def attach(self) -> None:
        """Put the hooks on the model; takes those of any other optimizer off first. Does nothing if they are on."""
        optimizer = self._optimizer()
        if self.attached or optimizer is None:
            return
        detach_all(self._model)
        self._attached = True
        self._wrappers.expect(trained.param for trained in optimizer.trained_parameters() if trained.projected)
        self.attach_new()

    def attach_new(self) -> None:
        """Put hooks on parameters that have none yet: of a new group, or frozen until now."""
        optimizer, model, me = self._optimizer(), self._model, weakref.ref(self)
        if optimizer is None:
            return
        self._mode.instead = instead_of_using(optimizer.trained_parameters())
        tied = tied_embeddings(model)
        for trained in self._lacking(optimizer.trained_parameters()):
            handle = trained.param.register_post_accumulate_grad_hook(GradientHook(me))
            self._handles.append(handle)
            self._windows[id(trained.param)] = window_for(trained, self._mode, handle, id(trained.param) in tied)
            self._wrappers.forget()
        not_served: dict[str, str] = {}
        outermost, projecting = self._wrappers.outermost, 0
        for name, module in model.named_modules():
            params = module.parameters(recurse=False)
            owned = [window for param in params if (window := self._windows.get(id(param))) is not None]
            if not owned and module not in outermost:
                continue
            if id(module) not in self._counted:
                self._counted.add(id(module))
                self._handles.append(PassCounter.on(module, me))
            served = [window for window in owned if may_be_served(module, window.trained)]
            if not self.projected_backward or not served:
                continue
            targets = [window.target for window in served if window.trained.projected]
            projecting += bool(targets)
            if isinstance(module, Patched):
                continue
            patch = patched(module, me, experts=any(target.is_stack_of_experts for target in targets))
            if not isinstance(patch, str):
                self._handles.append(patch)
            elif targets:
                not_served[name] = patch
        self.notices.not_served(not_served, projecting)
        if is_compiled(model):
            self.notices.compiled()

    def _lacking(self, parameters: list[Trained]) -> list[Trained]:
        """Those of the optimizer's parameters that should have a hook and have none."""
        return [
            trained
            for trained in parameters
            if trained.param.requires_grad
            and id(trained.param) not in self._windows
            and (self.layerwise or trained.projected)
            and not self._wrappers.is_left(trained.param)
        ]

    def detach(self) -> None:
        """Take the hooks off the model, and forget what they hold."""
        # What has updated weights is not dropped here: nobody is to believe that it could have been.
        updated = [window for window in self._present() if window.has_updated]
        if updated:
            self.notices.half_done(updated[0].trained.name)
        for window in updated:
            window.start()
        self.drop_gradients()
        _remove(self._handles)
        self._start_windows()
        self._wrappers.close()
        self._windows.clear()
        self._counted.clear()
        self._attached = False

    # ---- what the optimizer asks

    @property
    def has_updated(self) -> bool:
        """Whether weights have been updated in the present window."""
        return any(window.has_updated for window in self._present())

    def held(self) -> list[Tensor]:
        """What holds the low-rank gradients."""
        gradients = (window.param.grad for window in self._present())
        return [part for gradient in gradients if isinstance(gradient, LowRankGradient) for part in gradient.held()]

    def norms(self) -> list[Tensor]:
        """The norms of the gradients that updates have used in this window, one a parameter."""
        self._wrappers.end()
        return [window.norm for window in self._mode.touched.values() if window.norm is not None]

    def before(self, param: Tensor) -> Before | None:
        """The basis before the refresh of this window, where there was one and its gradient has not been dropped."""
        window = self._mode.touched.get(id(param))
        return None if window is None else window.before

    def check_before_step(self, parameters: list[Trained]) -> None:
        """Check that what updates have used in this window is what the step is meant to be made with.

        Args:
            parameters: what each of the optimizer's is by now.

        Raises:
            RuntimeError: gradients were dropped after the backward pass had updated weights with them; or are of this
                process, of several, alone.
        """
        self._renew(parameters)
        self._wrappers.end()
        self._wrappers.check(self._windows.values())
        for window in self._windows.values():
            if window.was_dropped:
                raise RuntimeError(
                    f"The gradient of {window.trained.name} was dropped or replaced before step(), but the backward "
                    "pass had updated the weight with it already. To look at gradients before they are used, make the "
                    f"layerwise optimizer with {self._mode.instead}."
                )
        self.look()

    def start_window(self, parameters: list[Trained]) -> None:
        """Forget everything about the window that is over, and put hooks on parameters that need one from now on."""
        self._start_windows()
        if self._attached and self._lacking(parameters):
            self.attach_new()

    def _start_windows(self) -> None:
        self._wrappers.start_window()
        for window in self._present():
            window.start()
        self._mode.start_window()

    def _present(self) -> list[Window]:
        """The windows, if their optimizer is still there."""
        return [] if self._optimizer() is None else list(self._windows.values())

    def _renew(self, parameters: list[Trained]) -> None:
        """Forget parameters that the optimizer no longer has, and learn what the others are by now."""
        present = {id(trained.param): trained for trained in parameters}
        for key, window in list(self._windows.items()):
            if key in present:
                window.trained = present[key]
            else:
                window.handle.remove()
                del self._windows[key]

    def drop_gradients(self) -> None:
        """Forget what the backward passes of this window brought; a forward pass may have begun the next."""
        self._wrappers.reset()
        for window in self._present():
            window.drop()
        self._mode.start_window()

    def look(self) -> None:
        """Look whether somebody has dropped what the hooks left in `.grad`, and take back what came of it."""
        for window in list(self._mode.touched.values()):
            window.look()

    def _window_of(self, param: Tensor) -> Window | None:
        """The window of a parameter that the optimizer still has, if it is there itself."""
        window, optimizer = self._windows.get(id(param)), self._optimizer()
        if window is None or optimizer is None:
            return None
        try:
            window.trained = optimizer.trained(param)
        except ValueError:  # it has left the groups: the next step forgets it
            return None
        return window

    # ---- what autograd brings

    def begin(self) -> None:
        """Note that a module of the model runs forward, before a backward pass."""
        if self.attached:
            self._wrappers.begin(self._windows)

    def serves(self, weight: Tensor) -> bool:
        """Whether the projected backward is for this weight: not for a copy of it, nor after `detach()`."""
        return id(weight) in self._windows and self.attached

    def shard_of(self, module: nn.Module, weight: Tensor) -> Tensor | None:
        """The sharded parameter that a layer's weight is of: `hf_galore.backward.shards` has them."""

    def gradient_of(self, weight: Tensor, output_gradient: Tensor, inputs: Tensor) -> Tensor | None:
        """The low-rank gradient from δ (T × m) and X (T × n) of one use of a target; `None` where G is needed."""
        return self.gradient_of_stack(weight, FactoredGradient(output_gradient, inputs))

    def gradient_of_embedding(self, weight: Tensor, gradient: EmbeddingGradient) -> Tensor | None:
        """What autograd is to have of the gradient of one use of an embedding; `None` where its rows wait."""
        window = self._window_of(weight)
        return gradient.whole() if window is None else window.late_rows.gradient_of(window, gradient)

    def gradient_of_stack(self, weight: Tensor, factors: FactoredGradient | GroupedGradient) -> Tensor | None:
        """The same of a stack."""
        window = self._window_of(weight)
        return None if window is None else window.late_rows.noted(window.gradient_of(factors))

    def not_recognised(self, module: nn.Module) -> None:
        """Say that a module's stacks are in no product whose factors are handed on."""
        names = (name for name, other in self._model.named_modules() if other is module)
        self.notices.not_recognised(next(names, "") or "the model")

    def bases_for_rows(self, weight: Tensor) -> Bases | None:
        """The bases that rows of a gradient can be projected with by themselves; `None` where autograd has to build it.

        Only a projection of the right side takes rows by themselves, and only between refreshes.
        """
        window = self._window_of(weight)
        return None if window is None else window.late_rows.noted(window.bases_for_rows())

    def of_rows(self, weight: Tensor, low_rank: Tensor) -> LowRankGradient:
        """The low-rank gradient whose rows were projected with `bases_for_rows`."""
        return self._windows[id(weight)].of_rows(low_rank)

    def receive(self, param: Tensor) -> None:
        """Use the gradient that autograd has put into `param.grad`."""
        window = self._window_of(param)
        if window is not None:
            window.receive()

    def passes_of(self, params: Iterable[Tensor]) -> list[Passes]:
        """The records of backward passes of those parameters that are hooked."""
        return [self._windows[id(param)].passes for param in params if id(param) in self._windows]


def hooks_on(param: Tensor) -> BackwardHooks | None:
    """What looks after a parameter's gradient during the backward pass, if anything does."""
    owners = (hook.hooks() for hook in gradient_hooks_on(param))
    return next((owner for owner in owners if owner is not None and owner.serves(param)), None)


def _remove(handles: list[Any]) -> None:
    while handles:
        handles.pop().remove()
