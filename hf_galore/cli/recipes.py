"""`hf-galore recipes`: the recipes that come with hf_galore, listed, shown and copied."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..errors import UserError
from ..recipes.catalog import Listed, catalog, copy, find, listed, next_commands, of_others
from ..recipes.folders import recipes_folder
from .arguments import CommandParser

PROG = "hf-galore recipes"
ABOUT = """List the recipes that come with hf_galore: the command that runs each, its model, the card that it is for and
the memory that it is planned to take there at most. A copy of one, to change, runs from wherever it is."""

_WIDTH = 80
_SHORTEST = 12  # characters of a model's name


def parser() -> CommandParser:
    """Make the parser of the command's options."""
    made = CommandParser(PROG, ABOUT)
    made.add_argument("--copy", metavar="NAME", help="copy this recipe")
    made.add_argument("--to", metavar="FOLDER", help="where to; by default into this folder")
    made.add_argument("--overwrite", action="store_true", help="replace a file that is there")
    made.add_argument("--show", metavar="NAME", help="print this recipe")
    return made


def run(arguments: Sequence[str]) -> int:
    """`hf-galore recipes [--copy NAME [--to FOLDER] [--overwrite]] [--show NAME]`.

    Raises:
        UserError: something that was given is wrong.
        SystemExit: `--help` was among the arguments and has been shown.
    """
    given = parser().read(arguments)
    if given.copy is not None and given.show is not None:
        raise UserError("--copy and --show are both given. Give one.")
    if given.copy is None and (given.to is not None or given.overwrite):
        raise UserError("--to and --overwrite belong to --copy NAME, which is missing.")
    if given.show is not None:
        print(find(given.show).read_text(encoding="utf-8"), end="")
    elif given.copy is not None:
        _copy(given.copy, Path(given.to or ".").expanduser(), overwrite=given.overwrite)
    else:
        print("\n".join(_table(catalog(), of_others())))
    return 0


def _copy(name: str, folder: Path, *, overwrite: bool) -> None:
    path = copy(name, folder, overwrite=overwrite)
    recipe = listed(find(name).relative_to(recipes_folder()).as_posix())
    print(f"{path} is a copy of {recipe.name}. Now")
    print("\n".join(f"  {command}" for command in next_commands(recipe, path)))
    if recipe.licence is not None:
        print(textwrap.fill(recipe.licence, _WIDTH, break_on_hyphens=False))


def _table(recipes: Sequence[Listed], others: Sequence[Listed]) -> Iterator[str]:
    """The list, in lines of 80 characters."""
    yield from textwrap.wrap(
        f"'{PROG} --copy NAME' puts a copy here, to change; '--show NAME' prints one; "
        "'hf-galore COMMAND --config NAME' runs one as it is.",
        _WIDTH,
    )
    yield ""
    widths = [max(len(recipe.name) for recipe in recipes), max(len(recipe.command) for recipe in recipes)]
    widths += [max(_SHORTEST, _WIDTH - sum(widths) - 6 - 8 - 2 * 4), 6]
    yield _row(("name", "command", "model", "card", "peak"), widths)
    for recipe in recipes:
        model = "its own" if recipe.model is None else recipe.model.rpartition("/")[2].removeprefix("Meta-")
        peak = "" if recipe.peak_gib is None else f"{recipe.peak_gib:.1f} GiB"
        yield _row((recipe.name, recipe.command, _cut(model, widths[2]), _cards(recipe), peak), widths)
    yield ""
    yield from textwrap.wrap(
        "peak: planned, of tensors, from the recipe's own settings; 'hf-galore plan --config NAME --vram CARD' says "
        "what a card needs besides.",
        _WIDTH,
    )
    if others:
        yield ""
        yield "For other programs:"
        for recipe in others:
            yield f"  {recipe.name}"
            yield from textwrap.wrap(recipe.about, _WIDTH, initial_indent="    ", subsequent_indent="    ")


def _cards(recipe: Listed) -> str:
    card = recipe.card or "any"
    return card if recipe.cards == 1 else f"{recipe.cards}×{card}"


def _row(cells: Sequence[str], widths: Sequence[int]) -> str:
    padded = [f"{cell:<{width}}" for cell, width in zip(cells[:-1], widths, strict=True)]
    return "  ".join([*padded, f"{cells[-1]:>8}"]).rstrip()


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 1]}…"
