"""The wrappers of DistributedDataParallel around a hooked model, and what is reduced in their place."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..integrations import ddp
from ..integrations.accelerate import closes_window
from .exchange import Exchange
from .gradient import LowRankGradient, UsedGradient
from .processes import Processes, send_seeds, world_size
from .window import Window


class Wrappers:
    """Takes the targets out of what wrappers reduce, and reduces them instead.

    A wrapper is known by the first forward pass in it that a backward pass may follow: models are wrapped before an
    optimizer is made, and after it. It goes on reducing the gradients of all other parameters.

    Args:
        model: that the hooks are on.
        handles: where to put what undoes this, by `remove()`.
        dense: whether gradients are to be reduced and not low-rank ones.
        groups: gives the optimizer's groups, whose seeds are to be the same in all processes.
    """

    def __init__(
        self, model: nn.Module, handles: list[Any], *, dense: bool, groups: Callable[[], list[dict[str, Any]]]
    ) -> None:
        self._model = model
        self._handles = handles
        self._dense = dense
        self._groups = groups
        self._known: weakref.WeakKeyDictionary[DistributedDataParallel, Exchange] = weakref.WeakKeyDictionary()
        self._left: set[int] = set()  # parameters that a wrapper reduces, by their ids
        self._own: set[int] = set()  # those that wrappers leave out for this, by their ids

    # ---- before there is a wrapper

    @property
    def outermost(self) -> list[nn.Module]:
        """What a wrapper is likely to be put around: any pass in it runs these, if none of the targets."""
        parts = isinstance(self._model, (nn.ModuleList, nn.ModuleDict))  # each wrapped by itself
        return [self._model, *(self._model.children() if parts else ())]

    def expect(self, targets: Iterable[Tensor]) -> None:
        """Let a wrapper that is still to come leave targets alone: it would take room for their gradients."""
        targets = list(targets)
        if not ddp.may_come():
            return
        self._own.update(map(id, targets))
        for module in self.outermost:
            self._handles.append(ddp.leave_out_of_next(module, _without_last(module, targets)))

    # ---- a pass

    def begin(self, windows: dict[int, Window]) -> None:
        """Note a forward pass of a module of the model, within which wrapper it may be.

        Args:
            windows: of the hooked parameters, by their ids. Those that a wrapper is to reduce are taken out.

        Raises:
            ValueError: the wrapper does what does not go with low-rank gradients.
        """
        wrapper = ddp.active()
        if wrapper is not None and wrapper not in self._known:
            self._learn(wrapper, windows)

    @ddp.not_compiled
    def _learn(self, wrapper: DistributedDataParallel, windows: dict[int, Window]) -> None:
        _check(wrapper)
        _check_left_out(wrapper, self._own)
        inside = {id(param): param for param in wrapper.module.parameters() if param.requires_grad}
        trained = [window for key, window in windows.items() if key in inside]
        targets = _without_last(wrapper.module, [window.param for window in trained if window.trained.projected])
        sent = {id(param) for param in targets}
        for window in trained:
            if id(window.param) not in sent:
                self._left.add(id(window.param))
                windows.pop(id(window.param)).handle.remove()
        self._own |= sent
        exchange = Exchange(
            Processes(ddp.group_like(wrapper)),
            [window for window in trained if id(window.param) in sent],
            dense=self._dense,
            tolerant=ddp.tolerates_unused(wrapper),
            bucket_bytes=ddp.bucket_bytes(wrapper),
        )
        exchange.send_weights()
        send_seeds(self._groups(), exchange.processes)
        self._known[wrapper] = exchange
        ref = weakref.ref(exchange)
        self._handles.append(ddp.set_left_out(wrapper, targets, inside.values(), lambda wrapper: _begin(ref, wrapper)))
        for key, param in inside.items():
            if key not in sent:
                self._handles.append(param.register_post_accumulate_grad_hook(lambda _: _notice(ref)))
        _begin(ref, wrapper)

    def is_left(self, param: Tensor) -> bool:
        """Whether a wrapper reduces a parameter, which is updated in the step then."""
        return id(param) in self._left

    def check(self, windows: Iterable[Window]) -> None:
        """Check that no process uses gradients of its own.

        Raises:
            RuntimeError: several processes run, the model is in no wrapper, and there are gradients.
        """
        if world_size() == 1:
            return
        alone = [window for window in windows if window.trained.ranks is None and _is_alone(window)]
        if alone:
            raise RuntimeError(
                f"{world_size()} processes run, and {alone[0].trained.name} has a gradient of this one only: "
                "layerwise=True, projected_backward=True and exchange='low_rank' reduce low-rank gradients over the "
                "processes of DistributedDataParallel. Wrap the model in it and call the wrapper, and backward without "
                "create_graph; for processes that train models of their own make the optimizer with layerwise=False "
                "and projected_backward=False."
            )

    def end(self) -> None:
        """Let passes be over: whoever looks at gradients by now is to see those of all processes."""
        for exchange in self._known.values():
            exchange.end()

    def reset(self) -> None:
        """Forget what has come in the present passes."""
        for exchange in self._known.values():
            exchange.reset()

    def start_window(self) -> None:
        """Begin the next window."""
        for exchange in self._known.values():
            exchange.start_window()

    # ---- off the model

    def close(self) -> None:
        """Forget the wrappers. What is among the handles gives them back what they have left alone."""
        for exchange in self._known.values():
            exchange.close()
        self._known.clear()
        self._left.clear()

    def forget(self) -> None:
        """Look at the wrappers anew: there are other windows."""
        self._known.clear()


def _is_alone(window: Window) -> bool:
    """Whether a parameter has a gradient that has not been reduced, and is not going to be."""
    gradient = window.param.grad
    if window.exchange is None:
        return gradient is not None
    if isinstance(gradient, LowRankGradient):
        return gradient.addend is not None
    return gradient is not None and not isinstance(gradient, UsedGradient)


def _check(wrapper: DistributedDataParallel) -> None:
    reason = ddp.why_not(wrapper)
    if reason is not None:
        raise ValueError(
            "Low-rank gradients are not reduced under this DistributedDataParallel: "
            f"{reason}; or make the optimizer with layerwise=False and projected_backward=False."
        )


def _check_left_out(wrapper: DistributedDataParallel, own: set[int]) -> None:
    others = {id(param) for param in ddp.left_out(wrapper)} - own
    names = [name for name, param in wrapper.module.named_parameters() if id(param) in others]
    if names:
        raise ValueError(
            f"This DistributedDataParallel was told to leave out {len(names)} parameter(s) that are trained: "
            f"{', '.join(names[:3])}{', ...' if len(names) > 3 else ''}. Low-rank gradients go with one that reduces "
            "all. Wrap the model without that, or make the optimizer with layerwise=False and projected_backward=False."
        )


def _begin(ref: weakref.ref[Exchange], wrapper: DistributedDataParallel) -> None:
    exchange = ref()
    if exchange is not None:
        _check(wrapper)
        exchange.begin(reduces=ddp.reduces_next(wrapper), closes_window=closes_window())


def _notice(ref: weakref.ref[Exchange]) -> None:
    exchange = ref()
    if exchange is not None:
        exchange.notice()


def _without_last(module: nn.Module, targets: list[Tensor]) -> list[Tensor]:
    """The targets in a module; but for one where all that it trains is targets: a wrapper has to have something."""
    trained = {id(param): param for param in module.parameters() if param.requires_grad}
    inside = [param for param in targets if id(param) in trained]
    if len(inside) < len(trained) or not inside:
        return inside
    least = min(inside, key=lambda param: param.numel())
    return [param for param in inside if param is not least]
