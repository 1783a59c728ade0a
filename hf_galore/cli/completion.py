"""`hf-galore completion bash|zsh|fish`: a script that completes commands, options and their values.

All names are in the script: a shell that completes starts no Python. They are those of the releases that are installed
when the script is made.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import itertools
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from ..recipes.catalog import of_others
from ..recipes.folders import known_recipes
from .arguments import CommandParser
from .completion_scripts import Words, bash, fish, zsh
from .main import COMMANDS

if TYPE_CHECKING:  # which brings TRL
    from ..integrations.trl_parser import ListParser

PROG = "hf-galore completion"
ABOUT = """Print a script that makes a shell complete hf-galore's commands, options,
recipes and values. Put it where the shell looks for such, once:

  mkdir -p ~/.local/share/bash-completion/completions
  hf-galore completion bash > ~/.local/share/bash-completion/completions/hf-galore

  hf-galore completion zsh > ~/.zfunc/_hf-galore   # ~/.zshrc: fpath+=(~/.zfunc)
                                                   # before compinit
  hf-galore completion fish > ~/.config/fish/completions/hf-galore.fish

It holds the options of the releases that are installed: make it anew after an
upgrade."""

SHELLS = {"bash": bash, "zsh": zsh, "fish": fish}

_FIRST = ("galore_adamw_8bit_layerwise", "galore_adamw_8bit", "galore_adamw_layerwise", "galore_adamw")
# Options whose values are files, and those whose values are folders.
_FILES = ("config", "train_file", "validation_file", "test_file", "plot")
_FOLDERS = ("output_dir", "output", "to", "resume_from_checkpoint", "model_name_or_path", "dataset_name")


def parser() -> CommandParser:
    """Make the parser of the command's options."""
    made = CommandParser(PROG, ABOUT, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("shell", metavar="SHELL", choices=list(SHELLS), help=", ".join(SHELLS))
    return made


def run(arguments: Sequence[str]) -> int:
    """`hf-galore completion bash|zsh|fish`.

    Raises:
        UserError: something that was given is wrong.
        SystemExit: `--help` was among the arguments and has been shown.
    """
    shell = parser().read(arguments).shell
    print(SHELLS[shell](words()), end="")
    return 0


def words() -> Words:
    """Everything that is completed, of the releases that are installed."""
    from ..integrations.trl_parser import ListParser
    from ..plan.cards import CARDS
    from . import bench, chat, compare, doctor, plan, recipes

    parsers = {name: ListParser(dataclasses) for name, dataclasses in _dataclasses().items()}
    options = {name: ("config", *_keys(made), "help") for name, made in parsers.items()}
    options["quickstart"] = tuple(name for name in options["sft"] if name != "config")
    every = _united(*(options[name] for name in parsers))
    for name, about in (("plan", plan.ABOUT), ("compare", compare.ABOUT)):
        options[name] = _united(_flags_in(about), every)
    options["bench"] = _united(_flags_in(bench.ABOUT), options["sft"])
    for name, own in (("recipes", recipes), ("chat", chat), ("doctor", doctor)):
        options[name] = tuple(flag.removeprefix("--") for flag in own.parser().flags)
    values: dict[str, tuple[str, ...]] = {}
    for made in parsers.values():
        values.update(_values_of(made))
    names = tuple(known_recipes())
    everything = (*names, *(recipe.name for recipe in of_others()))
    values |= {"config": names, "copy": everything, "show": everything, "vram": tuple(CARDS)}
    values["optim"] = _united(_FIRST, values["optim"])
    return Words(COMMANDS, options, values, _FILES, _FOLDERS)


def _dataclasses() -> dict[str, Iterable[type]]:
    """Of each command that trains by a recipe, the dataclasses whose fields are its keys."""
    modules = {command: f"hf_galore.recipes.{command}" for command in COMMANDS}
    return {
        command: importlib.import_module(name).DATACLASSES
        for command, name in modules.items()
        if importlib.util.find_spec(name) is not None
    }


def _keys(parser: ListParser) -> list[str]:
    """The keys of recipes, in the one spelling that they have there."""
    return [name for name in parser.hints if name in parser.actions]


def _values_of(parser: ListParser) -> dict[str, tuple[str, ...]]:
    """Of each key its values, where there are few."""
    found = {}
    for key in _keys(parser):
        choices = parser.actions[key].choices
        if choices is not None:
            found[key] = tuple(map(str, choices))
        elif parser.hints[key] is bool:
            found[key] = ("true", "false")
    return found


def _flags_in(about: str) -> tuple[str, ...]:
    """The options that a command's description names as its own."""
    return tuple(dict.fromkeys(re.findall(r"--([a-z][a-z_]+)", about.replace("--key", ""))))


def _united(*parts: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(itertools.chain(*parts)))
