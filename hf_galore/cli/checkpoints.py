"""A run's folder: whether it can be written to, the checkpoints in it, and how an interrupted run goes on."""

from __future__ import annotations

import json
import shlex
import tempfile
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import NoReturn

from transformers import TrainingArguments
from transformers.trainer import (
    OPTIMIZER_NAME,
    OPTIMIZER_NAME_BIN,
    SCHEDULER_NAME,
    TRAINER_STATE_NAME,
    TRAINING_ARGS_NAME,
)
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import (
    ADAPTER_CONFIG_NAME,
    ADAPTER_SAFE_WEIGHTS_NAME,
    ADAPTER_WEIGHTS_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
)

from ..log import logger
from .errors import Stopped, UserError
from .whole_files import cut_off

_RNG_NAME = "rng_state.pth"
_RNG_PREFIX = "rng_state_"
"""With a number and .pth behind it: of one process of several."""
_MODELS = (SAFE_WEIGHTS_NAME, WEIGHTS_NAME, ADAPTER_SAFE_WEIGHTS_NAME, ADAPTER_WEIGHTS_NAME)
_INDEXES = (SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_INDEX_NAME)
# DeepSpeed and FSDP keep weights and optimizer in folders of their own; what has to be in them, they know alone.
_ENGINES_FOLDERS = ("global_step", "pytorch_model_fsdp", "optimizer_")


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
    problem = flaw(Path(wanted))
    if problem is not None:
        raise UserError(
            f"resume_from_checkpoint: {wanted} is no checkpoint that training can go on from: {problem}. Give a folder "
            f"{PREFIX_CHECKPOINT_DIR}-N, or no value for the last one in output_dir."
        )
    return str(wanted)


def last_checkpoint(output_dir: Path) -> Path | None:
    """The latest whole checkpoint in `output_dir`, `None` where there is none; a line says of each later one why not.

    A run that was killed while it saved one leaves a part of it, and so does one that was killed while it deleted one.
    """
    for folder in checkpoints_in(output_dir):
        problem = flaw(folder)
        if problem is None:
            return folder
        logger.warning("%s is left out, as training cannot go on from it: %s.", folder, problem)
    return None


def checkpoints_in(output_dir: Path) -> list[Path]:
    """The folders of checkpoints, whole or not, the latest first."""
    steps = {}
    for folder in output_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        step = folder.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
        if step.isdecimal() and folder.is_dir():
            steps[folder] = int(step)
    return sorted(steps, key=lambda folder: steps[folder], reverse=True)


def flaw(folder: Path) -> str | None:
    """Why training cannot go on from a checkpoint, with the file's name; `None` where it can.

    It can where all is there that a Trainer of this kind writes for it, since what is missing it may do without, and
    begin with a new optimizer; and where no file is cut off. Tensors are not read: it takes no longer for 13 GB.
    """
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        reason = cut_off(file)
        if reason is not None:
            return f"{file.relative_to(folder).as_posix()} is cut off ({reason})"
    missing = _missing(folder)
    return None if missing is None else f"it holds no {missing}"


def _missing(folder: Path) -> str | None:
    """What a checkpoint lacks, to follow "it holds no"."""
    found = {path.name for path in folder.glob("*")}
    if TRAINER_STATE_NAME not in found:
        return str(TRAINER_STATE_NAME)
    if any(name.startswith(_ENGINES_FOLDERS) and (folder / name).is_dir() for name in found):
        return None
    lacking: list[str] = [] if not found.isdisjoint((OPTIMIZER_NAME, OPTIMIZER_NAME_BIN)) else [OPTIMIZER_NAME]
    lacking += [] if SCHEDULER_NAME in found else [SCHEDULER_NAME]
    lacking += _missing_random_states(found)
    if lacking == [OPTIMIZER_NAME, SCHEDULER_NAME, _RNG_NAME]:
        return (
            f"{OPTIMIZER_NAME}, {SCHEDULER_NAME} and {_RNG_NAME}, only the model, as a finished run's folder does and "
            "what is saved with save_only_model"
        )
    lacking += [] if TRAINING_ARGS_NAME in found else [TRAINING_ARGS_NAME]
    lacking += _missing_weights(folder, found)
    return lacking[0] if lacking else None


def _missing_random_states(found: AbstractSet[str]) -> list[str]:
    """The states of random numbers that are not there, of the one process or of several."""
    if _RNG_NAME in found:
        return []
    numbers = {name.removeprefix(_RNG_PREFIX).removesuffix(".pth") for name in found if name.startswith(_RNG_PREFIX)}
    processes = {int(number) for number in numbers if number.isdecimal()}
    if not processes:
        return [_RNG_NAME]
    several = range(max(2, max(processes) + 1))
    return [f"{_RNG_PREFIX}{number}.pth" for number in several if number not in processes]


def _missing_weights(folder: Path, found: AbstractSet[str]) -> list[str]:
    """The files of the model that are not there."""
    adapters = (folder.glob(f"*/{name}") for name in (ADAPTER_SAFE_WEIGHTS_NAME, ADAPTER_WEIGHTS_NAME))
    if not found.isdisjoint(_MODELS) or any(any(paths) for paths in adapters):
        return []
    for index in _INDEXES:
        if index in found:
            shards = json.loads((folder / index).read_text(encoding="utf-8")).get("weight_map", {}).values()
            return sorted(set(shards) - found)
    if any(folder.glob("model-*-of-*.safetensors")):
        return [SAFE_WEIGHTS_INDEX_NAME]
    return [ADAPTER_SAFE_WEIGHTS_NAME if ADAPTER_CONFIG_NAME in found else SAFE_WEIGHTS_NAME]


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
