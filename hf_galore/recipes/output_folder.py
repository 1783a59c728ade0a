"""A run's folder: whether another run is in it, and what happens to that."""

from __future__ import annotations

import dataclasses
import datetime
import json
import shutil
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import ADAPTER_CONFIG_NAME

from ..errors import UserError
from .checkpoints import INDEXES, MODELS, checkpoints_in
from .run_record import RUN_FILE, RunFacts


@dataclasses.dataclass(frozen=True)
class OutputArguments:
    """What a command that trains is told of its run, beside what the Trainer is told."""

    overwrite_output_dir: bool = dataclasses.field(
        default=False,
        metadata={"help": "Whether a run that output_dir holds is removed, when the new one begins to train."},
    )
    dry_run: bool = dataclasses.field(
        default=False,
        metadata={"help": "Whether to stop after all checks and the plan of the memory, without training."},
    )
    plan_first: bool = dataclasses.field(
        default=True,
        metadata={"help": "Whether a run on a graphics card is planned before it begins, to say whether it fits."},
    )


def check_unused(output_dir: Path, output: OutputArguments, *, resumes: bool, of_sweep: bool = False) -> None:
    """Check that a run to come mixes with no other.

    A run that was stopped before its first checkpoint leaves nothing to lose.

    Args:
        output_dir: the folder of the run to come.
        output: whether another run is to be removed.
        resumes: whether the run to come goes on with the one that is there.
        of_sweep: whether it is one of a sweep, which goes on beside runs that are finished.

    Raises:
        UserError: a run is in the folder, and nothing was said of it; or both things were said.
    """
    if resumes and output.overwrite_output_dir:
        raise UserError(
            "resume_from_checkpoint and overwrite_output_dir are both given: the one goes on with the run that the "
            "other removes. Leave one out."
        )
    if resumes or output.overwrite_output_dir:
        return
    checkpoints = checkpoints_in(output_dir)
    if not checkpoints and not (output_dir / TRAINER_STATE_NAME).is_file():
        return
    goes_on = " Go on with it by --resume_from_checkpoint," if checkpoints or of_sweep else " Leave it there and"
    raise UserError(
        f"output_dir {output_dir} holds a run: {_described(output_dir, checkpoints)}.{goes_on} give another "
        "--output_dir, or remove what is there by --overwrite_output_dir."
    )


def _described(output_dir: Path, checkpoints: list[Path]) -> str:
    """A run in words: when, with which settings, and how far it came."""
    last = f"its last checkpoint is {checkpoints[0].name}" if checkpoints else "it has no checkpoint"
    try:
        facts = RunFacts.read(output_dir)
    except (ValueError, OSError):
        facts = None
    if facts is None:
        file = next((path for path in (output_dir / TRAINER_STATE_NAME, *checkpoints) if path.exists()), output_dir)
        when = datetime.datetime.fromtimestamp(file.stat().st_mtime).astimezone().isoformat(" ", "minutes")
        return f"of {when}, by another program; {last}"
    settings = [f"optim {facts.optim}"]
    settings += [f"optim_args {json.dumps(facts.optim_args)}"] if facts.optim_args else []
    settings += [f"learning rate {facts.learning_rate:g}"]
    ended = "finished" if facts.finished else "not finished"
    return (
        f"{facts.command} of {facts.model}, {', '.join(settings)}, begun {facts.started.replace('T', ' ')}, {ended}; "
        f"{last}"
    )


def remove_run(output_dir: Path) -> None:
    """Remove a run from its folder: checkpoints, log, record and weights. Whatever else is there stays."""
    for folder in checkpoints_in(output_dir):
        shutil.rmtree(folder)
    shards = output_dir.glob("model-*-of-*.safetensors")
    names = (TRAINER_STATE_NAME, RUN_FILE, ADAPTER_CONFIG_NAME, *MODELS, *INDEXES)
    for file in (*(output_dir / name for name in names), *shards):
        file.unlink(missing_ok=True)
