"""Recipes: YAML files of `key: value` lines that say what to train and how, and what reads and runs them.

For notebooks and scripts of your own:

    from hf_galore.recipes import embedded, recipes_folder

    small = embedded()  # a small chat model and conversations, made on this machine
    dataset = load_dataset(str(small.data))
    template = recipes_folder() / "chatml"  # what comes with hf_galore

`embedded` and `Embedded`: the embedded model and its data. `recipes_folder`, `configs_folder`, `known_recipes`,
`known_models`: the recipes and the models' configs that come with hf_galore. `plan_recipe` is `hf_galore.plan` for
recipes. `UserError` is what they raise for something that was given wrong.

Where a key is read: those of the four kinds of recipe in `sft.py`, `dpo.py`, `pretrain.py` and `glue.py`, each of which
makes a Trainer of them, and what the first two share in `trl_recipe.py`; `dataset_*` and files of text in
`data_loading.py`, `text_data.py` and `glue_data.py`; `output_dir` and `resume_from_checkpoint` in `checkpoints.py`,
`report_to` in `trackers.py`, `push_to_hub` in `hub.py` and `model_card.py`; `optim`, `optim_args` and
`optim_target_modules` in `hf_galore.config` and `hf_galore.integrations`. All other keys are TRL's and transformers'.
`parser.py` parses, and `bounds.py` has the ranges of numbers; `checks.py` has what is checked before all is loaded;
`training.py` runs a recipe; `planning.py` plans one.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from ..extras import require
from .folders import configs_folder, known_models, known_recipes, recipes_folder

if TYPE_CHECKING:
    from .embedded_model import Embedded, embedded
    from .planning import plan_recipe

__all__ = [
    "Embedded",
    "UserError",
    "configs_folder",
    "embedded",
    "known_models",
    "known_recipes",
    "plan_recipe",
    "recipes_folder",
]


def __getattr__(name: str) -> Any:
    """Import what takes seconds when it is asked for: the planner imports TRL, the embedded model torch."""
    if name in ("Embedded", "embedded"):
        return getattr(importlib.import_module(".embedded_model", __name__), name)
    if name == "plan_recipe":
        require("cli", "plan_recipe")
        from .planning import plan_recipe

        return plan_recipe
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
