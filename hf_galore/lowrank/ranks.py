"""Collectives on plain tensors, whose rows are divided among processes as a DTensor's are.

All traffic of sharded parameters passes here, apart from the engine's own. Every process of a group has to call these
in the same order, with tensors that fit together: nobody may decide by what only it can see.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad


class Ranks:
    """The processes that a parameter is sharded over.

    Args:
        group: of processes (a `torch.distributed.ProcessGroup`).
    """

    def __init__(self, group: Any) -> None:
        self.group = group
        self.size: int = dist.get_world_size(group)
        self.rank: int = dist.get_rank(group)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Ranks) and other.group == self.group

    def __hash__(self) -> int:
        return hash(self.group)

    def own(self, rows: int) -> slice:
        """Which of so many rows this process has: as `torch.chunk` divides them, none of the last ones of few."""
        chunk = self._chunk(rows)
        start = min(self.rank * chunk, rows)
        return slice(start, min(start + chunk, rows))

    def count(self, rows: int) -> int:
        """How many of so many rows this process has."""
        return len(range(rows)[self.own(rows)])

    def _chunk(self, rows: int) -> int:
        return -(-rows // self.size)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of the processes' tensors, in place; the same on all of them."""
        if self.size > 1:
            tensor = tensor.contiguous()
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def gather(self, own: Tensor, rows: int) -> Tensor:
        """All rows, from those that each process has.

        Args:
            own: this process's.
            rows: how many all have together.
        """
        if self.size == 1:
            return own
        chunk = self._chunk(rows)
        gathered = own.new_empty(chunk * self.size, *own.shape[1:])
        dist.all_gather_into_tensor(gathered, _with_rows(own, chunk), group=self.group)
        return gathered[:rows]

    def sum_to_rows(self, partial: Tensor) -> Tensor:
        """This process's rows of the sum of the processes' matrices."""
        if self.size == 1:
            return partial
        rows = len(partial)
        chunk = self._chunk(rows)
        summed = partial.new_empty(chunk, *partial.shape[1:])
        dist.reduce_scatter_tensor(summed, _with_rows(partial, chunk * self.size), group=self.group)
        return summed[: self.count(rows)]

    def of_first(self, tensor: Tensor) -> Tensor:
        """The first process's tensor, in place: what decisions are made from, where rounding might part them."""
        if self.size > 1:
            dist.broadcast(tensor, group=self.group, group_src=0)
        return tensor

    def norms(self, parts: Sequence[Tensor]) -> Tensor:
        """The norms of sharded tensors, from those of the parts that this process has, in one collective.

        Args:
            parts: the norms of its parts, 0-dimensional; one or more of one dtype.
        """
        stacked = torch.stack(list(parts))
        # In double precision: the square of a norm has a larger range than the norm.
        return self.sum(stacked.double().square_()).sqrt_().to(stacked.dtype)

    def all(self, flag: Tensor) -> Tensor:
        """Whether a flag, 0-dimensional, is set on all processes."""
        missing = self.sum((~flag.bool()).to(torch.float32))
        return missing == 0


def _with_rows(tensor: Tensor, rows: int) -> Tensor:
    """A tensor filled up with rows of zeros, contiguous."""
    missing = rows - len(tensor)
    if missing == 0:
        return tensor.contiguous()
    return pad(tensor, (0, 0) * (tensor.ndim - 1) + (0, missing)).contiguous()
