"""Options that a command has of its own, taken out before a recipe's parser reads the others."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from ..errors import UserError


def need_recipe(arguments: Sequence[str], example: str) -> None:
    """Raise an error where a command was given nothing.

    Raises:
        UserError: there are no arguments; the message has the example.
    """
    if not arguments:
        raise UserError(f"give a recipe: --config {example}, and --key value to override what it says.")


def take_options(
    arguments: Sequence[str],
    values: Mapping[str, str],
    switches: Collection[str] = (),
    *,
    repeatable: Collection[str] = (),
    with_files: bool = False,
) -> tuple[dict[str, list[str]], list[str]]:
    """A command's own options, in either spelling, and the other arguments.

    Args:
        arguments: what follows the command's name.
        values: the options that take a value, and what that is: "a size, as --vram 24GiB".
        switches: the options that take none.
        repeatable: those of `values` that may be given more than once.
        with_files: whether words may follow that belong to no option.

    Returns:
        For each option that was given its values, of a switch an empty text; and what is left.

    Raises:
        UserError: a value is missing or too much, or an option is given twice.
    """
    given: dict[str, list[str]] = {}
    rest: list[str] = []
    items = list(arguments)
    while items:
        item = items.pop(0)
        flag, equals, value = item.partition("=")
        if flag not in values and flag not in switches:
            rest.append(item)
            continue
        if flag in given and flag not in repeatable:
            raise UserError(f"{flag} is given twice. Give it once.")
        if flag in switches:
            if equals:
                raise UserError(f"{item}: {flag} takes no value.")
        elif not equals:
            value = items.pop(0) if items and not items[0].startswith("--") else ""
        if flag in values and not value:
            raise UserError(f"{flag} needs {values[flag]}.")
        # Left there, it would join the values of the option before.
        if not with_files and items and not items[0].startswith("-"):
            raise UserError(f"{items[0]!r} belongs to no --key. Options are given as --key value.")
        given.setdefault(flag, []).append(value)
    return given, rest
