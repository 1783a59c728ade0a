"""How many backward passes bring a weight gradients, for one micro-batch.

Autograd sums up the uses of a weight within one backward pass. But a reentrant checkpoint runs its segment in a
function's forward, without a graph, and later in a backward pass of its own.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .gradient import in_backward


class Passes:
    """The backward passes that are to bring one weight gradients."""

    __slots__ = ("_outside", "_segments")

    def __init__(self) -> None:
        # Nodes of the reentrant checkpoints that use it, each a pass of its own; they go with their graphs.
        self._segments: list[Callable[[], Any]] = []
        self._outside = False  # whether it is used outside of them

    def note_use(self) -> None:
        """Note a use outside of reentrant checkpoints."""
        self._outside = True

    def note_segment(self, node: Callable[[], Any]) -> None:
        """Note a use in a reentrant checkpoint's segment, whose node this refers to."""
        self._segments.append(node)

    def count(self) -> int:
        """The number of passes, at least 1."""
        segments = sum(node() is not None for node in self._segments)
        return max(1, segments + (segments > 0 and self._outside))

    def forget_gone(self) -> None:
        """Forget segments whose graphs are gone."""
        if self._segments:
            self._segments = [node for node in self._segments if node() is not None]

    def clear(self) -> None:
        """Forget all."""
        self._segments.clear()
        self._outside = False


class Listener(Protocol):
    """What forward passes of modules are told to."""

    def begin(self) -> None:
        """A module runs forward, and a backward pass may follow."""

    def passes_of(self, params: Iterable[Tensor]) -> list[Passes]:
        """The records of those among some parameters that have one."""


class PassCounter:
    """A module's forward pre-hook: notes how its parameters are used.

    Args:
        listener: gives what is told; refers weakly to what it needs, as the module's copies have this hook too.
        module: gives the module that it is for.
    """

    def __init__(self, listener: Callable[[], Listener | None], module: Callable[[], nn.Module | None]) -> None:
        self._listener = listener
        self._module = module

    @classmethod
    def on(cls, module: nn.Module, listener: Callable[[], Listener | None]) -> Any:
        """Put one on a module; what is returned takes it off, by `remove()`."""
        return module.register_forward_pre_hook(cls(listener, weakref.ref(module)))

    def __call__(self, module: nn.Module, args: Any) -> None:
        # Recomputation during the backward pass is the same run again.
        listener = self._listener()
        if listener is None or module is not self._module() or in_backward():
            return
        params = [param for param in module._parameters.values() if param is not None]
        if torch.is_grad_enabled():
            listener.begin()
            for record in listener.passes_of(params):
                record.note_use()
        elif _in_function_forward():
            node = _present_node()
            for record in listener.passes_of(params):
                record.note_segment(node)

    def __reduce__(self) -> Any:
        return PassCounter, (gone, gone)  # weak references cannot be pickled


def reentrant_segment() -> Callable[[], Any] | None:
    """A weak reference to the node of the reentrant checkpoint whose segment runs forward; `None` in none."""
    if not _in_function_forward() or in_backward():
        return None
    node = _present_node()
    # Functions that compute something themselves are part of the pass around them.
    return node if "Checkpoint" in type(node()).__name__ else None


def gone() -> None:
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


def in_segment() -> bool:
    """Whether the present backward pass is that of a reentrant checkpoint's segment, within another."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "backward" and frame.f_code.co_varnames[:1] == ("ctx",):
            return True
        frame = frame.f_back
    return False


def _a_node() -> bool:
    return True
