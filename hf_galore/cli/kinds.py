"""Which command a recipe is for: its keys say so."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from . import recipe

QUICKSTART = "quickstart.yaml"


def command_of(path: Path) -> str:
    """`pretrain`, `glue`, `quickstart` or `sft`: the command that the recipe in a file is for.

    Raises:
        UserError: it cannot be read, or is no recipe.
    """
    keys = set(recipe.read(path))
    if path.name == QUICKSTART and "model_name_or_path" not in keys:
        return "quickstart"
    return _marked(keys)


def command_for(arguments: Sequence[str]) -> str:
    """Likewise, of `--config FILE --key value ...`; a model that is given makes the quickstart's recipe one of `sft`.

    Raises:
        UserError: the file cannot be read, or is no recipe.
    """
    name, rest = recipe.take_config(arguments)
    keys = set() if name is None else set(recipe.read(recipe.find_recipe(name)))
    return _marked({*keys, *(recipe.key_of(item) for item in rest if item.startswith("--"))})


def _marked(keys: Iterable[str]) -> str:
    return next((command for command, marks in recipe.MARKS.items() if not marks.isdisjoint(keys)), "sft")
