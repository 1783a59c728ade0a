"""From `--config FILE --key value ...` to TRL's dataclasses, with every mistake found before anything is loaded.

TRL's parser does the parsing, so that a recipe is what `trl sft` reads. But it hands a recipe's values on unchecked
(`per_device_train_batch_size: [8]` fails deep inside the Trainer), and so they are checked here first, against the
type hints of the dataclasses.
"""

from __future__ import annotations

import argparse
import enum
import json
import types
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn, Union, get_args, get_origin, get_type_hints

import yaml
from transformers import TrainingArguments
from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, SFTConfig, TrlParser

from ..config import nearest
from ..integrations.trainer import KINDS, optim_name
from .errors import UserError

DATACLASSES = (ScriptArguments, SFTConfig, ModelConfig, DatasetMixtureConfig)


MARKS = {"pretrain": {"config_name"}, "glue": {"task_name", "train_file"}}
"""Keys that say which command a recipe is for: no other command has them."""


class Arguments(NamedTuple):
    """What `trl sft` gets from a recipe and the command line, by its names, and the recipe's file if there is one."""

    script: ScriptArguments
    training: SFTConfig
    model: ModelConfig
    dataset: DatasetMixtureConfig
    recipe: Path | None


def parse(arguments: Sequence[str], prog: str, about: str) -> Arguments:
    """Read a command's arguments: `--config FILE`, and `--key value` items that override what the file says.

    Args:
        arguments: what follows the command's name.
        prog: the command, for its help.
        about: what it does, for its help.

    Raises:
        UserError: no such file, no YAML mapping, an unknown key, a value of the wrong type or out of range.
        SystemExit: `--help` was among them and has been shown.
    """
    (script, training, model, dataset), path = parse_into(DATACLASSES, arguments, prog, about)
    _find_template(training, path)
    return Arguments(script, training, model, dataset, path)


def parse_into(
    dataclass_types: Sequence[type], arguments: Sequence[str], prog: str, about: str
) -> tuple[list[Any], Path | None]:
    """Likewise, into other dataclasses than `trl sft`'s: one of each, and the recipe's file."""
    name, rest = take_config(arguments)
    parser = _RecipeParser(
        dataclass_types,
        prog=prog,
        usage=f"{prog} --config FILE [--key value ...]",
        description=about,
        allow_abbrev=False,
    )
    path = None if name is None else find_recipe(name)
    config = {} if path is None else read(path)
    if path is not None:
        _check_values(path, config, parser)
    _check_renamed({*config, *(key_of(item) for item in rest if item.startswith("--"))})
    _, unknown = parser.parse_known_args(rest)
    if unknown:
        raise UserError(_explain_unknown(unknown[0], parser))
    try:
        parsed = parser.parse_args_and_config([*(["--config", str(path)] if path else []), *rest])
    except (ValueError, TypeError, ImportError) as error:  # the dataclasses check values of their own
        raise UserError(str(error)) from error
    _drop_other_optims(parsed, config, {key_of(item) for item in rest if item.startswith("--")})
    return list(parsed), path


def _drop_other_optims(parsed: Iterable[Any], config: dict[str, Any], given: set[str]) -> None:
    """`--optim adamw_torch` over a GaLore recipe: what the recipe tells GaLore is not for AdamW."""
    if "optim" not in given or config.get("optim") not in KINDS:
        return
    for values in parsed:
        if isinstance(values, TrainingArguments) and optim_name(values) not in KINDS:
            for key in {"optim_args", "optim_target_modules"} - given:
                setattr(values, key, None)


# ---- finding and reading


def recipes_folder() -> Path:
    """Where the recipes that come with hf_galore are: in the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "recipes"
    return installed if installed.is_dir() else package.parent / "recipes"


def configs_folder() -> Path:
    """The configs that come with hf_galore, in folders of their models' names on the Hub."""
    return recipes_folder() / "configs"


def known_models() -> list[str]:
    """The models whose configs come with hf_galore."""
    return sorted(str(path.parent.relative_to(configs_folder())) for path in configs_folder().rglob("config.json"))


def known_recipes() -> list[str]:
    """The recipes that come with hf_galore, as `--config` takes them."""
    files = (path.relative_to(recipes_folder()) for path in recipes_folder().rglob("*.yaml"))
    return sorted(file.as_posix() for file in files if file.parts[0] != "lm_eval")  # in which are tasks of lm-eval


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
    known = known_recipes()
    raise UserError(
        f"--config {name}: there is no such file, and no such recipe comes with hf_galore "
        f"({', '.join(known)}).{nearest(name, known)}"
    )


