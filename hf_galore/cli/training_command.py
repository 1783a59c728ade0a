"""What the commands that train have in common: a recipe is needed, it is run, and Ctrl-C says how to go on."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

from ..errors import UserError
from ..integrations.older import end
from ..recipes import training
from ..recipes.any_recipe import Arguments
from ..recipes.checkpoints import last_checkpoint
from ..recipes.run_record import RecordedTrainer
from .interrupts import stoppable


def need_recipe(arguments: Sequence[str], example: str) -> None:
    """Raise an error where a command was given nothing.

    Raises:
        UserError: there are no arguments; the message has the example.
    """
    if not arguments:
        raise UserError(f"give a recipe: --config {example}, and --key value to override what it says.")


def train(prog: str, arguments: Sequence[str], parsed: Arguments) -> RecordedTrainer:
    """Run a recipe for a command.

    Args:
        prog: the command, to say how to go on.
        arguments: what it was given, to say how to go on.
        parsed: what was parsed from those.

    Returns:
        The trainer after training; call its `end()` when nothing else needs the other processes.

    Raises:
        UserError: something that was given is wrong.
        Stopped: Ctrl-C.
    """
    with stoppable(lambda: how_to_go_on(prog, arguments, parsed.training.output_dir)):
        return training.run(parsed)


def train_and_say(
    prog: str, arguments: Sequence[str], parsed: Arguments, closing_line: Callable[[RecordedTrainer], str]
) -> int:
    """Run a recipe for a command, print its closing line, and return the exit status 0; see `train`."""
    trainer = train(prog, arguments, parsed)
    trainer.accelerator.print(closing_line(trainer))
    end(trainer)
    return 0


def how_to_go_on(prog: str, arguments: Sequence[str], output_dir: str) -> str:
    """What to say after Ctrl-C: the command that goes on from the last whole checkpoint, if there is one."""
    last = last_checkpoint(Path(output_dir))
    if last is None:
        return (
            f"interrupted; {output_dir} holds no checkpoint yet, so run the same command again. save_steps says how "
            "often one is written."
        )
    command = shlex.join([*prog.split(), *_without_resume(arguments), "--resume_from_checkpoint"])
    return f"interrupted; go on from {last} with: {command}"


def _without_resume(arguments: Sequence[str]) -> list[str]:
    kept: list[str] = []
    skipping = False
    for item in arguments:
        if item.startswith("--"):
            skipping = item.partition("=")[0].replace("-", "_") == "__resume_from_checkpoint"
        if not skipping:
            kept.append(item)
    return kept
