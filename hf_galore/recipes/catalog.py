"""The recipes that come with hf_galore, as a list: what each is for, its model, its card and its planned peak.

All of it is read from the recipes: card and peak from the one line of a header that plans the recipe,

    #   hf-galore plan --config llama2_7b_oasst2.yaml --vram 24GB # peak: 18.50 GiB

Nothing here needs torch: a list is shown at once.
"""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path
from typing import NamedTuple

from ..config import nearest
from ..errors import UserError
from .config_file import read
from .folders import OF_OTHERS, known_recipes, recipes_folder
from .kinds import QUICKSTART, command_of

_PLAN = re.compile(
    r"^#   (?:hf-galore plan|axolotl galore-plan) .*?"
    r"(?:--num_processes (?P<cards>\d+) --sharded )?(?:--vram (?P<card>\S+) *)?# peak: (?P<peak>\d+\.\d+) GiB$",
    re.MULTILINE,
)
_MODELS = ("model_name_or_path", "config_name", "base_model")
_ORDER = ("quickstart", "sft", "dpo", "pretrain", "glue")
_OTHERS = {
    "accelerate": "accelerate launch",
    "axolotl": "axolotl train",
    "llamafactory": "llamafactory-cli train",
}


class Listed(NamedTuple):
    """A recipe of the list."""

    name: str
    """As `--config` takes it."""
    command: str
    """The command that runs it: `hf-galore sft` without its `hf-galore`, or another program."""
    model: str | None
    """The model's name; `None` where the command makes it."""
    card: str | None
    """What `--vram` has in its header; `None` where any card will do, or none."""
    cards: int
    """How many of them it is for: with more than one it is for FSDP2."""
    peak_gib: float | None
    """The planned peak, of a rank where there are several; `None` where the header has it in words."""
    about: str
    """The header's first sentence."""
    licence: str | None
    """What has to be done before the model can be downloaded, if anything."""


def catalog() -> list[Listed]:
    """The recipes for hf-galore's commands, by command."""
    found = [listed(name) for name in known_recipes()]
    return sorted(found, key=lambda recipe: (_ORDER.index(recipe.command), recipe.name))


def of_others() -> list[Listed]:
    """The configurations for other programs: accelerate's launcher, axolotl, LLaMA-Factory."""
    folder = recipes_folder()
    found = (path for other in OF_OTHERS if other in _OTHERS for path in (folder / other).glob("*.yaml"))
    return [listed(path.relative_to(folder).as_posix()) for path in sorted(found)]


def listed(name: str) -> Listed:
    """What the list says of a recipe.

    Args:
        name: its path below the folder of the recipes.
    """
    path = recipes_folder() / name
    text = path.read_text(encoding="utf-8")
    keys = read(path)
    plan = _PLAN.search(text)
    header = _header(text)
    licence = re.search(r"Needs access to .*?\(.*?\)", header)
    return Listed(
        name=name,
        command=_OTHERS.get(Path(name).parts[0]) or command_of(path),
        model=next((str(keys[key]) for key in _MODELS if key in keys), None),
        card=plan["card"] if plan else None,
        cards=int(plan["cards"] or 1) if plan else 1,
        peak_gib=float(plan["peak"]) if plan else None,
        about=re.split(r"(?<=[.:]) ", header, maxsplit=1)[0].rstrip(":"),
        licence=f"{licence[0]}." if licence else None,
    )


def _header(text: str) -> str:
    """The comment that a recipe begins with, in one line."""
    lines = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").strip())
    return " ".join(lines)


def find(name: str) -> Path:
    """The file of a recipe of the list.

    Args:
        name: `llama2_7b_oasst2`, `llama2_7b_oasst2.yaml`, `recipes/llama2_7b_oasst2.yaml` or `axolotl/....yaml`.

    Raises:
        UserError: none is called so.
    """
    names = [*known_recipes(), *(recipe.name for recipe in of_others())]
    if not name.strip():
        raise UserError("give a recipe's name: hf-galore recipes lists them.")
    wanted = name.strip().removeprefix("./").removeprefix("recipes/")
    wanted = wanted if wanted.endswith((".yaml", ".yml")) else f"{wanted}.yaml"
    matching = [known for known in names if wanted in (known, Path(known).name)]
    if wanted in names:
        matching = [wanted]
    if len(matching) == 1:
        return recipes_folder() / matching[0]
    if matching:
        raise UserError(f"{name} is {' or '.join(matching)}. Say which.")
    holding = [known for known in names if name in known]
    close = f" Is it {' or '.join(holding[:3])}?" if holding else ""
    close = close or nearest(wanted, names) or nearest(wanted, [Path(known).name for known in names])
    raise UserError(f"no recipe that comes with hf_galore is called {name}.{close} hf-galore recipes lists them.")


def copy(name: str, folder: Path, *, overwrite: bool) -> Path:
    """Copy a recipe into a folder, which is made if it is not there, and return the copy.

    What a recipe names beside itself (`recipes/chatml`, a model's config) a copy finds in the installed package.

    Args:
        name: as `find` takes it.
        folder: where to.
        overwrite: whether a file of that name may be there.

    Raises:
        UserError: there is no such recipe, or a file in its place, or the folder cannot be written to.
    """
    source = find(name)
    target = folder / source.name
    if target.exists() and not overwrite:
        raise UserError(f"{target} is there already. Give another folder by --to, or --overwrite to replace it.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    except OSError as error:
        raise UserError(f"{target} cannot be written: {error.strerror or error}.") from error
    return target


def next_commands(recipe: Listed, path: Path) -> list[str]:
    """What to run with a copy of a recipe: its plan, and the recipe itself.

    Args:
        recipe: what was copied.
        path: the copy.
    """
    file = shlex.quote(str(path))
    if recipe.command == "accelerate launch":
        return [f"accelerate launch --config_file {file} -m hf_galore sft --config recipe.yaml"]
    if recipe.command == "llamafactory-cli train":
        return [f"python -m hf_galore llamafactory-cli train {file}"]
    if recipe.command == "axolotl train":
        return [f"axolotl galore-plan {file} --vram {recipe.card}", f"axolotl train {file} --launcher python"]
    if recipe.name == QUICKSTART:  # a copy is a recipe like any other, for a model and data of one's own
        return [f"hf-galore sft --config {file} --model_name_or_path MODEL --dataset_name DATA"]
    card = f" --vram {recipe.card}" if recipe.card else ""
    if recipe.cards > 1:
        launch = f"accelerate launch --config_file fsdp2.yaml --num_processes {recipe.cards}"
        return [
            "hf-galore recipes --copy accelerate/fsdp2.yaml",
            f"hf-galore plan --config {file} --num_processes {recipe.cards} --sharded{card}",
            f"{launch} -m hf_galore {recipe.command} --config {file}",
        ]
    return [f"hf-galore plan --config {file}{card}", f"hf-galore {recipe.command} --config {file}"]
