"""A refresh that one process computes for all that have copies of a model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from .processes import Layout, Part, Processes

if TYPE_CHECKING:
    from ..optim.bases import NewBasis
    from ..optim.target import Target


class SharedRefresh:
    """A new basis of one target, and R in it: computed at once in one process, and nothing yet in the others.

    Args:
        target: the target.
        gradient: G; its numbers count in the process that computes.
        owner: the rank of that process.
        processes: all of them.
    """

    def __init__(self, target: Target, gradient: Tensor, owner: int, processes: Processes) -> None:
        self._target = target
        self._owner = owner
        self._processes = processes
        self._layout = Layout({key: Part(*part) for key, part in target.parts_of_refresh(gradient.dtype).items()})
        self._made: NewBasis | None = None
        if owner == processes.rank:
            self._made = target.new_basis(gradient)
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
