"""The optimizers that there are, to know whom an exchange of a model's weights leaves behind."""

from __future__ import annotations

import weakref
from collections.abc import Iterable

import torch

from ..log import logger

_live: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()


def note(optimizer: torch.optim.Optimizer) -> None:
    """Know an optimizer from now on, as long as it is there."""
    _live.add(optimizer)


def say_if_left_behind(exchanged: Iterable[int]) -> None:
    """Warn of optimizers that go on with weights that a model no longer has: they would train nothing.

    Args:
        exchanged: the ids of parameters in whose place others have come.
    """
    ids = set(exchanged)
    for optimizer in _live:
        count = sum(id(param) in ids for group in optimizer.param_groups for param in group["params"])
        if count:
            logger.warning(
                "%s was made before %d weight(s) of the model were exchanged, and would go on with those that the "
                "model no longer has: to train on, make it anew (Trainer: a new Trainer).",
                type(optimizer).__name__,
                count,
            )
