"""What of a process's memory tensors take, looked at after every operation: also where storages are emptied by hand.

FSDP2 frees weights that it has gathered by resizing their storages to nothing, which is no operation: nobody is told.
So the storages that were seen are asked anew each time, which is for small models.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Within, `peak` is the most that storages take at a time, of those that an operation has had or made.

    Args:
        tensors: that are there already; of DTensors this process's part.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__()
        self.peak = 0
        self._storages: dict[int, weakref.ref[Any]] = {}
        self._see(tensors)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def _see(self, tensors: Iterable[Any]) -> None:
        for tensor in tensors:
            if isinstance(tensor, Tensor):
                # A DTensor's own storage stands for all of it, and is nowhere.
                storage = getattr(tensor, "_local_tensor", tensor).untyped_storage()
                self._storages[storage._cdata] = weakref.ref(storage)

    @property
    def now(self) -> int:
        """What they take now."""
        alive = [storage for reference in self._storages.values() if (storage := reference()) is not None]
        return sum(storage.nbytes() for storage in alive)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self._see(tree_leaves((args, out)))
        self.peak = max(self.peak, self.now)
        return out


def held_by(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The parameters of an optimizer and its state."""
    parameters = [param for group in optimizer.param_groups for param in group["params"]]
    return [*parameters, *(value for state in optimizer.state.values() for value in state.values())]
