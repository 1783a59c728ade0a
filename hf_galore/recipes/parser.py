"""From `--config FILE --key value ...` to dataclasses, with every mistake found before anything is loaded.

TRL's parser does the parsing, so that a recipe is what `trl sft` reads. But it hands a recipe's values on unchecked
(`per_device_train_batch_size: [8]` fails deep inside the Trainer), and so they are checked here first, against the
type hints of the dataclasses.
"""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from transformers import TrainingArguments

from ..config import OPTIONS
from ..errors import UserError
from ..integrations.trainer import KINDS, optim_name
from ..integrations.trl_parser import OLD_NAMES, ListParser
from ..synonyms import hint
from .bounds import check_bounds
from .config_file import key_of, keys_given, read, shortened, take_config
from .folders import find_recipe
from .kinds import MARKS
from .value_types import problem_with


def parse_into(dataclass_types: Sequence[type], arguments: Sequence[str], prog: str, about: str) -> Parsed:
    """Read a command's arguments: `--config FILE`, and `--key value` items that override what the file says.

    Args:
        dataclass_types: their fields are the keys.
        arguments: what follows the command's name.
        prog: the command, for its help.
        about: what it does, for its help.

    Raises:
        UserError: no such file, no YAML mapping, an unknown key, a value of the wrong type or out of range.
        SystemExit: `--help` was among them and has been shown.
    """
    name, rest = take_config(arguments)
    parser = RecipeParser(
        dataclass_types,
        prog=prog,
        usage=f"{prog} --config FILE [--key value ...]",
        description=about,
        allow_abbrev=False,
    )
    # A Trainer logs a loss of NaN as 0 otherwise; and on a GPU it waits for each loss to see whether it is.
    parser.set_defaults(logging_nan_inf_filter=False)
    path = None if name is None else find_recipe(name)
    config = {} if path is None else read(path)
    if path is not None:
        _check_values(path, config, parser)
    given = keys_given(rest)
    _check_renamed({*config, *given})
    _check_lists(rest, parser)
    spoken, unknown = parser.parse_known_args(rest)
    if unknown:
        raise UserError(_explain_unknown(unknown[0], rest, parser))
    over = {key: getattr(spoken, parser.renamed.get(key, key)) for key in given}
    check_bounds({**config, **over})
    if {**config, **over}.get("output_dir") == "":  # as of "$OUT" that is not set
        raise UserError("output_dir is empty: give the folder that the run is to be in.")
    try:
        parsed = parser.parse_args_and_config([*(["--config", str(path)] if path else []), *rest])
    except (ValueError, TypeError, ImportError) as error:  # the dataclasses check values of their own
        raise UserError(_without_bf16(error) or str(error)) from error
    _drop_other_optims(parsed, config, given)
    return Parsed(list(parsed), path, {**config, **over})


def _without_bf16(error: Exception) -> str | None:
    """What to do where bf16 is asked for and transformers finds no card that has it; `None` for another error."""
    if "support bf16" not in str(error):
        return None
    otherwise = "or give --use_cpu, or bf16: false"
    if torch.version.cuda is None and torch.version.hip is None:
        return (
            f"bf16 needs a card, and torch {torch.__version__} is a build for CPUs, which sees none. Install the build "
            f"for yours (https://pytorch.org/get-started/locally), {otherwise}."
        )
    if not torch.cuda.is_available():
        return (
            f"bf16 needs a card, and torch sees none: nvidia-smi says whether the driver does. Mend that, {otherwise}."
        )
    return f"bf16: {torch.cuda.get_device_name()} has no arithmetic in bfloat16. Set bf16: false, and dtype: float32."


def _drop_other_optims(parsed: Iterable[Any], config: dict[str, Any], given: set[str]) -> None:
    """Unset what a recipe tells GaLore where `--optim` replaces GaLore by another optimizer."""
    if "optim" not in given or config.get("optim") not in KINDS:
        return
    for values in parsed:
        if isinstance(values, TrainingArguments) and optim_name(values) not in KINDS:
            for key in {"optim_args", "optim_target_modules"} - given:
                setattr(values, key, None)


