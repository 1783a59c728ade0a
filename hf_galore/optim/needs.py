"""What does not go with updates that need the gradient itself: what has low-rank ones only, or keeps gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..backward.whole_window import check_may_hold

if TYPE_CHECKING:
    from .trained import Trained


def all_need_gradients(parameters: Sequence[Trained]) -> bool:
    """Whether the updates of all targets, of which there are some, need the gradient itself."""
    targets = [trained for trained in parameters if trained.projected]
    return bool(targets) and all(target.needs_gradient for target in targets)


def check_needs(
    parameters: Sequence[Trained],
    *,
    layerwise: bool,
    hold_gradients: bool,
    projected_backward: bool,
    low_rank_exchange: bool,
) -> None:
    """Check that an optimizer has the gradients that its options need, and no more of them than one at a time.

    Args:
        parameters: the optimizer's.
        layerwise: whether weights are updated during the backward pass.
        hold_gradients: whether gradients wait for the step then.
        projected_backward: whether low-rank gradients are asked for that are computed without gradients.
        low_rank_exchange: whether low-rank gradients are asked for that processes reduce.

    Raises:
        ValueError: it has not.
    """
    found = next((trained for trained in parameters if trained.needs_gradient), None)
    if found is None:
        return
    option, name = found.needs_gradient, found.name
    if low_rank_exchange:
        raise ValueError(
            f"{option} of {name} needs the gradient itself, and exchange='low_rank' reduces low-rank ones only. Leave "
            f"exchange out, or {option}."
        )
    if projected_backward and (not layerwise or all_need_gradients(parameters)):
        raise ValueError(
            f"{option} of {name} needs the gradient itself, which projected_backward=True never builds. Leave "
            f"projected_backward out, or {option}."
        )
    if layerwise and hold_gradients:
        check_may_hold(
            parameters, "hold_gradients=True", "Leave it out (with a Trainer: max_grad_norm=0 and no accumulation)"
        )
