"""Entry point of `hf-galore`: finds the subcommand, and turns its errors into one line and an exit status."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import NoReturn

from ..config import nearest
from ..errors import UserError
from ..expandable_segments import use_expandable_segments
from ..extras import MissingExtraError, require
from ..version import __version__
from . import help as command_help
from .first_seconds import leaving_at_once
from .help_screens import SCREENS
from .interrupts import INTERRUPTED, Stopped
from .noise import quieten

# Each is a module of this package with `run(arguments) -> exit status`; imported only when it is asked for.
COMMANDS = {
    "quickstart": "train a small chat model on this machine, without downloads, and talk to it",
    "sft": "fine-tune a model as a recipe says: what `trl sft` reads, with a galore_* optim",
    "dpo": "teach a model which of two answers is preferred: what `trl dpo` reads, with a galore_* optim",
    "pretrain": "train a language model from scratch, on a dataset or any folder of text",
    "glue": "fine-tune a classifier on tasks of GLUE or on texts of your own, and score it",
    "compare": "put runs side by side: tables, pictures, a page; or run a recipe with several values first",
    "plan": "find out whether a recipe fits a card, without a GPU, weights or data",
    "bench": "measure what this machine's card makes of a recipe, beside other optimizers",
}

# What has to be installed for them.
EXTRAS = {command: command if command in ("glue", "quickstart") else "cli" for command in COMMANDS}

# What they start or do makes no use of a card.
WITHOUT_CARD = ("plan",)

USER_ERROR = 2

NOTHING_BEGUN = "interrupted before training began; run the same command again."


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}. See {self.prog} --help.")


def _parser() -> argparse.ArgumentParser:
    width = max(map(len, COMMANDS))
    parser = _Parser(
        prog="hf-galore",
        description="Train all weights of a large model on one graphics card, with GaLore.",
        usage="%(prog)s COMMAND [--key value ...]",
        epilog="commands:\n" + "\n".join(f"  {name:<{width}}  {text}" for name, text in COMMANDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parser.add_argument("command", help=argparse.SUPPRESS)
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser


def _check_command(name: str) -> None:
    if name not in COMMANDS:
        raise UserError(f"there is no command {name!r}, only {', '.join(COMMANDS)}.{nearest(name, list(COMMANDS))}")


def _show_help(command: str, arguments: list[str]) -> list[str]:
    """Show the help that the arguments of a command ask for.

    Returns:
        What the command is to be run with, where it is not that: for every option, `--help` alone.

    Raises:
        UserError: help is asked for with an option that there is not.
        SystemExit: it has been shown.
    """
    topic = command_help.topic_of(arguments) if command in SCREENS else None
    if topic is None:
        return arguments
    if topic == command_help.ALL:
        return ["--help"]
    print(command_help.explanation(command, topic) if topic else command_help.first_screen(command))
    raise SystemExit(0)


def main(argv: Sequence[str] | None = None) -> int:
    """Run `hf-galore` and return its exit status.

    Args:
        argv: the arguments after the command's name; those of the process where `None`.

    Returns:
        0, 1 for a plan that does not fit, 2 for something wrong in what was given, 130 for Ctrl-C, 143 for SIGTERM.
        Anything else that goes wrong is a bug and keeps its traceback.

    Raises:
        SystemExit: help or the version has been shown.
    """
    prog = "hf-galore"
    quieten()
    try:
        chosen = _parser().parse_args(argv)
        _check_command(chosen.command)
        prog = f"hf-galore {chosen.command}"
        arguments = _show_help(chosen.command, chosen.arguments)
        with leaving_at_once(f"{prog}: {NOTHING_BEGUN}"):
            require(EXTRAS[chosen.command], "The command")
            if chosen.command not in WITHOUT_CARD:
                advice = use_expandable_segments()  # before anything starts CUDA; a sweep's processes inherit it
                if advice is not None:
                    print(f"{prog}: {advice}", file=sys.stderr)
            command = importlib.import_module(f"{__package__}.{chosen.command}")
        status: int = command.run(arguments)
    except (UserError, MissingExtraError) as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return USER_ERROR
    except Stopped as stopped:
        print(f"\n{prog}: {stopped}", file=sys.stderr)
        return stopped.status
    except KeyboardInterrupt:  # before there was anything to resume
        print(f"\n{prog}: {NOTHING_BEGUN}", file=sys.stderr)
        return INTERRUPTED
    return status


if __name__ == "__main__":
    raise SystemExit(main())
