"""The gradient of an embedding in a window: rows are projected by themselves, or wait for a whole gradient."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from ..lowrank.projection import project
from ..lowrank.rows import EmbeddingGradient, Rows
from .stand_in import StandIn

if TYPE_CHECKING:
    from .window import Window

T = TypeVar("T")


class LateRows:
    """Rows of one weight's gradient that wait until autograd has put what else there is of it into `.grad`.

    An embedding that is the output head too has a whole gradient from the head in a backward pass, where a refresh is
    due or the weight is full-rank. With the embedding's as a matrix beside it there would be two.
    """

    def __init__(self) -> None:
        self._whole_in: int | None = None  # the last backward pass in which autograd was given a whole gradient
        self._rows: dict[int, list[Rows]] = {}  # by the backward pass

    def clear(self) -> None:
        """Forget rows of passes that ended with an error."""
        self._rows.clear()

    def noted(self, found: T | None) -> T | None:
        """What stands for a gradient, as it is given; where that is `None`, autograd is going to have the whole one."""
        if found is None:
            self._whole_in = _present_pass()
        return found

    def gradient_of(self, window: Window, gradient: EmbeddingGradient) -> Tensor | None:
        """What autograd is to have of an embedding's gradient; `None` where its rows wait.

        Args:
            window: of the weight, whose rows these are.
            gradient: of one use.
        """
        param, present = window.param, _present_pass()
        bases = window.bases_for_rows()
        with torch.no_grad(), torch.autocast(param.device.type, enabled=False):
            if bases is not None and bases.right is not None and window.target.matrix_shape == tuple(param.shape):
                values, numbers = gradient.rows()
                return window.of_rows(Rows(project(values, bases), numbers).matrix(gradient.height))
            # A hook on the weight is to be given all of the gradient, and R cannot be added to.
            may_wait = not param._backward_hooks and not isinstance(param.grad, StandIn)
            if self._whole_in == present and may_wait:
                self._rows.setdefault(present, []).append(gradient.rows())
                return None
            self._whole_in = present
            return gradient.whole()

    def add_to_(self, gradient: Tensor) -> None:
        """Add the rows of the present backward pass to what autograd has put into `.grad`."""
        for rows in self._rows.pop(_present_pass(), ()):
            if isinstance(gradient, StandIn):  # of a whole gradient and one that is not finite
                gradient.add_(rows.matrix(len(gradient)))
            else:
                rows.add_to_(gradient)


def _present_pass() -> int:
    """The number of the backward pass that autograd is running."""
    return torch._C._current_graph_task_id()
