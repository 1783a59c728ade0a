"""GaLore for the Hugging Face Trainer: all weights of a large model trained on one graphics card.

`import hf_galore` and `from hf_galore import ...` register its optimizers under the `galore_*` names of
`TrainingArguments.optim`. Importing its submodules alone (`from hf_galore.optim import GaLoreAdamW`) changes nothing in
transformers or TRL.
"""

import importlib
from typing import TYPE_CHECKING, Any

from .registering import register_on_import

if TYPE_CHECKING:
    from .config import GaLoreConfig
    from .integrations.callback import GaLoreCallback
    from .integrations.trainer import register, unregister
    from .optim.build import make_optimizer
    from .optim.classes import GaLoreAdafactor, GaLoreAdamW, GaLoreAdamW8bit
    from .plan.planner import MemoryPlan, measure, plan

__version__ = "0.1.0"

__all__ = [
    "GaLoreAdafactor",
    "GaLoreAdamW",
    "GaLoreAdamW8bit",
    "GaLoreCallback",
    "GaLoreConfig",
    "MemoryPlan",
    "make_optimizer",
    "measure",
    "plan",
    "register",
    "unregister",
]

_MODULES = {
    "GaLoreAdafactor": ".optim.classes",
    "GaLoreAdamW": ".optim.classes",
    "GaLoreAdamW8bit": ".optim.classes",
    "GaLoreCallback": ".integrations.callback",
    "GaLoreConfig": ".config",
    "MemoryPlan": ".plan.planner",
    "make_optimizer": ".optim.build",
    "measure": ".plan.planner",
    "plan": ".plan.planner",
    "register": ".integrations.trainer",
    "unregister": ".integrations.trainer",
}


def __getattr__(name: str) -> Any:
    """A public name, from the module that it is in, once somebody asks for it."""
    if name in _MODULES:
        return getattr(importlib.import_module(_MODULES[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register_on_import(__spec__)
