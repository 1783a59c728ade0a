"""What a key of `optim_args` may be: how it is read from text, how it is checked, and both in words."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

AUTO: Literal["auto"] = "auto"
"""The `scale` that goes with the rank."""
OF_WHOLE_MATRICES = ("muon", "normuon")
"""The values of `residual` with which `rule=muon` orthogonalises whole matrices."""


@dataclasses.dataclass(frozen=True)
class Option:
    """What one key may be: how to read it from text, how to check it, and both in words."""

    parse: Callable[[str], Any]
    is_valid: Callable[[Any], bool]
    allowed: str
    """In an error: "has to be ..."."""
    values: tuple[str, ...]
    """In a table: each of them as it is written, or one that describes them all."""


def written(value: Any) -> str:
    """A value as `optim_args` has it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def integer_from(least: int) -> Option:
    """An integer of at least `least`."""
    # bool is an int in Python; `rank=True` is a mistake, not rank 1.
    return Option(
        int,
        lambda v: isinstance(v, int) and not isinstance(v, bool) and v >= least,
        f"an integer of at least {least}",
        (f"integer ≥ {least}",),
    )


def positive_float() -> Option:
    """A finite number above 0."""
    return Option(
        float,
        lambda v: isinstance(v, (int, float)) and not isinstance(v, bool) and 0 < v <= sys.float_info.max,
        "a finite number above 0",
        ("number > 0",),
    )


def one_of(values: tuple[Any, ...]) -> Option:
    """One of some values of one type."""
    kind, written = type(values[0]), tuple(map(str, values))
    return Option(kind, lambda v: type(v) is kind and v in values, "one of " + ", ".join(written), written)


def _parse_bool(text: str) -> bool:
    # bool("False") is true.
    return {"true": True, "false": False}[text.lower()]


def boolean() -> Option:
    """True or false."""
    return Option(_parse_bool, lambda v: isinstance(v, bool), "true or false", ("true", "false"))


def or_auto(option: Option) -> Option:
    """The option, with `auto`, and multiples of it (`auto*8`), for what follows from the rank."""

    def parse(text: str) -> Any:
        factor = auto_factor(text)
        if factor is None:
            return option.parse(text)
        return AUTO if factor == 1 else f"{AUTO}*{factor:g}"

    return Option(
        parse,
        lambda v: auto_factor(v) is not None if isinstance(v, str) else option.is_valid(v),
        f"{option.allowed}, or {AUTO}, or a multiple of it such as {AUTO}*8",
        (*option.values, AUTO, f"{AUTO}*number"),
    )


def auto_factor(value: Any) -> float | None:
    """What `auto` is multiplied with: 1 of `auto`, 8 of `auto*8`; `None` of anything else."""
    if not isinstance(value, str):
        return None
    name, star, factor = value.replace(" ", "").lower().partition("*")
    if name != AUTO:
        return None
    try:
        number = float(factor) if star else 1.0
    except ValueError:
        return None
    return number if 0 < number <= sys.float_info.max else None


def or_none(option: Option) -> Option:
    """The option, with `None` for what something else decides."""
    return dataclasses.replace(option, is_valid=lambda v: v is None or option.is_valid(v))


class Key(NamedTuple):
    """A key of `optim_args`, in words: what a screen of help and a table of the documentation show."""

    name: str
    values: tuple[str, ...]
    """Each of them as it is written, or one that describes them all: `integer ≥ 1`."""
    default: str
    """As it is written; where something else decides, what that is."""
    meaning: str
    """In at most 45 characters, for a screen."""
    is_set: bool
    """Whether the default is a value, rather than what something else decides."""
