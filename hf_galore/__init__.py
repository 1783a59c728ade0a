"""GaLore for the Hugging Face Trainer: all weights of a large model trained on one graphics card.

Importing the package registers its optimizers under the `galore_*` names of `TrainingArguments.optim`.
"""

from .config import GaLoreConfig
from .optimizers import GaLoreAdafactor, GaLoreAdamW, GaLoreAdamW8bit
from .trainer import GaLoreCallback, register, unregister

__version__ = "0.1.0"

__all__ = [
    "GaLoreAdafactor",
    "GaLoreAdamW",
    "GaLoreAdamW8bit",
    "GaLoreCallback",
    "GaLoreConfig",
    "register",
    "unregister",
]

register()
