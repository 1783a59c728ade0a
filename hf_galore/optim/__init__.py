"""The optimizers, with no Trainer: importing them patches nothing.

`make_optimizer` makes one from a model and the names of the layers to project, with its hooks on the model; the classes
take parameter groups.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .classes import GaLoreAdafactor, GaLoreAdamW, GaLoreAdamW8bit
from .optimizer import GaLoreOptimizer

if TYPE_CHECKING:
    from .build import make_optimizer

__all__ = ["GaLoreAdafactor", "GaLoreAdamW", "GaLoreAdamW8bit", "GaLoreOptimizer", "make_optimizer"]


def __getattr__(name: str) -> Any:
    """Import what stands above the integrations when it is asked for."""
    if name == "make_optimizer":
        from .build import make_optimizer

        return make_optimizer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
