"""`hf-galore chat FOLDER`: talk to the model that a run has saved."""

from __future__ import annotations

import argparse
import contextlib
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import transformers

from ..errors import UserError
from ..recipes.saved_model import find_saved, load
from ..recipes.talk import Sampling, Talk
from .arguments import CommandParser
from .interrupts import INTERRUPTED

PROG = "hf-galore chat"
ABOUT = """Talk to the model that a run has saved: all of it, or an adapter; of a run that has not ended, its last whole
checkpoint. On this machine, without a server. /reset begins anew, /quit or Ctrl-D ends, Ctrl-C stops an answer. Where
lines are piped in, each is said in turn, and only answers are on stdout. A model without a chat template completes the
text of each line."""

_COMMANDS = ("/reset", "/quit", "/help")
_HELP = "/reset begins anew, /quit or Ctrl-D ends, Ctrl-C stops an answer."
_PROMPT = "> "


def parser() -> CommandParser:
    """Make the parser of the command's options."""
    made = CommandParser(PROG, ABOUT)
    made.add_argument("folder", metavar="FOLDER", help="output_dir of a run, or a checkpoint's folder")
    made.add_argument("--system", metavar="TEXT", help="what each conversation begins with")
    made.add_argument("--max_new_tokens", metavar="N", type=_count, default=512, help="of an answer (512)")
    made.add_argument(
        "--temperature",
        metavar="T",
        type=_temperature,
        help="0 for the likeliest words, above it for others too; by default what the model's generation_config says",
    )
    made.add_argument("--checkpoint", metavar="N", help="this checkpoint of the run: a step's number, or latest")
    return made


def run(arguments: Sequence[str]) -> int:
    """`hf-galore chat FOLDER [--system TEXT] [--max_new_tokens N] [--temperature T] [--checkpoint N]`.

    Raises:
        UserError: something that was given is wrong.
        SystemExit: `--help` was among the arguments and has been shown.
    """
    given = parser().read(arguments)
    try:
        sampling = Sampling(given.max_new_tokens, given.temperature)
        talk = _load(Path(given.folder).expanduser(), given.checkpoint, given.system, sampling)
    except KeyboardInterrupt:
        _tell("\ninterrupted while the model was loaded.")
        return INTERRUPTED
    for text in _lines(sys.stdin.isatty()):
        if text == "/quit":
            break
        if text == "/reset":
            talk.reset()
            _tell("What was said is forgotten.")
        elif text.startswith("/") and len(text.split()) == 1:
            _tell(_HELP if text == "/help" else f"There is no {text}. {_HELP}")
        else:
            _answer(talk, text)
    return 0


def _load(folder: Path, checkpoint: str | None, system: str | None, sampling: Sampling) -> Talk:
    saved = find_saved(folder, checkpoint)
    _tell(f"Loading {saved.folder}{f' ({saved.remark})' if saved.remark else ''} ...")
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    model, tokenizer = load(saved)
    talk = Talk(model, tokenizer, system, sampling)
    dtype = str(model.dtype).removeprefix("torch.")
    what = "adapter and its model" if saved.adapter else "model"
    _tell(f"The {what}: {dtype}, on {_device(model.device.type)}. Answers: {talk.describe_sampling()}.")
    if not talk.has_template:
        _tell("It has no chat template, so it completes each text instead of answering it.")
    if sys.stdin.isatty():
        _tell(_HELP)
    return talk


def _device(kind: str) -> str:
    return {"cpu": "the CPU", "cuda": "the card"}.get(kind, kind)


def _lines(interactive: bool) -> Iterator[str]:
    """What is typed, or piped in: lines with something in them."""
    if not interactive:
        yield from (line.strip() for line in sys.stdin if line.strip())
        return
    with contextlib.suppress(ImportError):  # Windows has none
        import readline  # noqa: F401 - lines can be edited, and those before brought back
    stopped = False
    while True:
        try:
            text = input(_PROMPT).strip()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:  # there is no answer to stop
            print()
            if stopped:
                return
            stopped = True
            _tell("/quit, Ctrl-D or Ctrl-C once more ends.")
            continue
        stopped = False
        if text:
            yield text


def _answer(talk: Talk, text: str) -> None:
    """Show an answer as it comes."""
    try:
        answer = talk.say(text, _write)
    except UserError as error:  # of this text alone
        _tell(str(error))
        return
    print(flush=True)
    if answer.stopped:
        _tell("(stopped)")
    if answer.forgotten:
        count = "the oldest exchange is" if answer.forgotten == 1 else f"the {answer.forgotten} oldest exchanges are"
        _tell(f"({count} forgotten: the model reads no more at a time.)")


def _write(text: str) -> None:
    print(text, end="", flush=True)


def _tell(text: str) -> None:
    """Say something that is no answer."""
    print(text, file=sys.stderr, flush=True)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"it takes a whole number above 0, but was given {text!r}")
    return int(text)


def _temperature(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"it takes a number from 0 up, as 0.7, but was given {text!r}")
    return value
