"""Entry point of `hf-galore`: finds the subcommand, and turns its errors into one line and an exit status."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import time
from collections.abc import Sequence

from ..config import nearest
from ..errors import UserError
from ..expandable_segments import use_expandable_segments
from ..extras import MissingExtraError, require
from ..version import __version__
from . import help as command_help
from . import ranks
from .arguments import OneLineParser
from .first_seconds import leaving_at_once
from .help_screens import SCREENS
from .interrupts import INTERRUPTED, Stopped
from .noise import quieten
from .streams import Outlasting, outlasting

# Each is a module of this package with `run(arguments) -> exit status`; imported only when it is asked for.
COMMANDS = {
    "quickstart": "train a small chat model here, without downloads, and talk to it",
    "sft": "fine-tune a model as a recipe says",
    "dpo": "teach a model which of two answers is preferred",
    "pretrain": "train a language model from scratch, on any text",
    "glue": "fine-tune a classifier, on GLUE or your own texts, and score it",
    "recipes": "list the recipes that come with hf_galore, show one, or copy it",
    "plan": "find out whether a recipe fits a card, without a GPU or weights",
    "compare": "put runs side by side, or run a recipe with several values first",
    "chat": "talk to the model that a run has saved",
    "bench": "measure what this machine's card makes of a recipe",
    "doctor": "look for what would stop a training here, and say what mends it",
    "completion": "print what makes bash, zsh or fish complete commands",
}

# What has to be installed for them, besides what is always; nothing where it is empty.
EXTRAS = {command: command if command in ("glue", "quickstart") else "cli" for command in COMMANDS}
EXTRAS |= dict.fromkeys(("recipes", "doctor"), "")

# What they start or do makes no use of a card. (The doctor says itself what commands would have of its allocator.)
WITHOUT_CARD = ("plan", "recipes", "doctor", "completion")

# What they do is worth more than what they print of it.
LASTING = ("quickstart", "sft", "dpo", "pretrain", "glue", "compare", "bench")

# What several processes can do together.
TOGETHER = ("quickstart", "sft", "dpo", "pretrain", "glue")

USER_ERROR = 2

PATIENCE = 5.0
"""Seconds that a process waits before it says what the first one says too, and a launcher ends it for."""

NOTHING_BEGUN = "interrupted before training began; run the same command again."


def _parser() -> argparse.ArgumentParser:
    width = max(map(len, COMMANDS))
    parser = OneLineParser(
        prog="hf-galore",
        description="Train all weights of a large model on one graphics card, with GaLore.",
        usage="%(prog)s COMMAND [--key value ...]",
        epilog="commands:\n"
        + "\n".join(f"  {name:<{width}}  {text}" for name, text in COMMANDS.items())
        + "\n\nhf-galore COMMAND --help has its options.",
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
        0, 1 for a plan that does not fit, 2 for something wrong in what was given, 130 for Ctrl-C, 143 for SIGTERM, 129
        for SIGHUP, 141 where nobody reads on (`| head`). Anything else that goes wrong is a bug and keeps its
        traceback.

    Raises:
        SystemExit: help or the version has been shown.
    """
    with outlasting() as streams:
        quieten()
        try:
            status = _main(sys.argv[1:] if argv is None else list(argv), streams)
            streams[0].flush()
        except UserError as error:  # stdout cannot be written to
            print(f"hf-galore: {error}", file=sys.stderr)
            return USER_ERROR
        except SystemExit:
            streams[0].flush()
            raise
        return status


def _main(given: Sequence[str], streams: Sequence[Outlasting]) -> int:
    prog = "hf-galore"
    if not given:
        _parser().print_help(sys.stderr)
        return USER_ERROR
    try:
        chosen = _parser().parse_args(given)
        _check_command(chosen.command)
        prog = f"hf-galore {chosen.command}"
        _check_processes(chosen.command)
        arguments = _show_help(chosen.command, chosen.arguments)
        for stream in streams:
            stream.lasts = chosen.command in LASTING
        with leaving_at_once(f"{prog}: {NOTHING_BEGUN}" if ranks.speaks() else ""):
            if EXTRAS[chosen.command]:
                require(EXTRAS[chosen.command], "The command")
            if chosen.command not in WITHOUT_CARD:
                advice = use_expandable_segments()  # before anything starts CUDA; a sweep's processes inherit it
                if advice is not None and ranks.speaks():
                    print(f"{prog}: {advice}", file=sys.stderr)
            command = importlib.import_module(f"{__package__}.{chosen.command}")
        status: int = command.run(arguments)
    except (UserError, MissingExtraError) as error:
        _say_error(prog, error)
        if ranks.count() > 1:
            # Taking their group apart may wait for the others, which wait for this one, or are gone.
            for stream in streams:
                stream.flush()
            os._exit(USER_ERROR)
        return USER_ERROR
    except Stopped as stopped:  # all processes are, after the same step
        if ranks.speaks():
            print(f"\n{prog}: {stopped}", file=sys.stderr)
        return stopped.status
    except KeyboardInterrupt:  # before there was anything to resume
        if ranks.speaks():
            print(f"\n{prog}: {NOTHING_BEGUN}", file=sys.stderr)
        return INTERRUPTED
    return status


def _check_processes(command: str) -> None:
    """Refuse what would only be done several times where a launcher has started several processes."""
    if ranks.count() > 1 and command not in TOGETHER:
        raise UserError(
            f"{ranks.count()} processes were started for what one does. Run it without a launcher: only "
            f"{', '.join(TOGETHER)} are for several."
        )


def _say_error(prog: str, error: Exception) -> None:
    """Print a mistake, once for all processes: what is given is the same for each of them.

    Those behind the first wait until their launcher has ended them for its failure. What only they have found they say.
    """
    if not ranks.speaks():
        time.sleep(PATIENCE)
        prog = f"{prog} (process {ranks.number()})"
    print(f"{prog}: {error}", file=sys.stderr)


if __name__ == "__main__":
    raise SystemExit(main())
