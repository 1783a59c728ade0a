"""GaLore for the Hugging Face Trainer: all weights of a large model trained on one graphics card.

Importing the package registers its optimizers under the `galore_*` names of `TrainingArguments.optim`.
"""

from typing import TYPE_CHECKING, Any

from .config import GaLoreConfig
from .integrations.callback import GaLoreCallback
from .integrations.trainer import register, unregister
from .optim.classes import GaLoreAdafactor, GaLoreAdamW, GaLoreAdamW8bit

if TYPE_CHECKING:
    from .plan.planner import MemoryPlan, measure, plan

__version__ = "0.1.0"

__all__ = [
    "GaLoreAdafactor",
    "GaLoreAdamW",
    "GaLoreAdamW8bit",
    "GaLoreCallback",
    "GaLoreConfig",
    "MemoryPlan",
    "measure",
    "plan",
    "register",
    "unregister",
]


def __getattr__(name: str) -> Any:
    """The planner, once somebody asks for it: a training does without what it imports."""
    if name in ("MemoryPlan", "measure", "plan"):
        from .plan import planner

        return getattr(planner, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


register()
