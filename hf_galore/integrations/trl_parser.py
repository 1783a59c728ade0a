"""TRL's parser of recipes and command lines, able to take lists where an argument is a string or a list of them."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable
from typing import Any, get_args, get_origin, get_type_hints

from trl import TrlParser

# transformers renamed them after 5.20; recipes have the new names.
OLD_NAMES = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}


class ListParser(TrlParser):
    """`TrlParser` with `--key a b`, `--key '["a", "b"]'` and `--key a` where a dataclass allows a string or a list.

    `--key a,b` and `--key [a,b]` are the list too, where those are plain names. Reads options from no file beside the
    program, and takes `--resume_from_checkpoint` without a value.

    Attributes:
        hints: the types of all fields of the dataclasses, by name.
        renamed: older names that this transformers has, by the newer ones.
        actions: what `argparse` does with an argument, by the name of its field.
        lists: the arguments that may be one string or a list of them.
    """

    def __init__(self, dataclass_types: Iterable[type], **kwargs: Any) -> None:
        dataclass_types = list(dataclass_types)
        self.hints: dict[str, Any] = {}
        self.renamed: dict[str, str] = {}
        self.actions: dict[str, argparse.Action] = {}
        self.lists: set[str] = set()
        for dataclass_type in dataclass_types:
            self.hints.update(get_type_hints(dataclass_type))
        twice = [old for old, new in OLD_NAMES.items() if {old, new} <= set(self.hints)]
        super().__init__(dataclass_types=dataclass_types, **kwargs)
        # TRL gives defaults to the old names, of which transformers warns as of a user's: they go to the new ones.
        self._of_old_names = {old: self.get_default(old) for old in twice}
        self.set_defaults(**dict.fromkeys(twice))

    def add_argument(self, *flags: str, **kwargs: Any) -> argparse.Action:
        """Add an argument, as TRL's parser does for each field of a dataclass."""
        name = flags[0].lstrip("-")
        if {str, list[str]} <= set(get_args(self.hints.get(name))):
            kwargs.update(nargs="+", action=_OneOrMany)  # TRL's takes one string
            self.lists.add(name)
        elif name == "resume_from_checkpoint":
            kwargs.update(nargs="?", const="true")
        new = OLD_NAMES.get(name)
        if new is not None and new not in self.hints and name in self.hints:
            flags = (*flags, f"--{new}", f"--{new.replace('_', '-')}")
            self.hints[new], self.renamed[new] = self.hints[name], name
        self.actions[name] = super().add_argument(*flags, **kwargs)
        if new in self.renamed:
            self.actions[new] = self.actions[name]
        return self.actions[name]

    def set_defaults_with_config(self, **kwargs: Any) -> list[str]:
        """Take a file's values for defaults, as TRL's parser, under the names that this transformers has."""
        values = {self.renamed.get(key, key): self.as_typed(key, value) for key, value in kwargs.items()}
        unknown: list[str] = super().set_defaults_with_config(**values)
        return unknown

    def as_typed(self, key: str, value: Any) -> Any:
        """A file's value in the type that its key has, where YAML has another way to write it.

        One name instead of a list of names, which the libraries would take apart by its letters; `a, b` where a string
        would be a regular expression, as on the command line; and a mapping where that has `key=value, key=value`.
        """
        hint = self.hints.get(key)
        kinds = {hint} if get_origin(hint) is list else set(get_args(hint))
        if isinstance(value, str) and list[str] in kinds and str not in kinds:
            return [value]
        if isinstance(value, str) and {list[str], str} <= kinds:
            return _listed(value) or value
        if key == "optim_args" and isinstance(value, dict) and not any(map(_is_nested, value.values())):
            return ", ".join(
                f"{name}={str(one).lower() if isinstance(one, bool) else one}" for name, one in value.items()
            )
        return value

    def parse_known_args(self, *args: Any, **kwargs: Any) -> Any:
        """Parse; what has an old and a new name and is given by neither gets the default by the new one."""
        namespace, rest = super().parse_known_args(*args, **kwargs)
        for old, default in self._of_old_names.items():
            if getattr(namespace, old) is None and getattr(namespace, OLD_NAMES[old]) is None:
                setattr(namespace, OLD_NAMES[old], default)
        return namespace, rest

    def parse_args_into_dataclasses(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Parse, as TRL's parser, but for a file of options (`hf-galore.args`) that it would look for."""
        parsed: tuple[Any, ...] = super().parse_args_into_dataclasses(*args, **{**kwargs, "look_for_args_file": False})
        return parsed


def _is_nested(value: Any) -> bool:
    return value is None or isinstance(value, (dict, list))


class _OneOrMany(argparse.Action):
    """`--key a b`, `--key '["a", "b"]'` and `--key a`: the first two are lists, the last is the string.

    And what is meant by no regular expression: `--key a,b`, and `--key [a, b]` as a shell hands it on.
    """

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, flag: str | None = None
    ) -> None:
        setattr(namespace, self.dest, self._decoded(values))

    def _decoded(self, values: list[str]) -> str | list[str]:
        text = " ".join(values)
        if text.lstrip().startswith("["):
            try:
                decoded = json.loads(text)
            except json.JSONDecodeError:
                pass
            else:
                if not all(isinstance(value, str) for value in decoded):
                    raise argparse.ArgumentError(self, f"{text} is not a list of strings")
                return list(decoded)
        return _listed(text) or (values if len(values) > 1 else values[0])


def _listed(text: str) -> list[str] | None:
    """The names in `a, b`, `a b` and `[a, "b"]`; `None` for a regular expression, of which a single name is one too."""
    text = text.strip()
    if text.startswith("[") and text.endswith("]"):
        names = [item.strip().strip("'\"") for item in text[1:-1].split(",")]
    else:
        names = text.replace(",", " ").split()
    return names if len(names) > 1 and all(map(_PLAIN_NAME.fullmatch, names)) else None


# Names of modules, and parts of them, which a comma cannot be in.
_PLAIN_NAME = re.compile(r"[\w.-]+")
