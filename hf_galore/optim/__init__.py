"""The optimizers. Importing them patches nothing."""

from .classes import GaLoreAdafactor, GaLoreAdamW, GaLoreAdamW8bit
from .optimizer import GaLoreOptimizer

__all__ = ["GaLoreAdafactor", "GaLoreAdamW", "GaLoreAdamW8bit", "GaLoreOptimizer"]
