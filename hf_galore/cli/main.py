"""Entry point of `hf-galore`: finds the subcommand, and turns its errors into one line and an exit status."""

from __future__ import annotations

import argparse
import importlib
import logging
import sys
from collections.abc import Sequence
from typing import NoReturn

from ..config import nearest
from ..errors import UserError
from ..expandable_segments import use_expandable_segments
from ..extras import MissingExtraError, require
from ..version import __version__
from .interrupts import INTERRUPTED, Stopped

# Each is a module of this package with `run(arguments) -> exit status`; imported only when it is asked for.
COMMANDS = {
    "quickstart": "train a small chat model on this machine, without downloads, and talk to it",
    "sft": "fine-tune a model as a recipe says: what `trl sft` reads, with a galore_* optim",
    "pretrain": "train a language model from scratch, on a dataset or any folder of text",
    "glue": "fine-tune a classifier on tasks of GLUE or on texts of your own, and score it",
    "compare": "put runs side by side: tables, pictures, a page; or run a recipe with several values first",
    "plan": "find out whether a recipe fits a card, without a GPU, weights or data",
    "bench": "measure what this machine's card makes of a recipe, beside other optimizers",
    "recipes": "list the recipes that come with hf_galore, show one, or copy it",
    "chat": "talk to the model that a run has saved",
    "doctor": "look for what would stop a training on this machine, and say what mends it",
    "completion": "print what makes bash, zsh or fish complete commands, options and recipes",
}

# What has to be installed for them, besides what is always; nothing where it is empty.
EXTRAS = {command: command if command in ("glue", "quickstart") else "cli" for command in COMMANDS}
EXTRAS |= dict.fromkeys(("recipes", "doctor"), "")

# What they start or do makes no use of a card. (The doctor says itself what commands would have of its allocator.)
WITHOUT_CARD = ("plan", "recipes", "doctor", "completion")

USER_ERROR = 2

# On processors with AVX512-BF16 bitsandbytes warns, whenever it is imported, that it has no CPU kernel for matrices in
# 4 bits. Nothing here multiplies such.
_BESIDE_THE_POINT = "Failed to load CPU gemm_4bit_forward"


def _to_the_point(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith(_BESIDE_THE_POINT)


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


def main(argv: Sequence[str] | None = None) -> int:
    """Run `hf-galore` and return its exit status.

    Args:
        argv: the arguments after the command's name; those of the process where `None`.

    Returns:
        0, 1 for a plan that does not fit, 2 for something wrong in what was given, 130 for Ctrl-C. Anything else that
        goes wrong is a bug and keeps its traceback.
    """
    prog = "hf-galore"
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_to_the_point)
    try:
        chosen = _parser().parse_args(argv)
        _check_command(chosen.command)
        prog = f"hf-galore {chosen.command}"
        if EXTRAS[chosen.command]:
            require(EXTRAS[chosen.command], "The command")
        if chosen.command not in WITHOUT_CARD:
            advice = use_expandable_segments()  # before anything starts CUDA; a sweep's processes inherit it
            if advice is not None:
                print(f"{prog}: {advice}", file=sys.stderr)
        command = importlib.import_module(f"{__package__}.{chosen.command}")
        status: int = command.run(chosen.arguments)
    except (UserError, MissingExtraError) as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return USER_ERROR
    except Stopped as stopped:
        print(f"\n{prog}: {stopped}", file=sys.stderr)
        return INTERRUPTED
    except KeyboardInterrupt:  # before there was anything to resume
        print(f"\n{prog}: interrupted before training began; run the same command again.", file=sys.stderr)
        return INTERRUPTED
    return status


if __name__ == "__main__":
    raise SystemExit(main())
