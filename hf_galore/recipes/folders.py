"""Where the recipes and the models' configs are that come with hf_galore, and what `--config NAME` finds."""

from __future__ import annotations

from pathlib import Path

from ..config import nearest
from ..errors import UserError

# What hatch_build.py calls the checkout's recipes/ in a wheel. An editable install has no copy of it.
BUNDLED = "bundled"

OF_OTHERS = ("accelerate", "axolotl", "llamafactory", "lm_eval")
"""Folders of what other programs read: their configurations and tasks. No command trains by one."""


def recipes_folder() -> Path:
    """The folder of the recipes that come with hf_galore: in an installed package, or beside it in a checkout."""
    installed = Path(__file__).resolve().with_name(BUNDLED)
    return installed if installed.is_dir() else installed.parents[2] / "recipes"


def configs_folder() -> Path:
    """The folder of the configs that come with hf_galore; in it a folder for each model, by its name on the Hub."""
    return recipes_folder() / "configs"


def known_models() -> list[str]:
    """The names of the models whose configs come with hf_galore."""
    return sorted(str(path.parent.relative_to(configs_folder())) for path in configs_folder().rglob("config.json"))


def known_recipes() -> list[str]:
    """The recipes that come with hf_galore, as `--config` takes them."""
    files = (path.relative_to(recipes_folder()) for path in recipes_folder().rglob("*.yaml"))
    return sorted(file.as_posix() for file in files if file.parts[0] not in OF_OTHERS)


def find_recipe(name: str) -> Path:
    """The file that `--config name` means: a path, or else a recipe that comes with hf_galore.

    Args:
        name: a path, or `llama2_7b_oasst2.yaml`, or `recipes/llama2_7b_oasst2.yaml`.

    Raises:
        UserError: there is neither.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        raise UserError(f"--config {name} is a folder; give a YAML file in it.")
    packaged = recipes_folder()
    if not path.is_absolute():
        below = path.relative_to("recipes") if path.parts[:1] == ("recipes",) else path
        if (packaged / below).is_file():
            return packaged / below
    raise UserError(
        f"--config {name}: there is no such file, and no such recipe comes with hf_galore."
        f"{nearest(name, known_recipes())} hf-galore recipes lists them."
    )
