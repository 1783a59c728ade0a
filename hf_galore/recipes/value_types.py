"""Whether a value, read from YAML, is of the type that its key has in a dataclass; and the error where it is not."""

from __future__ import annotations

import enum
import types
from collections.abc import Sequence
from typing import Any, Literal, Union, get_args, get_origin

from ..config import nearest
from ..synonyms import DTYPES
from .config_file import shortened


def problem_with(value: Any, hint: Any, choices: Sequence[str] | None) -> str | None:
    """What is wrong with the value of a key, to follow the key's name in an error; `None` where nothing is.

    Args:
        value: from YAML.
        hint: the type hint of the dataclass's field.
        choices: what the value has to be one of, where the parser restricts it.
    """
    if choices is not None and value is not None:
        if isinstance(value, str if hint is not int else (str, int)) and str(value) in choices:
            return None
        hint_no = " A bare no is false in YAML; write 'no'." if value is False and "no" in choices else ""
        near = _meant(value, choices) if isinstance(value, str) else ""
        return f"has to be one of {', '.join(choices)}, but is {shortened(value)}.{hint_no}{near}"
    if fits(value, hint):
        return None
    return f"has to be {in_words(hint)}, but is {shortened(value)}."


def _meant(value: str, choices: Sequence[str]) -> str:
    meant = DTYPES.get(value.lower())
    return f" Did you mean {meant!r}?" if meant in choices else nearest(value, list(choices))


def fits(value: Any, hint: Any) -> bool:
    """Whether `value` is of the type `hint`, or is text that the parser turns into it."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return any(fits(value, option) for option in get_args(hint))
    if origin is Literal:
        return value in get_args(hint)
    if origin is list:
        (item,) = get_args(hint)
        return isinstance(value, list) and all(fits(element, item) for element in value)
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


def in_words(hint: Any) -> str:
    """A type as an error message names it: `an integer`, `a string or a list of strings`."""
    origin, options = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(in_words(option) for option in options if option is not type(None))
    if origin is Literal:
        return "one of " + ", ".join(map(str, options))
    if origin is list:
        return f"a list of {_PLURALS.get(options[0], 'mappings')}"
    return _NAMES.get(hint, "a string" if isinstance(hint, type) and issubclass(hint, enum.Enum) else "a mapping")


_NAMES: dict[Any, str] = {bool: "true or false", int: "an integer", float: "a number", str: "a string"}
_PLURALS: dict[Any, str] = {str: "strings", int: "integers", float: "numbers"}
