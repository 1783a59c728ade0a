"""A refresh that one process computes for all that have copies of a model; and whether there is one to compute."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..lowrank.matrices import as_matrices
from ..lowrank.projection import norm_of_each
from .processes import Layout, Part, Processes

if TYPE_CHECKING:
    from ..optim.bases import NewBasis
    from ..optim.target import Target


def waits_for_gradients(target: Target, gradient: Tensor, processes: Processes | None) -> bool:
    """Whether a stack's refresh waits on: it is due for matrices that had no gradient, and have none in any process.

    An expert that gets no tokens would else have the whole gradient of all experts exchanged in each step. Waits for
    the device, where it is not a turn of the whole stack.

    Args:
        target: the target.
        gradient: G of this process.
        processes: that ask this together; `None` where they have the same gradient.
    """
    due = target.matrices_due()
    if target.stack is None or len(due) == target.stack:
        return False
    norms = norm_of_each(as_matrices(gradient, target.matrix_shape))
    found = torch.stack([(norms[due] != 0).any(), (norms != 0).any()]).float()
    if processes is not None:
        processes.mean_(found).wait()
    of_due, of_any = found.tolist()
    return bool(of_any) and not of_due


class SharedRefresh:
    """A new basis of one target, and R in it: computed at once in one process, and nothing yet in the others.

    Args:
        target: the target.
        gradient: G; its numbers count in the process that computes.
        owner: the rank of that process.
        processes: all of them.
        held: whether R is to be held, with what norm probes give beside it.
    """

    def __init__(self, target: Target, gradient: Tensor, owner: int, processes: Processes, *, held: bool) -> None:
        self._target = target
        self._owner = owner
        self._processes = processes
        parts = target.parts_of_refresh(gradient.dtype, held=held)
        self._layout = Layout({key: Part(*part) for key, part in parts.items()})
        self._made: NewBasis | None = None
        if owner == processes.rank:
            self._made = target.new_basis(gradient, held=held)
            self._message = self._layout.packed(self._made.tensors(), gradient.device)
        else:
            target.settle_skipped()
            self._message = self._layout.empty(gradient.device)

    def send(self) -> Any:
        """Begin to send it to all; returned is what has `wait()` and `is_completed()`."""
        return self._processes.send_(self._message, self._owner)

    def made(self) -> NewBasis:
        """The refresh, once it has been sent."""
        return self._made or self._target.refresh_from(self._layout.unpacked(self._message))
