"""What autograd does where a tensor has several uses, and their gradients are added.

It adds in place where nothing else holds the first of them: but not while a mode looks at operations, as one has to
here. So each such sum would be counted with both that it is of, which of an embedding that is the output head too is a
whole embedding more than there is.

Source: torch, `torch/csrc/autograd/input_buffer.cpp` (`can_accumulate_inplace`).
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch
from torch import Tensor
from torch.autograd import graph
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

ADD, ADD_IN_PLACE = torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor

_ENGINE = graph._engine_run_backward.__code__


def adds_in_place(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether an addition in a backward pass is one that autograd makes in place when no mode looks.

    To be asked by a mode's `__torch_dispatch__` itself, of an `aten.add.Tensor`, after `uses_by_one`.

    Args:
        args: of the operation.
        kwargs: of the operation.
    """
    if kwargs or len(args) != 2 or torch.is_grad_enabled():
        return False
    first, other = args
    if not isinstance(first, Tensor) or not isinstance(other, Tensor) or first is other:
        return False
    if first.shape != other.shape or first.dtype != other.dtype or first.device != other.device:
        return False
    return _called_by_engine() and first.is_contiguous() and _uses(first) == uses_by_one()


def _called_by_engine() -> bool:
    """Whether no code in Python asked for the operation: autograd did, or a function in C++ that it called."""
    try:
        caller = sys._getframe(3)  # of the mode's method
    except ValueError:  # on a thread of the engine's own
        return True
    return caller.f_code is _ENGINE


def _uses(tensor: Tensor) -> tuple[int, int]:
    """How many owners in C++ a tensor and its storage have, as a mode sees them."""
    owners: Any = tensor
    return owners._use_count(), torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)


@functools.cache
def uses_by_one() -> tuple[int, int]:
    """The owners of a gradient that autograd alone holds, as this torch counts them.

    Has to be called once where autograd works, which it does not within an operation.
    """
    found: list[tuple[int, int]] = []

    class Look(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is ADD and not torch.is_grad_enabled():
                found.append(_uses(args[0]))
            return func(*args, **(kwargs or {}))

    with _disable_current_modes(), torch.enable_grad():
        x = torch.ones(2, device="cpu", requires_grad=True) * 1
        with Look():
            torch.autograd.grad(x * 2 + x * 3, x, torch.ones(2, device="cpu"))
    return found[0]
