"""`hf-galore doctor`: what stands in the way of a training on this machine, and what mends it."""

from __future__ import annotations

from collections.abc import Sequence

from ..doctor import report
from .arguments import CommandParser

PROG = "hf-galore doctor"
ABOUT = """Look at this machine: the card and its free memory, torch's build, the driver, the releases of the libraries,
whether the kernels compute what they should, memory and disk, and the login at the Hugging Face Hub. Each line is ok, a
note, or a problem, with what to do. Nothing is installed, changed or downloaded. The exit status is 0, or 1 where
something would stop a training."""

FINE, PROBLEM = 0, 1


def parser() -> CommandParser:
    """Make the parser of the command's options."""
    made = CommandParser(PROG, ABOUT)
    made.add_argument("--model", metavar="NAME", help="a model on the Hub: is its licence accepted by this account?")
    made.add_argument("--json", action="store_true", help="print one JSON object")
    return made


def run(arguments: Sequence[str]) -> int:
    """`hf-galore doctor [--model NAME] [--json]`.

    Returns:
        0 where nothing would stop a training, else 1.

    Raises:
        UserError: something that was given is wrong.
        SystemExit: `--help` was among the arguments and has been shown.
    """
    given = parser().read(arguments)
    found = report(given.model)
    print(found.json() if given.json else found)
    return FINE if found.fine else PROBLEM
