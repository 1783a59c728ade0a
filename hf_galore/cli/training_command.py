"""What the commands that train have in common: a recipe is run, or only checked, and Ctrl-C says how to go on."""

from __future__ import annotations

import contextlib
import shlex
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from ..errors import Interrupted
from ..integrations.older import end
from ..recipes import training
from ..recipes.any_recipe import Arguments
from ..recipes.checkpoints import last_checkpoint, resumes
from ..recipes.config_file import key_of
from ..recipes.resuming import FinishedError
from ..recipes.run_record import RecordedTrainer
from ..recipes.stopping import StopAfterStep
from . import ranks
from .interrupts import finishing_the_step, stoppable
from .plan import DOES_NOT_FIT, FITS, show, shown_progress
from .progress import ProgressLine


def train(
    prog: str, arguments: Sequence[str], parsed: Arguments, *, others: bool = False, further: bool = False
) -> RecordedTrainer:
    """Run a recipe for a command.

    Args:
        prog: the command, to say how to go on.
        arguments: what it was given, to say how to go on.
        parsed: what was parsed from those.
        others: whether the command has finished other runs before this one.
        further: whether it would begin another, which it does not where it was asked to stop.

    Returns:
        The trainer after training; call its `end()` when nothing else needs the other processes.

    Raises:
        UserError: something that was given is wrong.
        Stopped: Ctrl-C or SIGTERM.
    """
    since, output_dir = None if resumes(parsed.training) else time.time(), parsed.training.output_dir
    stop = StopAfterStep()

    def message() -> str:
        return how_to_go_on(prog, arguments, output_dir, since=since, others=others or stop.ended)

    stopping = finishing_the_step(stop, prog, message)
    with stopping, contextlib.closing(ProgressLine(parsed.metrics)) as line:
        trainer = training.run(parsed, callbacks=[line, stop])
        if further and stop.asked is not None:
            raise Interrupted(stop.asked)
    return trainer


def train_and_say(
    prog: str, arguments: Sequence[str], parsed: Arguments, closing_line: Callable[[RecordedTrainer], str]
) -> int:
    """Run a recipe for a command, print its closing line, and return the exit status 0; see `train`.

    With `dry_run` it is only checked and planned: the exit status is 1 where this machine's card is too small.
    """
    try:
        if parsed.output.dry_run:
            return dry_run(prog, parsed)
        trainer = train(prog, arguments, parsed)
    except FinishedError as finished:  # which is no failure of a job that is started until it is done
        if ranks.speaks():
            print(f"{prog}: {finished}")
        return 0
    if ranks.speaks():
        print(closing_line(trainer))
    end(trainer)
    return 0


def dry_run(prog: str, parsed: Arguments) -> int:
    """Check a recipe and plan its memory for a command, and return the exit status: 1 where it does not fit, or 0.

    Raises:
        UserError: something that was given is wrong, or cannot be planned.
        FinishedError: the run is to go on, and is finished.
        Stopped: Ctrl-C.
    """
    name = parsed.recipe.name if parsed.recipe else str(parsed.model_name)
    with stoppable(lambda: "interrupted."), shown_progress() as progress:
        found = training.dry_run(parsed, progress)
    if parsed.training.process_index == 0:
        show(found, name, no_card="hf-galore plan has --vram 4090, or 24GB, for a verdict")
        print(f"{prog}: all checks passed. Nothing was trained or written.")
    return DOES_NOT_FIT if found.fits is False else FITS


def how_to_go_on(
    prog: str, arguments: Sequence[str], output_dir: str, *, since: float | None, others: bool = False
) -> str:
    """What to say after Ctrl-C: the command that goes on from the last whole checkpoint, if there is one.

    Args:
        prog: the command.
        arguments: what it was given.
        output_dir: the run's folder.
        since: when the run began, in seconds as of `time.time`, where it is new: older checkpoints are another run's.
        others: whether there are finished runs of the same command, which are not run again by one that goes on.
    """
    last, again = last_checkpoint(Path(output_dir)), shlex.join([*prog.split(), *to_go_on(arguments)])
    if ranks.count() > 1:  # by torchrun or another launcher, whose options nobody here knows
        again = f"{ranks.LAUNCHERS} {again.removeprefix('hf-galore ')}"
    if last is None or (since is not None and last.stat().st_mtime < since):
        if others:
            return f"interrupted; what is finished is kept, so go on with: {again}"
        return (
            f"interrupted; {output_dir} holds no checkpoint yet, so run the same command again. save_steps says how "
            "often one is written."
        )
    return f"interrupted; go on from {last} with: {again}"


def to_go_on(arguments: Sequence[str]) -> list[str]:
    """The arguments of a command, for it to go on with its run."""
    kept: list[str] = []
    skipping = False
    for item in arguments:
        if item.startswith("--"):
            skipping = key_of(item) in ("resume_from_checkpoint", "overwrite_output_dir")
        if not skipping:
            kept.append(item)
    return [*kept, "--resume_from_checkpoint"]