def take_config(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """The value of `--config`, in either spelling, and the other arguments.

    Raises:
        UserError: `--config` is without a file, or given twice.
    """
    name: str | None = None
    rest: list[str] = []
    items = iter(arguments)
    for item in items:
        flag, equals, value = item.partition("=")
        if flag != "--config":
            rest.append(item)
            continue
        given = value if equals else next(items, "")
        if not given or given.startswith("--"):
            raise UserError("--config needs a file: --config recipe.yaml.")
        if name is not None:
            raise UserError(f"--config is given twice: {name} and {given}. Give one.")
        name = given
    return name, rest


def read(path: Path) -> dict[str, Any]:
    """A recipe's keys and values.

    Raises:
        UserError: it cannot be read, is no YAML mapping, or gives a key twice.
    """
    try:
        text = path.read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        config = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(config, dict):
        raise UserError(f"{path} has to hold 'key: value' lines, but holds {_short(config)}.")
    assert isinstance(node, yaml.MappingNode)
    seen: set[str] = set()
    for key, _ in node.value:  # PyYAML would take the last of them without a word
        if key.value in seen:
            raise UserError(f"{path}, line {key.start_mark.line + 1}: {key.value!r} is given twice. Give it once.")
        seen.add(key.value)
    return config


def _find_template(training: SFTConfig, recipe: Path | None) -> None:
    """Let a recipe name a template beside it or in a folder beside its own, from whatever folder it is run."""
    name = training.chat_template_path
    if name is None or recipe is None or Path(name).exists():
        return
    for folder in recipe.resolve().parents[:2]:
        if (folder / name).exists():
            training.chat_template_path = str(folder / name)
            return


# ---- the parser


class _OneOrMany(argparse.Action):
    """`--key a b`, `--key '["a", "b"]'` and `--key a`: the first two are lists, the last is the string."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, flag: str | None = None
    ) -> None:
        setattr(namespace, self.dest, self._decoded(values, flag))

    def _decoded(self, values: list[str], flag: str | None) -> str | list[str]:
        if len(values) > 1:
            return values
        if not values[0].lstrip().startswith("["):
            return values[0]
        try:
            decoded = json.loads(values[0])
        except json.JSONDecodeError:
            return values[0]  # a regular expression may begin so
        if not all(isinstance(value, str) for value in decoded):
            raise argparse.ArgumentError(self, f"{values[0]} is not a list of strings")
        return list(decoded)


class _RecipeParser(TrlParser):
    """TRL's parser, strict, and able to take lists where a dataclass allows a string or a list of them."""

    def __init__(self, dataclass_types: Iterable[type], **kwargs: Any) -> None:
        self.hints: dict[str, Any] = {}
        self.actions: dict[str, argparse.Action] = {}
        for dataclass_type in dataclass_types:
            self.hints.update(get_type_hints(dataclass_type))
        super().__init__(dataclass_types=dataclass_types, **kwargs)

    def add_argument(self, *flags: str, **kwargs: Any) -> argparse.Action:
        name = flags[0].lstrip("-")
        if {str, list[str]} <= set(get_args(self.hints.get(name))):
            kwargs.update(nargs="+", action=_OneOrMany)  # TRL's takes one string
        elif name == "resume_from_checkpoint":
            kwargs.update(nargs="?", const="true")
        self.actions[name] = super().add_argument(*flags, **kwargs)
        return self.actions[name]

    def parse_args_into_dataclasses(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        # Otherwise options are also read from a file beside the program, `hf-galore.args`.
        parsed: tuple[Any, ...] = super().parse_args_into_dataclasses(*args, **{**kwargs, "look_for_args_file": False})
        return parsed

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}.")

    def known_keys(self) -> list[str]:
        """Every key that a recipe may have."""
        return [name for name in self.hints if name in self.actions]

    def choices(self, key: str) -> list[str] | None:
        """What the value of `key` has to be one of, if it is so."""
        choices = self.actions[key].choices
        return None if choices is None else [str(choice) for choice in choices]


def _explain_unknown(item: str, parser: _RecipeParser) -> str:
    if not item.startswith("-"):
        return f"{item!r} belongs to no --key. Options are given as --key value."
    flags = [f"--{name}" for name in parser.known_keys()]
    return f"there is no option {item.partition('=')[0]}.{nearest(f'--{key_of(item)}', flags)}"


# transformers takes the new name's value and drops the old one's without a word.
_RENAMED = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}


