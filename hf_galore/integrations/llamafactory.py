"""Settings of LLaMA-Factory 0.9.5 that make an optimizer of its own, past `optim`. Nothing of it is imported."""

from __future__ import annotations

from typing import Any

# In the order in which its `create_custom_optimizer` asks; where none is set, the Trainer makes the optimizer.
OWN_OPTIMIZERS = ("use_galore", "use_apollo", "loraplus_lr_ratio", "use_badam", "use_adam_mini", "use_muon")


def is_llamafactorys(thing: object) -> bool:
    """Whether a trainer, or training arguments, are of one of LLaMA-Factory's classes."""
    return type(thing).__module__.partition(".")[0] == "llamafactory"


def own_optimizer_of(trainer: Any) -> str | None:
    """The setting by which a trainer of LLaMA-Factory's makes its own optimizer; `None` where there is none."""
    if not is_llamafactorys(trainer):
        return None
    settings = getattr(trainer, "finetuning_args", None)
    return next((name for name in OWN_OPTIMIZERS if getattr(settings, name, None)), None)
