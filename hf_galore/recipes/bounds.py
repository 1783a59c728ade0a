"""The bounds of numbers in a recipe, checked before anything is made of them.

The libraries find such a number late (a batch of 0, when the weights are loaded), or take it: with
`gradient_accumulation_steps: -1` a run trains nothing, and with `max_length: -1` each text loses its last token.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from ..errors import UserError


@dataclasses.dataclass(frozen=True)
class Bounds:
    """What a number has to be; NaN never is, nor `math.inf` but where it has a meaning of its own."""

    least: float
    above: bool = False
    """Whether `least` itself is too little."""
    below: float = math.inf
    """What it must not reach."""
    also: float | None = None
    """A number that has a meaning of its own."""
    advice: str = ""
    """What to do for what the number may have been meant for."""

    def allow(self, value: float) -> bool:
        """Whether a number keeps to them."""
        if value == self.also:
            return True
        return (self.least < value if self.above else self.least <= value) and value < self.below

    def __str__(self) -> str:
        least = f"above {self.least:g}" if self.above else f"at least {self.least:g}"
        return least + ("" if self.below == math.inf else f" and below {self.below:.15g}")


_COUNT = Bounds(1)
_NOT_NEGATIVE = Bounds(0)
_PART = Bounds(0, below=1)
_EVERY = Bounds(0, above=True)
_SEED = Bounds(0, below=2**32)

BOUNDS: dict[str, Bounds] = {
    "per_device_train_batch_size": _COUNT,
    "per_device_eval_batch_size": _COUNT,
    "gradient_accumulation_steps": _COUNT,
    "eval_accumulation_steps": _COUNT,
    "num_train_epochs": _EVERY,
    "max_steps": Bounds(1, also=-1, advice=" Or -1, for num_train_epochs to say how long it is."),
    "max_length": _COUNT,
    "learning_rate": _NOT_NEGATIVE,
    "weight_decay": _NOT_NEGATIVE,
    "adam_beta1": _PART,
    "adam_beta2": _PART,
    "adam_epsilon": _NOT_NEGATIVE,
    "max_grad_norm": Bounds(0, also=math.inf, advice=" 0 is no clipping."),
    "label_smoothing_factor": _PART,
    "neftune_noise_alpha": _NOT_NEGATIVE,
    "warmup_steps": _NOT_NEGATIVE,
    "warmup_ratio": Bounds(0, below=1),
    "logging_steps": Bounds(0, above=True, advice=" For no log set logging_strategy to 'no'."),
    "save_steps": Bounds(0, above=True, advice=" For no checkpoints set save_strategy to 'no'."),
    "eval_steps": Bounds(0, above=True, advice=" For no evaluation set eval_strategy to 'no'."),
    "eval_delay": _NOT_NEGATIVE,
    "save_total_limit": Bounds(1, advice=" Leave it out to keep all checkpoints; for none set save_strategy to 'no'."),
    "dataloader_num_workers": _NOT_NEGATIVE,
    "dataloader_prefetch_factor": _COUNT,
    "dataset_num_proc": _COUNT,
    "torch_empty_cache_steps": _COUNT,
    "seed": _SEED,
    "data_seed": _SEED,
    "ref_model_sync_steps": _COUNT,
    "precompute_ref_batch_size": _COUNT,
    "lora_r": _COUNT,
    "lora_alpha": _COUNT,
    "lora_dropout": _PART,
}
"""Of the keys that have a range; what else a number may be is the libraries' to say."""


def check_bounds(given: Mapping[str, Any]) -> None:
    """Check the numbers that a recipe and a command line give.

    Args:
        given: keys and values, of the right types; a number may be text, as YAML has `1e-5`.

    Raises:
        UserError: one is out of its range.
    """
    for key, value in given.items():
        bounds = BOUNDS.get(key)
        if bounds is None or value is None or isinstance(value, bool):
            continue
        try:
            number = float(value)
        except (ValueError, TypeError):  # no number: the parser has more to say of it
            continue
        if not bounds.allow(number):
            raise UserError(f"{key} has to be {bounds}, but is {number:.15g}.{bounds.advice}")