def _check_renamed(given: set[str]) -> None:
    for old, new in _RENAMED.items():
        if {old, new} <= given:
            raise UserError(f"{old} and {new} are both given, which are one option. Use {new} only.")


def key_of(flag: str) -> str:
    """`gradient_checkpointing` for `--gradient-checkpointing=true`, `--no_gradient_checkpointing` and the like."""
    return flag.partition("=")[0].lstrip("-").replace("-", "_").removeprefix("no_")


# ---- checking a recipe's values


def _check_values(path: Path, config: dict[str, Any], parser: _RecipeParser) -> None:
    known = parser.known_keys()
    for key, value in config.items():
        if key == "env":  # environment variables, which TRL's parser sets
            if not isinstance(value, dict):
                raise UserError(f"{path}: env has to be a mapping of names to values, but is {_short(value)}.")
            continue
        if key not in known:
            owner = next((command for command, marks in MARKS.items() if key in marks), None)
            hint = f" It is one of hf-galore {owner}." if owner else nearest(str(key), known)
            raise UserError(f"{path}: there is no option {key!r}.{hint}")
        problem = _problem(key, value, parser)
        if problem:
            raise UserError(f"{path}: {key} {problem}")


def _problem(key: str, value: Any, parser: _RecipeParser) -> str | None:
    """What is wrong with the value of a known key, to follow the key's name; `None` where nothing is."""
    hint, choices = parser.hints[key], parser.choices(key)
    if key == "resume_from_checkpoint" and isinstance(value, bool):
        return None  # the Trainer takes it, whatever the hint says
    if choices is not None and value is not None:
        if isinstance(value, str) and value in choices:
            return None
        hint_no = " A bare no is false in YAML; write 'no'." if value is False and "no" in choices else ""
        near = nearest(value, choices) if isinstance(value, str) else ""
        return f"has to be one of {', '.join(choices)}, but is {_short(value)}.{hint_no}{near}"
    if _fits(value, hint):
        return None
    return f"has to be {_words(hint)}, but is {_short(value)}."


def _fits(value: Any, hint: Any) -> bool:
    """Whether `value`, read from YAML, is of the type `hint`, or is text that the parser turns into it."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, option) for option in get_args(hint))
    if origin is Literal:
        return value in get_args(hint)
    if origin is list:
        (item,) = get_args(hint)
        return isinstance(value, list) and all(_fits(element, item) for element in value)
    if hint is bool:
        return isinstance(value, bool) or (isinstance(value, str) and value.lower() in _BOOLEANS)
    if hint in (int, float):
        # YAML 1.1 reads 1e-5, which has no dot, as text.
        return not isinstance(value, bool) and (isinstance(value, (int, hint)) or _is_text_of(hint, value))
    if hint is str or (isinstance(hint, type) and issubclass(hint, enum.Enum)):
        return isinstance(value, str)
    if hint is dict or origin is dict:
        return isinstance(value, dict)
    if hint is type(None):
        return value is None
    return isinstance(value, dict)  # a dataclass of TRL's, made from a mapping


_BOOLEANS = ("yes", "true", "t", "y", "1", "no", "false", "f", "n", "0")  # as HfArgumentParser has them


def _is_text_of(kind: type, value: Any) -> bool:
    try:
        return isinstance(value, str) and kind(value) is not None
    except ValueError:
        return False


def _words(hint: Any) -> str:
    origin, options = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_words(option) for option in options if option is not type(None))
    if origin is Literal:
        return "one of " + ", ".join(map(str, options))
    if origin is list:
        return f"a list of {_PLURALS.get(options[0], 'mappings')}"
    return _NAMES.get(hint, "a string" if isinstance(hint, type) and issubclass(hint, enum.Enum) else "a mapping")


_NAMES: dict[Any, str] = {bool: "true or false", int: "an integer", float: "a number", str: "a string"}
_PLURALS: dict[Any, str] = {str: "strings", int: "integers", float: "numbers"}


def _short(value: Any) -> str:
    """`value` as an error shows it."""
    if value is None:
        return "empty"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
