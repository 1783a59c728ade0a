"""The processes that train copies of one model, and what they send each other."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist

# Where the parts of a message begin, so that each can be read in its own dtype.
_ALIGNMENT = 16


def world_size() -> int:
    """How many processes torch.distributed runs; 1 where it does not run."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class Processes:
    """The processes of a group, for means and messages between them; each of these is a collective of all.

    Args:
        group: of torch.distributed.
    """

    def __init__(self, group: Any) -> None:
        self.group = group
        self.size: int = dist.get_world_size(group)
        self.rank: int = dist.get_rank(group)

    def mean_(self, tensor: Tensor) -> Any:
        """Begin to set a tensor to its mean over the processes; returned is what has `wait()` and `is_completed()`."""
        # Divided before it is summed, as DistributedDataParallel does: sums of half precision may overflow.
        return dist.all_reduce(tensor.div_(self.size), group=self.group, async_op=True)

    def mean_in_(self, tensor: Tensor, owner: int) -> Any:
        """Begin to set a tensor to its mean over the processes, in the one whose rank is `owner`; spoilt in others."""
        return dist.reduce(tensor.div_(self.size), self._globally(owner), group=self.group, async_op=True)

    def send_(self, tensor: Tensor, owner: int) -> Any:
        """Begin to set a tensor to what it is in the process whose rank is `owner`."""
        return dist.broadcast(tensor, self._globally(owner), group=self.group, async_op=True)

    def _globally(self, rank: int) -> int:
        return dist.get_global_rank(self.group, rank)


# The entries of a group that random numbers follow from, which are to be the same in all processes.
_SEEDS = ("rounding_seed", "gradient_seed", "basis_seed")


def send_seeds(groups: Iterable[dict[str, Any]], processes: Processes) -> None:
    """Give all processes the seeds of the first: each begins with torch's own, which programs set to different ones.

    A weight that is rounded at random would be another in each of them.
    """
    entries = [(group, key) for group in groups for key in _SEEDS if key in group]
    if not entries:
        return
    # Of 64 bits without a sign, which no dtype that all backends send has.
    halves = [half for group, key in entries for half in (group[key] >> 32 & 0xFFFFFFFF, group[key] & 0xFFFFFFFF)]
    device = next(param.device for group, _ in entries for param in group["params"])
    sent = torch.tensor(halves, dtype=torch.int64, device=device)
    processes.send_(sent, 0).wait()
    high_and_low = sent.view(-1, 2).tolist()
    for (group, key), (high, low) in zip(entries, high_and_low, strict=True):
        group[key] = high << 32 | low


class Part(NamedTuple):
    """One tensor of a message."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class Layout:
    """How tensors of several dtypes lie in one message of bytes.

    Args:
        parts: the tensors by their names, in their order.
    """

    def __init__(self, parts: Mapping[str, Part]) -> None:
        self._parts = dict(parts)
        self._places: dict[str, tuple[int, int]] = {}
        start = 0
        for name, part in self._parts.items():
            size = math.prod(part.shape) * part.dtype.itemsize
            self._places[name] = (start, start + size)
            start += -(-size // _ALIGNMENT) * _ALIGNMENT
        self.nbytes = start

    def empty(self, device: torch.device) -> Tensor:
        """Room for a message."""
        return torch.empty(self.nbytes, dtype=torch.uint8, device=device)

    def packed(self, tensors: Mapping[str, Tensor], device: torch.device) -> Tensor:
        """The message of these tensors."""
        message = self.empty(device)
        for name, view in self.unpacked(message).items():
            view.copy_(tensors[name])
        return message

    def unpacked(self, message: Tensor) -> dict[str, Tensor]:
        """The tensors in a message; they are views of it."""
        return {
            name: message[slice(*self._places[name])].view(part.dtype).view(part.shape)
            for name, part in self._parts.items()
        }
