"""What one option of a recipe is, by the parser of the command, whose libraries take seconds to import."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from ..config import OPTIONS
from ..errors import UserError
from ..recipes import dpo, glue, pretrain, sft
from ..recipes.parser import RecipeParser
from ..recipes.value_types import in_words
from ..synonyms import TRAINING, hint, plain, synonym

WIDTH = 80


def parser_of(command: str) -> RecipeParser:
    """The parser of the keys that a command's recipes have; those of `sft` for what is no training command."""
    of_commands: dict[str, Sequence[type]] = {
        "dpo": dpo.DATACLASSES,
        "pretrain": pretrain.DATACLASSES,
        "glue": glue.DATACLASSES,
    }
    dataclass_types = of_commands.get(command, sft.DATACLASSES)
    return RecipeParser(dataclass_types, prog=f"hf-galore {command}", allow_abbrev=False)


def option_help(command: str, name: str) -> str:
    """What an option is: its type, its default and its text.

    Raises:
        UserError: there is no such option.
    """
    parser = parser_of(command)
    known = parser.known_keys()
    key = plain(name)
    key = key if key in known else synonym(key, TRAINING, known) or key
    if key not in known:
        raise UserError(f"there is no option {name}.{hint(name, ['all', *known], OPTIONS)}")
    default = parser.get_default(parser.renamed.get(key, key))
    choices = parser.choices(key)
    kind = in_words(parser.hints[key]) if choices is None else f"one of {', '.join(choices)}"
    shown = "" if default is None else f"; by default {default}"
    text = " ".join((parser.actions[key].help or "").replace("%%", "%").split())
    lines = [
        textwrap.fill(f"--{key}: {kind}{shown}.", WIDTH, break_on_hyphens=False),
        textwrap.fill(text, WIDTH, break_on_hyphens=False),
    ]
    return "\n".join(line for line in lines if line)
