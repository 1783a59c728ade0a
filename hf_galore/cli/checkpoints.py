"""A run's folder: whether it can be written to, the checkpoints in it, and how an interrupted run goes on."""

from __future__ import annotations

import shlex
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from transformers import TrainingArguments
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .errors import Stopped, UserError


def check_folders(training_args: TrainingArguments) -> None:
    """Whether `output_dir` can be written to; and `resume_from_checkpoint` becomes the folder that it means.

    Raises:
        UserError: it cannot, or there is no such checkpoint.
    """
    _check_writable(Path(training_args.output_dir))
    training_args.resume_from_checkpoint = _checkpoint(training_args)


def _check_writable(folder: Path) -> None:
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise UserError(f"output_dir {folder} cannot be a folder, because {nearest} is a file. Give another one.")
    try:  # permissions alone do not say it: file systems have rules of their own
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"output_dir {folder} cannot be written to ({error}). Give another one.") from error


def _checkpoint(training_args: TrainingArguments) -> str | None:
    """The checkpoint that `resume_from_checkpoint` means: a folder, or the last one in `output_dir`."""
    wanted = training_args.resume_from_checkpoint
    if wanted is None or str(wanted).lower() == "false":
        return None
    if str(wanted).lower() == "true":
        last = last_checkpoint(Path(training_args.output_dir))
        if last is None:
            raise UserError(
                f"resume_from_checkpoint: there is no complete checkpoint in {training_args.output_dir}. Leave it out "
                "to start from the beginning, or give the output_dir of the run to continue."
            )
        return str(last)
    for name in (TRAINER_STATE_NAME, SCHEDULER_NAME):  # the first alone is also in a finished run's folder
        if not (Path(wanted) / name).is_file():
            raise UserError(
                f"resume_from_checkpoint: {wanted} is no checkpoint; it holds no {name}. Give a folder "
                f"{PREFIX_CHECKPOINT_DIR}-N, or no value for the last one in output_dir."
            )
    return str(wanted)


def last_checkpoint(output_dir: Path) -> Path | None:
    """The latest complete checkpoint in `output_dir`, `None` where there is none.

    Complete: a run that was killed while it saved one leaves a folder without the file that is written last.
    """
    steps = {}
    for folder in output_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        step = folder.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
        if step.isdigit() and (folder / TRAINER_STATE_NAME).is_file():
            steps[int(step)] = folder
    return steps[max(steps)] if steps else None


def stop(prog: str, arguments: Sequence[str], output_dir: str) -> NoReturn:
    """After Ctrl-C: say how to go on.

    Args:
        prog: the command that was stopped.
        arguments: what it was given.
        output_dir: where its checkpoints are.
    """
    last = last_checkpoint(Path(output_dir))
    if last is None:
        raise Stopped(
            f"interrupted; {output_dir} holds no checkpoint yet, so run the same command again. save_steps says how "
            "often one is written."
        ) from None
    command = _without_resume(arguments)
    raise Stopped(f"interrupted; go on from {last} with: {prog} {shlex.join(command)} --resume_from_checkpoint")


def _without_resume(arguments: Sequence[str]) -> list[str]:
    kept: list[str] = []
    skipping = False
    for item in arguments:
        if item.startswith("--"):
            skipping = item.partition("=")[0].replace("-", "_") == "__resume_from_checkpoint"
        if not skipping:
            kept.append(item)
    return kept
