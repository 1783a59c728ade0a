"""Which parameters a Trainer decays: asked of transformers' own rule, which needs no Trainer."""

from __future__ import annotations

from typing import Any, cast

from torch import nn
from transformers.trainer import Trainer


def decayed_names(model: nn.Module) -> frozenset[str]:
    """The names of the parameters that weight decay is applied to: neither biases nor those of norms."""
    # A method that makes no use of its Trainer.
    return frozenset(Trainer.get_decay_parameter_names(cast("Any", None), model))
