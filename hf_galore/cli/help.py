"""`--help` of the commands that take recipes: a first screen of what matters, every option, or one of them.

The first screen and GaLore's keys need none of the libraries whose arguments the options are, which take seconds.
"""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Sequence

from ..config import OPTIONS, GaLoreConfig, Key, keys
from ..synonyms import GALORE, plain, synonym
from .help_screens import LONGER, SCREENS, Option

WIDTH = 80
ALL = "all"
FLAGS = ("-h", "--help")


def topic_of(arguments: Sequence[str]) -> str | None:
    """What help is wanted with: `all`, an option's name, or an empty string for the first screen; `None` for none."""
    for index, item in enumerate(arguments):
        flag, _, topic = item.partition("=")
        if flag in FLAGS:
            following = arguments[index + 1] if index + 1 < len(arguments) else ""
            return topic or ("" if following.startswith("-") else following)
    return None


def first_screen(command: str) -> str:
    """The first screen of a command's help; no line is longer than 80 columns."""
    screen = SCREENS[command]
    parts = [
        textwrap.fill(f"usage: {screen.usage}", WIDTH, subsequent_indent=" " * 11),
        textwrap.fill(screen.about, WIDTH),
        _table([(_as_typed(option), option.text) for option in screen.options]),
        "GaLore's keys, in --optim_args 'rank=256, scale=1', with their defaults:\n" + _key_table(),
        "\n".join(screen.examples),
        "--help all lists every option; --help NAME explains one: --help rank.",
    ]
    return "\n\n".join(parts)


def explanation(command: str, name: str) -> str:
    """What one option is, or one of GaLore's keys, by its name or what people call it elsewhere.

    Raises:
        UserError: there is no such option.
    """
    key = plain(name)
    wanted = key if key in OPTIONS else synonym(key, GALORE, OPTIONS)
    if wanted is not None:
        return _explained(next(known for known in keys() if known.name == wanted))
    own = next((option for option in SCREENS[command].own if option.name == key), None)
    if own is not None:
        return f"{_as_typed(own)}: {own.text}"
    if key in LONGER:
        below = f"\n\n{_key_table()}" if key == "optim_args" else ""
        return textwrap.fill(f"--{key}: {LONGER[key]}", WIDTH, break_on_hyphens=False) + below
    from .help_options import option_help  # which imports TRL

    return option_help(command, name)


def _as_typed(option: Option) -> str:
    return f"--{option.name} {option.default}".rstrip()


def _row_of(key: Key) -> tuple[str, str]:
    if not key.is_set:
        return key.name, f"{', '.join(key.values)}: {key.meaning}"
    others = [value for value in key.values if value != key.default]
    choice = f"or {', '.join(others)}" if len(others) < len(key.values) else ", ".join(others)
    return f"{key.name}={key.default}", f"{choice}: {key.meaning}"


def _key_table() -> str:
    return _table([_row_of(key) for key in keys()])


def _table(rows: Sequence[tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"  {name:<{width}}  {text}".rstrip() for name, text in rows)


def _explained(key: Key) -> str:
    head = f"{key.name}, in --optim_args '{key.name}=..., ...': {', '.join(key.values)}; by default {key.default}."
    return f"{textwrap.fill(head, WIDTH)}\n{textwrap.fill(_documented(key), WIDTH)}"


def _documented(key: Key) -> str:
    """What the docstring of the configuration says of a key; its short meaning where Python has dropped docstrings."""
    documentation = inspect.getdoc(GaLoreConfig) or ""
    found = re.search(rf"^    {key.name}: (.*?)(?=^    \w+: |^$)", documentation, re.MULTILINE | re.DOTALL)
    text = " ".join(found[1].split()) if found else f"{key.meaning}."
    return text[0].upper() + text[1:]
