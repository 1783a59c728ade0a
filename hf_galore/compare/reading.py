"""Runs read from their folders: the Trainer's log, and what a run of ours wrote down beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..errors import UserError
from ..log import logger
from ..recipes.checkpoints import checkpoints_in
from ..recipes.run_record import RunFacts
from ..recipes.whole_files import cut_off
from .runs import Run


def read_runs(folders: Sequence[Path], names: Sequence[str] | None = None) -> list[Run]:
    """Read the runs in `folders`.

    Args:
        folders: each holds a `trainer_state.json`, or checkpoints that do.
        names: what they are called; by default as their folders, with as much of the path as tells them apart.

    Raises:
        UserError: a folder is missing, given twice or holds no run, or something in it cannot be read.
    """
    seen: dict[Path, Path] = {}
    for folder in folders:
        first = seen.setdefault(folder.resolve(), folder)
        if first is not folder:
            raise UserError(f"{folder} is given twice. Give each run once.")
    return [read_run(folder, name) for folder, name in zip(folders, names or folder_names(folders), strict=True)]


def read_run(folder: Path, name: str) -> Run:
    """Read the run in `folder`.

    Raises:
        UserError: there is none, or something in it cannot be read.
    """
    if not folder.exists():
        raise UserError(f"{folder}: there is no such folder. Give the output_dir of a training.")
    if not folder.is_dir():
        raise UserError(f"{folder} is a file. Give the output_dir of a training, the folder.")
    try:
        facts = RunFacts.read(folder)
    except (ValueError, OSError) as error:
        raise UserError(str(error)) from error
    file = _state_file(folder, facts)
    state = _json(file)
    entries = state.get("log_history")
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise UserError(f"{file} holds no log_history, which a Trainer's has.")
    log = tuple(_numbers(entry) for entry in entries if isinstance(entry.get("step"), int))
    if not log:
        raise UserError(f"{file} has an empty log. Train with logging_steps below the number of steps.")
    max_steps = state.get("max_steps")
    max_steps = max_steps if isinstance(max_steps, int) else 0
    step = int(max(entry["step"] for entry in log))
    if isinstance(state.get("global_step"), int):
        step = max(step, state["global_step"])
    if facts is not None:
        finished = facts.finished
    else:
        finished = any("train_runtime" in entry for entry in log) or 0 < max_steps <= step
    return Run(
        name=name,
        folder=folder,
        facts=facts,
        log=log,
        step=step,
        max_steps=max_steps,
        finished=finished,
        adapter=_optional_json(folder, file.parent, "adapter_config.json"),
        config=_optional_json(folder, file.parent, "config.json"),
    )


def _state_file(folder: Path, facts: RunFacts | None) -> Path:
    # That in the folder is written when training ends: beside the facts of an unfinished run it is another run's.
    state_name: str = TRAINER_STATE_NAME
    direct = folder / state_name
    if direct.is_file() and (facts is None or facts.finished):
        return direct
    for checkpoint in checkpoints_in(folder):  # training may be unable to go on from it: its log is all that is read
        file = checkpoint / state_name
        reason = cut_off(file) if file.is_file() else None
        if reason is not None:
            logger.warning("%s is left out: %s is cut off (%s).", checkpoint, state_name, reason)
        elif file.is_file():
            return file
    if facts is not None and not facts.finished:
        raise UserError(f"{folder}: the training there stopped before its first checkpoint, so it left no log.")
    raise UserError(
        f"{folder} holds no {state_name} and no {PREFIX_CHECKPOINT_DIR}-N with one. Give the output_dir of a training."
    )


def _json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise UserError(f"{file} cannot be read: it holds no JSON object.")
    return found


def _optional_json(folder: Path, checkpoint: Path, name: str) -> dict[str, Any]:
    files = [place / name for place in (folder, checkpoint) if (place / name).is_file()]
    # A run that was killed at its end, while the model was saved, has a whole one in its last checkpoint.
    file = next((file for file in files if cut_off(file) is None), files[0] if files else None)
    return {} if file is None else _json(file)


def _numbers(entry: Mapping[str, Any]) -> dict[str, float]:
    return {key: v for key, v in entry.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}


def folder_names(folders: Sequence[Path]) -> list[str]:
    """The folders' own names, with their parents' in front where they would be the same."""
    paths = [folder.resolve() for folder in folders]

    def name(path: Path) -> str:
        for parts in range(1, len(path.parts)):
            tail = path.parts[-parts:]
            if sum(other.parts[-parts:] == tail for other in paths) == 1:
                return "/".join(tail)
        return str(path)

    return [name(path) for path in paths]
