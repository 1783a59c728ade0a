"""The plugin for axolotl: `plugins: [hf_galore.axolotl.GaLorePlugin]` in its YAML.

    plugins:
      - hf_galore.axolotl.GaLorePlugin
    optimizer: galore_adamw_8bit_layerwise
    optim_target_modules: [attn, mlp]
    optim_args:
      rank: 512

It registers the optimizers before axolotl reads the configuration, refuses one that would train otherwise, and ends a
run whose trainer has another optimizer.

axolotl logs an ImportError that it meets while it imports this file, and trains without the plugin. So nothing is
imported at the top that could be missing beside an axolotl; what can fail is called where axolotl lets it pass.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel, model_validator
from pydantic_core import PydanticUndefined
from transformers import Trainer, TrainerCallback

__all__ = ["GaLoreArguments", "GaLorePlugin"]

PLUGIN = f"{__name__}.GaLorePlugin"

# axolotl shows of other libraries' loggers only warnings.
_logger = logging.getLogger(f"axolotl.{__name__}")


class GaLorePlugin(BasePlugin):  # type: ignore[misc, unused-ignore]
    """Lets axolotl train with the optimizers of hf_galore: see the module."""

    def __init__(self) -> None:
        super().__init__()
        self._has_registered = False

    def register(self, cfg: Mapping[str, Any]) -> None:
        """Register the optimizers; called by axolotl before it validates a configuration.

        axolotl keeps plugins for the process, and calls them for configurations that do not name them: what was
        registered for an earlier one is taken back then.

        Raises:
            ImportError: this transformers has changed what is replaced; the message names it.
        """
        from .integrations.trainer import is_registered, register

        if not _is_named(cfg):
            self._take_back()
            return
        if not is_registered():
            register()
            self._has_registered = True
        _use_expandable_segments()

    def on_config_validation_error(self, cfg: Mapping[str, Any]) -> None:
        """Leave nothing behind of a configuration that was refused."""
        self._take_back()

    def get_input_args(self) -> str:
        """The model that axolotl mixes into its configuration: it adds no keys, and checks those that are there."""
        return f"{__name__}.{GaLoreArguments.__name__}"

    def add_callbacks_post_trainer(self, cfg: Mapping[str, Any], trainer: Trainer) -> list[TrainerCallback]:
        """See that the trainer trains with GaLore. Its `GaLoreCallback` it gets by being registered."""
        return [_MustBeGaLore()] if _is_named(cfg) else []

    def _take_back(self) -> None:
        from .integrations.trainer import unregister

        if self._has_registered:
            unregister()
            self._has_registered = False


class GaLoreArguments(BaseModel):
    """Checks a configuration that names the plugin."""

    @model_validator(mode="before")
    @classmethod
    def check_galore(cls, data: Any) -> Any:
        """Refuse what would not train with GaLore as asked; see `integrations.axolotl_checks.check_config`."""
        if isinstance(data, Mapping) and _is_named(data):
            from .integrations.axolotl_checks import check_config

            check_config(data, _known_keys(cls), int(os.environ.get("WORLD_SIZE", "1")))
        return data


class _MustBeGaLore(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Ends a run whose trainer has another optimizer, as another plugin's trainer may make one of its own."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        from .integrations.callback import galore_optimizer
        from .integrations.checks import optim_name

        if galore_optimizer(kwargs.get("optimizer")) is None:
            wrapper = kwargs.get("optimizer")
            made = type(getattr(wrapper, "optimizer", wrapper)).__name__
            raise RuntimeError(
                f"The configuration asks for {optim_name(args)} by {PLUGIN}, but the trainer's is {made}. "
                "Leave out what makes it (trainer_cls, or another plugin's trainer or optimizer), or leave out this "
                "plugin."
            )


def _is_named(config: Mapping[str, Any]) -> bool:
    return PLUGIN in (config.get("plugins") or ())


def _known_keys(model: type[BaseModel]) -> dict[str, Any]:
    """The keys of axolotl's configuration by their names and other names, with their defaults."""
    known: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        default = None if field.default is PydanticUndefined else field.default
        known.update((key, default) for key in (name, field.alias, field.validation_alias) if isinstance(key, str))
    return known


def _use_expandable_segments() -> None:
    """Ask for them where it is not too late; axolotl's own commands have asked before."""
    import torch

    from .expandable_segments import use_expandable_segments

    if not torch.cuda.is_initialized():
        advice = use_expandable_segments()
        if advice is not None:
            _logger.warning(advice)
