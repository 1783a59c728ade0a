"""GaLore for the Hugging Face Trainer: all weights of a large model trained on one graphics card.

`import hf_galore` and `from hf_galore import ...` register its optimizers under the `galore_*` names of
`TrainingArguments.optim`. Importing its submodules alone (`from hf_galore.optim import GaLoreAdamW`) changes nothing in
transformers or TRL.
"""

import importlib
from typing import TYPE_CHECKING, Any

from .registering import register_on_import
from .version import __version__ as __version__

if TYPE_CHECKING:
    from .config import GaLoreConfig
    from .expandable_segments import use_expandable_segments
    from .integrations.callback import GaLoreCallback
    from .integrations.int8_config import Int8Config
    from .integrations.int8_model import quantize_weights_
    from .integrations.trainer import register, unregister
    from .optim.build import make_optimizer
    from .optim.classes import GaLoreAdafactor, GaLoreAdamW, GaLoreAdamW8bit
    from .plan import MemoryPlan, measure, plan

__all__ = [
    "GaLoreAdafactor",
    "GaLoreAdamW",
    "GaLoreAdamW8bit",
    "GaLoreCallback",
    "GaLoreConfig",
    "Int8Config",
    "MemoryPlan",
    "make_optimizer",
    "measure",
    "plan",
    "quantize_weights_",
    "register",
    "unregister",
    "use_expandable_segments",
]

_MODULES = {
    "GaLoreAdafactor": ".optim.classes",
    "GaLoreAdamW": ".optim.classes",
    "GaLoreAdamW8bit": ".optim.classes",
    "GaLoreCallback": ".integrations.callback",
    "GaLoreConfig": ".config",
    "Int8Config": ".integrations.int8_config",
    "MemoryPlan": ".plan",
    "make_optimizer": ".optim.build",
    "measure": ".plan",
    "quantize_weights_": ".integrations.int8_model",
    "register": ".integrations.trainer",
    "unregister": ".integrations.trainer",
    "use_expandable_segments": ".expandable_segments",
}


def __getattr__(name: str) -> Any:
    """A public name, from the module that it is in, once somebody asks for it."""
    if name == "plan":  # a package that is its own function
        return importlib.import_module(".plan", __name__)
    if name in _MODULES:
        return getattr(importlib.import_module(_MODULES[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})


register_on_import(__spec__)
