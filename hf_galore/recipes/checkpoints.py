"""The keys `output_dir` and `resume_from_checkpoint`: the checkpoints in a folder, and which of them are whole."""

from __future__ import annotations

import json
from collections.abc import Set as AbstractSet
from pathlib import Path

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

from ..errors import UserError
from ..log import logger
from . import writable
from .whole_files import cut_off

_RNG_NAME = "rng_state.pth"
_RNG_PREFIX = "rng_state_"
"""With a number and .pth behind it: of one process of several."""
MODELS: tuple[str, ...] = (SAFE_WEIGHTS_NAME, WEIGHTS_NAME, ADAPTER_SAFE_WEIGHTS_NAME, ADAPTER_WEIGHTS_NAME)
INDEXES: tuple[str, ...] = (SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_INDEX_NAME)
# DeepSpeed and FSDP keep weights and optimizer in folders of their own; what has to be in them, they know alone.
_ENGINES_FOLDERS = ("global_step", "pytorch_model_fsdp", "optimizer_")


def resumes(training_args: TrainingArguments) -> bool:
    """Whether `resume_from_checkpoint` asks to go on with a run: by `true`, or a folder's name."""
    return str(training_args.resume_from_checkpoint or False).lower() != "false"


def check_folders(training_args: TrainingArguments) -> None:
    """Make `output_dir`, and set `resume_from_checkpoint` to the folder that it means, or to `None`.

    Raises:
        UserError: it cannot be made or written to, or there is no such checkpoint.
    """
    # Of several processes the first makes the folder, and takes it away where nothing comes of the run.
    writable.check_folder("output_dir", Path(training_args.output_dir), make=training_args.process_index == 0)
    training_args.resume_from_checkpoint = _checkpoint(training_args)


def _checkpoint(training_args: TrainingArguments) -> str | None:
    """The checkpoint that `resume_from_checkpoint` means: a folder, or the last one in `output_dir`."""
    wanted = training_args.resume_from_checkpoint
    if wanted is None or str(wanted).lower() == "false":
        return None
    if str(wanted).lower() == "true":
        last = last_checkpoint(Path(training_args.output_dir))
        if last is None:
            raise no_checkpoint(training_args.output_dir)
        return str(last)
    problem = flaw(Path(wanted))
    if problem is not None:
        raise UserError(
            f"resume_from_checkpoint: {wanted} is no checkpoint that training can go on from: {problem}. Give a folder "
            f"{PREFIX_CHECKPOINT_DIR}-N, or no value for the last one in output_dir."
        )
    return str(wanted)


def no_checkpoint(output_dir: str) -> UserError:
    """The error that says that a folder holds no checkpoint to go on from."""
    return UserError(
        f"resume_from_checkpoint: there is no complete checkpoint in {output_dir}. Give the output_dir of the run to "
        "continue, or begin anew: without it, and with --overwrite_output_dir where there is a run in that folder."
    )


def last_checkpoint(output_dir: Path) -> Path | None:
    """The latest whole checkpoint in `output_dir`; `None` where there is none.

    A warning says of each later checkpoint why it is not whole. A run that was killed while it saved one leaves a part
    of it, and so does one that was killed while it deleted one.
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
    """The reason why training cannot go on from a checkpoint, with the file's name; `None` where it can.

    It can where every file is there that a Trainer of this kind writes, and none is cut off: without one of them a
    Trainer may begin with a new optimizer and not say so. Tensors are not read: it takes no longer for 13 GB.
    """
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        reason = cut_off(file)
        if reason is not None:
            return f"{file.relative_to(folder).as_posix()} is cut off ({reason})"
    missing = _missing(folder)
    return None if missing is None else f"it holds no {missing}"


def _missing(folder: Path) -> str | None:
    """The first file that a checkpoint lacks, to follow "it holds no"; `None` where it lacks none."""
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
    lacking += missing_weights(folder, found)
    return lacking[0] if lacking else None


def _missing_random_states(found: AbstractSet[str]) -> list[str]:
    """The files of the random states that are not there, of the one process or of several."""
    if _RNG_NAME in found:
        return []
    numbers = {name.removeprefix(_RNG_PREFIX).removesuffix(".pth") for name in found if name.startswith(_RNG_PREFIX)}
    processes = {int(number) for number in numbers if number.isdecimal()}
    if not processes:
        return [_RNG_NAME]
    several = range(max(2, max(processes) + 1))
    return [f"{_RNG_PREFIX}{number}.pth" for number in several if number not in processes]


def missing_weights(folder: Path, found: AbstractSet[str]) -> list[str]:
    """The files of a model that are not there, of those in its folder."""
    adapters = (folder.glob(f"*/{name}") for name in (ADAPTER_SAFE_WEIGHTS_NAME, ADAPTER_WEIGHTS_NAME))
    if not found.isdisjoint(MODELS) or any(any(paths) for paths in adapters):
        return []
    for index in INDEXES:
        if index in found:
            shards = json.loads((folder / index).read_text(encoding="utf-8")).get("weight_map", {}).values()
            return sorted(set(shards) - found)
    if any(folder.glob("model-*-of-*.safetensors")):
        return [SAFE_WEIGHTS_INDEX_NAME]
    return [ADAPTER_SAFE_WEIGHTS_NAME if ADAPTER_CONFIG_NAME in found else SAFE_WEIGHTS_NAME]
