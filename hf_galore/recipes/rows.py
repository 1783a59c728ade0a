"""What the rows of a dataset hold to fine-tune on: conversations as TRL trains on them, and no row without text.

TRL reads them when the model is loaded, and stops at the first that it cannot read, of whichever row that is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from trl import maybe_convert_to_chatml

from ..errors import UserError
from ..log import and_others, logger
from .config_file import shortened
from .data_loading import first_row, reporting_unreadable

ROLES = {"human": "user", "prompter": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant"}
"""Names that roles have in the data of others, and those that chat templates know."""

_CONVERSATIONS = ("messages", "prompt", "completion")
_INSTEAD_OF_CONTENT = ("tool_calls", "function_call", "thinking", "reasoning", "reasoning_content")
"""What a message may say without content."""


def prepare_rows(
    split: Any,
    name: str,
    *,
    given: str,
    text_field: str,
    assistant_only: bool,
    template: str | None,
) -> Any:
    """Check that every row of a split can be trained on, and bring conversations into the form that TRL takes.

    `conversations` of `from` and `value` become `messages` of `role` and `content`. Roles that the chat template does
    not know are renamed by `ROLES`, which is said. Of a stream each row is checked when it is read.

    Args:
        split: of a dataset.
        name: its name, for errors.
        given: what names the dataset, for errors.
        text_field: the column of plain text.
        assistant_only: whether only the assistant's words are learned.
        template: the chat template, or `None` where there is none.

    Raises:
        UserError: it is empty, has no column to train on, or a row that cannot be trained on.
    """
    where = f"{given}, split {name!r}"
    first = first_row(split, given)
    if first is None:
        raise UserError(f"{where}, is empty. Give it rows.")
    _check_columns(split.column_names or list(first), name, text_field)
    if "input_ids" in first:
        return split
    if "prompt" in first and "completion" not in first:  # TRL would look for the completion
        split = split.remove_columns("prompt")
        first.pop("prompt")
    if "conversations" in first or any(map(_is_from_value, first.values())):
        drop = ["conversations"] if "conversations" in first else None
        split = _mapped(split, maybe_convert_to_chatml, "Reading conversations", drop)
        first = next(iter(split))
    if assistant_only and not any(isinstance(first.get(key), list) for key in _CONVERSATIONS):
        raise UserError(
            f"assistant_only_loss is for conversations, but {where}, holds {', '.join(first)}. Leave it out, or give "
            "data with a column 'messages'."
        )
    renamed = {old: new for old, new in ROLES.items() if not _is_in(old, template)}

    def problem(row: Mapping[str, Any]) -> str | None:
        return row_problem(row, text_field, assistant_only=assistant_only, renamed=renamed)

    columns = [key for key in (*_CONVERSATIONS, text_field) if key in first]
    # TRL goes by the first row, and takes texts.
    if text_field in first and not isinstance(first.get("messages"), list):
        columns = [key for key in columns if key != "messages"]
    split, roles = _checked(split, where, columns, problem)
    others = [old for old in renamed if old in roles]
    if others:
        read = ", ".join(f"{old} for {renamed[old]}" for old in others)
        logger.info("%s: roles that the chat template does not know are taken for others: %s.", where, read)
        split = _mapped(split, lambda row: _with_roles(row, renamed), "Naming roles")
    return split


def check_texts(split: Any, name: str, *, given: str, column: str) -> Any:
    """Check that every row of a split has text in a column; of a stream each row is checked when it is read.

    Args:
        split: of a dataset.
        name: its name, for errors.
        given: what names the dataset, for errors.
        column: the column.

    Returns:
        The split.

    Raises:
        UserError: a row has none.
    """
    where = f"{given}, split {name!r}"
    return _checked(split, where, [column], lambda row: _value_problem(column, row.get(column), of_text=True))[0]


def row_problem(
    row: Mapping[str, Any], text_field: str, *, assistant_only: bool = False, renamed: Mapping[str, str] = ROLES
) -> str | None:
    """The reason why a row cannot be trained on, to follow its number; `None` where it can.

    Args:
        row: with the columns of conversations or text.
        text_field: the column of plain text.
        assistant_only: whether only the assistant's words are learned.
        renamed: roles that are another's.
    """
    if "prompt" in row and "completion" in row:
        columns = ["prompt", "completion"]
    else:
        columns = ["messages"] if "messages" in row else [text_field]
    for column in columns:
        reason = _value_problem(column, row.get(column))
        if reason is not None:
            return reason
    if len({type(row[column]) for column in columns}) > 1:
        return "has text for one of prompt and completion, and messages for the other"
    roles = list(_roles(row))
    if assistant_only and not any(renamed.get(role, role) == "assistant" for role in roles):
        return (
            f"has no message of role assistant, which assistant_only_loss learns from, but of {_listed(roles)}. Name "
            "the role so, or leave out assistant_only_loss"
        )
    return None


def _value_problem(column: str, value: Any, *, of_text: bool = False) -> str | None:
    if value is None:
        return f"has no {column} (it is missing or null)"
    if isinstance(value, str):
        return "has text as messages, where a list of role and content belongs" if column == "messages" else None
    if of_text or not isinstance(value, list):
        return f"has {shortened(value)} as {column}, which is no text"
    if not value:
        return f"has no {column} (the list is empty)"
    for number, message in enumerate(value, start=1):
        reason = message_problem(message)
        if reason is not None:
            return f"has a message {reason}: number {number} of its {column}"
    return None


def message_problem(message: Any) -> str | None:
    """Why something is no message of a conversation, to follow "a message"; `None` where it is one."""
    if not isinstance(message, dict):
        return f"that is no mapping of role and content, but {shortened(message)}"
    if not isinstance(message.get("role"), str):
        known = ", ".join(key for key, value in message.items() if value is not None)
        return f"without role (it has {known or 'nothing'})"
    if message.get("content") is None and not any(message.get(key) for key in _INSTEAD_OF_CONTENT):
        return "without content (it is missing or null)"
    return None


# ---- all rows


def _check_columns(columns: Sequence[str], name: str, text_field: str) -> None:
    usable = ({"messages"}, {"conversations"}, {"prompt", "completion"}, {text_field}, {"input_ids"})
    if not any(needed <= set(columns) for needed in usable):
        raise UserError(
            f"The dataset's split {name!r} has the columns {', '.join(columns)}. It needs 'messages' (lists of "
            f"role and content), 'prompt' and 'completion', {text_field!r} (dataset_text_field), or 'input_ids'."
            f"{_way_out(columns)}"
        )


# By what names others have a question and its answer.
_QUESTIONS = ("instruction", "question", "query", "input", "problem")
_ANSWERS = ("output", "answer", "response", "solution", "target")


def _way_out(columns: Sequence[str]) -> str:
    """What to do with columns of other names; begins with a space, or is empty."""
    question, answer = (next((name for name in names if name in columns), None) for names in (_QUESTIONS, _ANSWERS))
    if question is not None and answer is not None:
        more = f", with {'input'!r} added to it," if {"instruction", "input"} <= set(columns) else ""
        return f" Rename {question!r}{more} to 'prompt' and {answer!r} to 'completion'."
    if len(columns) == 1:
        return f" Where {columns[0]!r} is the text: --dataset_text_field {columns[0]}."
    return ""


def _checked(
    split: Any, where: str, columns: list[str], problem: Callable[[Mapping[str, Any]], str | None]
) -> tuple[Any, set[str]]:
    """Check the rows of a split.

    Returns:
        The split, and the roles in it; a stream checks a row when it is read, and the roles are those of the first.
    """
    if not hasattr(split, "__len__"):

        def checked(row: dict[str, Any], index: int) -> dict[str, Any]:
            _raise_for(where, index + 1, 0, problem(row))
            return row

        split = split.map(checked, with_indices=True, features=split.features)
        return split, set(_roles(next(iter(split))))
    reasons: list[tuple[int, str]] = []
    roles: set[str] = set()
    with reporting_unreadable(where):
        for number, row in numbered_rows(split, columns):
            reason = problem(row)
            if reason is not None:
                reasons.append((number, reason))
            else:
                roles.update(_roles(row))
    if reasons:
        _raise_for(where, reasons[0][0], len(reasons) - 1, reasons[0][1])
    return split, roles


def _raise_for(where: str, number: int, others: int, reason: str | None) -> None:
    if reason is not None:
        raise UserError(
            f"{where}, row {number}{and_others(others, 'other row(s)')}: {reason}. Mend the data, or leave such rows "
            "out."
        )


def numbered_rows(split: Any, columns: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a split, with those columns, and their numbers, counted from 1."""
    number = 0
    for batch in split.select_columns(columns).iter(batch_size=1000):
        for values in zip(*(batch[column] for column in columns), strict=True):
            number += 1
            yield number, dict(zip(columns, values, strict=True))


def _roles(row: Mapping[str, Any]) -> Iterator[str]:
    for column in _CONVERSATIONS:
        value = row.get(column)
        if isinstance(value, list):
            yield from (message["role"] for message in value if isinstance(message, dict) and message.get("role"))


def _with_roles(row: Mapping[str, Any], renamed: Mapping[str, str]) -> dict[str, Any]:
    return {
        column: [{**message, "role": renamed.get(message["role"], message["role"])} for message in row[column]]
        for column in _CONVERSATIONS
        if isinstance(row.get(column), list)
    }


def _mapped(split: Any, function: Callable[..., Any], said: str, drop: list[str] | None = None) -> Any:
    more = {"desc": said} if hasattr(split, "__len__") else {}
    return split.map(function, remove_columns=drop, **more)


def _is_from_value(value: Any) -> bool:
    return (
        isinstance(value, list) and bool(value) and isinstance(value[0], dict) and {"from", "value"} <= value[0].keys()
    )


def _is_in(role: str, template: str | None) -> bool:
    return template is not None and any(f"{quote}{role}{quote}" in template for quote in "'\"")


def _listed(roles: Sequence[str]) -> str:
    return ", ".join(dict.fromkeys(roles)) or "none"
