"""Parameters in whose place a model has others since: an optimizer that still has them would train nothing.

They say so themselves, so that nobody has to know which optimizers there are.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import Tensor, nn

from ..log import and_others

if TYPE_CHECKING:
    from .trained import Trained

_MARK = "_hf_galore_exchanged"


def mark_exchanged(param: Tensor) -> None:
    """Note on a parameter that another one has come in its place."""
    setattr(param, _MARK, True)


def check_not_exchanged(cls_name: str, model: nn.Module | None, parameters: Iterable[Trained]) -> None:
    """Check that an optimizer's parameters are those that the model has.

    Args:
        cls_name: the optimizer's class.
        model: that the parameters belong to, where it is known. What it has is right, whatever other models had.
        parameters: what each of the optimizer's is. Frozen ones are passed over.

    Raises:
        RuntimeError: the model has others in the place of some.
    """
    left = [trained for trained in parameters if trained.param.requires_grad and hasattr(trained.param, _MARK)]
    if left and model is not None:
        present = {id(param) for param in model.parameters()}
        left = [trained for trained in left if id(trained.param) not in present]
    if left:
        raise RuntimeError(
            f"{left[0].name}{and_others(len(left) - 1, 'other parameter(s)')} of this {cls_name} were exchanged for "
            "others when the model's weights were put into 8 bits or back (quantize_weights_, dequantize), and the "
            "optimizer has those that were there before: it would train nothing. Do that first, and make the optimizer "
            "after it (with a Trainer, a new Trainer)."
        )
