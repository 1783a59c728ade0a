"""`--config FILE` among a command's arguments, and the YAML in that file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from ..errors import UserError


def take_config(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """The value of `--config FILE` or `--config=FILE`, and the other arguments.

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


def key_of(flag: str) -> str:
    """`gradient_checkpointing` for `--gradient-checkpointing=true`, `--no_gradient_checkpointing` and the like."""
    return flag.partition("=")[0].lstrip("-").replace("-", "_").removeprefix("no_")


def keys_given(arguments: Sequence[str]) -> set[str]:
    """The keys that `--key value ...` items set."""
    return {key_of(item) for item in arguments if item.startswith("--")}


def read(path: Path) -> dict[str, Any]:
    """Read a recipe's keys and values.

    Raises:
        UserError: it cannot be read, is no YAML mapping, or gives a key twice.
    """
    try:
        text = path.read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        config = yaml.safe_load(text)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not text in UTF-8 ({error.reason}). Save it in that encoding.") from error
    except yaml.MarkedYAMLError as error:
        raise UserError(f"{path} is not valid YAML{_where_and_why(error, text)}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(config, dict):
        holds = "is empty" if config is None else f"holds {shortened(config)}"
        raise UserError(f"{path} has to hold 'key: value' lines, but {holds}.")
    assert isinstance(node, yaml.MappingNode)
    seen: set[str] = set()
    for key, _ in node.value:  # PyYAML would take the last of them without a word
        if key.value in seen:
            raise UserError(f"{path}, line {key.start_mark.line + 1}: {key.value!r} is given twice. Give it once.")
        seen.add(key.value)
    return config


def _where_and_why(error: yaml.MarkedYAMLError, text: str) -> str:
    """The line of a mistake, and what to do there: PyYAML tells what its parser was about, and where it gave up."""
    problem, context = error.problem or "", error.context or ""
    line = 0 if error.problem_mark is None else error.problem_mark.line
    begun = line if error.context_mark is None else error.context_mark.line
    if "'\\t'" in problem:
        return f", line {line + 1}: there is a tab. YAML takes spaces only."
    if "quoted scalar" in context:
        return f", line {begun + 1}: a quotation mark is opened there that is not closed."
    if "flow sequence" in context or "flow mapping" in context:
        return f", line {begun + 1}: a bracket is opened there that is not closed, or a comma is missing."
    if "expected ':'" in problem:
        written = text.splitlines()[begun].split(" #")[0].strip()
        return f", line {begun + 1}: {shortened(written)} is not 'key: value'. A colon and a space stand between them."
    if "mapping values are not allowed" in problem:
        return f", line {line + 1}: there is a colon too many, or the line is indented. A value with ': ' needs quotes."
    if "block mapping" in f"{context} {problem}":
        return f", line {line + 1}: it begins in another column than the keys before it. All keys begin in the first."
    return f", line {line + 1}: {context} {problem}".rstrip(" .") + "."


def shortened(value: Any) -> str:
    """A value as an error message shows it: at most 80 characters, and `empty` for `None`."""
    if value is None:
        return "empty"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