class Parsed(NamedTuple):
    """What a command's arguments come to."""

    values: list[Any]
    """An instance of each dataclass."""
    recipe: Path | None
    """The recipe's file, if one was given."""
    given: dict[str, Any]
    """What was said, by the file and over it by the command line, and not what is the default."""


class RecipeParser(ListParser):
    """TRL's parser, which takes lists too, with errors of ours."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}.")

    def known_keys(self) -> list[str]:
        """Every key that a recipe may have."""
        return [name for name in self.hints if name in self.actions]

    def choices(self, key: str) -> list[str] | None:
        """The values that `key` is restricted to; `None` where it is not."""
        choices = self.actions[key].choices
        return None if choices is None else [str(choice) for choice in choices]


def _explain_unknown(item: str, arguments: Sequence[str], parser: RecipeParser) -> str:
    if not item.startswith("-"):
        advice = _advice_on_stray(item, arguments, parser) or "Options are given as --key value."
        return f"{item!r} belongs to no --key. {advice}"
    flag = item.partition("=")[0]
    return f"there is no option {flag}.{hint(flag, parser.known_keys(), OPTIONS)}"


def _advice_on_stray(item: str, arguments: Sequence[str], parser: RecipeParser) -> str | None:
    """The words to type in place of those that ended in a word that no option takes."""
    stray = arguments.index(item)
    start = max((index for index in range(stray) if arguments[index].startswith("--")), default=None)
    if start is None:
        return None
    flag, _, value = arguments[start].partition("=")
    values = [*([value] if value else []), *_values_after(arguments, start)]
    if key_of(flag) in parser.lists:
        return f"Several values stand apart: {flag} {shlex.join(values)}"
    if key_of(flag) == "optim_args":
        text = ", ".join(value.strip(",") for value in values if value.strip(","))
        return f"They are one value, in quotes: {flag} '{text}'"
    return None


def _values_after(arguments: Sequence[str], start: int) -> list[str]:
    return list(itertools.takewhile(lambda item: not item.startswith("--"), arguments[start + 1 :]))


def _check_lists(arguments: Sequence[str], parser: RecipeParser) -> None:
    """Raise an error where a list is given an item at a time: argparse keeps the last of them."""
    for key in parser.lists:
        places = [index for index, item in enumerate(arguments) if item.startswith("--") and key_of(item) == key]
        if len(places) > 1:
            values = []
            for place in places:
                value = arguments[place].partition("=")[2]
                values += [*([value] if value else []), *_values_after(arguments, place)]
            raise UserError(f"--{key} is given twice. All its values come after one: --{key} {shlex.join(values)}")


def _check_renamed(given: set[str]) -> None:
    # transformers takes the new name's value and drops the old one's without a word.
    for old, new in OLD_NAMES.items():
        if {old, new} <= given:
            raise UserError(f"{old} and {new} are both given, which are one option. Use {new} only.")


def _check_values(path: Path, config: dict[str, Any], parser: RecipeParser) -> None:
    known = parser.known_keys()
    for key, value in config.items():
        if key == "env":  # environment variables, which TRL's parser sets
            if not isinstance(value, dict):
                raise UserError(f"{path}: env has to be a mapping of names to values, but is {shortened(value)}.")
            continue
        if key not in known:
            raise UserError(f"{path}: there is no option {key!r}.{_advice_on_key(key, value, known)}")
        if key == "resume_from_checkpoint" and isinstance(value, bool):
            continue  # the Trainer takes it, whatever the type hint says
        problem = problem_with(parser.as_typed(key, value), parser.hints[key], parser.choices(key))
        if problem and key == "optim_args":
            problem += " Write 'rank=128, scale=2', or {rank: 128, scale: 2} with a space after each colon."
        if problem:
            raise UserError(f"{path}: {key} {problem}")


def _advice_on_key(key: Any, value: Any, known: Sequence[str]) -> str:
    if isinstance(value, dict) and any(name in known for name in value):
        return " A recipe has no sections: all keys stand at the start of a line."
    owner = next((command for command, marks in MARKS.items() if key in marks), None)
    return f" It is one of hf-galore {owner}." if owner else hint(str(key), known, OPTIONS)
