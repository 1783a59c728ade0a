"""Files that a run may be killed in the middle of writing: how to tell such a file, and how to write none."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from transformers.trainer import OPTIMIZER_NAME, SCALER_NAME, SCHEDULER_NAME
from transformers.trainer_pt_utils import safe_globals
from transformers.utils import ADAPTER_WEIGHTS_NAME, WEIGHTS_NAME

# What a Trainer loads of its own with torch. Other .bin files may be anything.
_LOADED = (OPTIMIZER_NAME, SCHEDULER_NAME, SCALER_NAME, WEIGHTS_NAME, ADAPTER_WEIGHTS_NAME)
_LOADED_PREFIXES = ("rng_state", "pytorch_model-")


def cut_off(file: Path) -> str | None:
    """The reason why a file counts as cut off; `None` where it is whole, or where its format does not show it.

    Reads a .json; of tensors, however many, the header or the directory, which has their places in the file. (All of a
    file in the format that torch had before 1.6: it has neither.)
    """
    check = _CHECKS.get(file.suffix)
    if check is None:
        return None
    try:
        if file.stat().st_size == 0:
            return "it is empty"
        check(file)
    except Exception as error:  # half a pickle may raise anything
        return " ".join(str(error).split()) or type(error).__name__
    return None


def write_whole(file: Path, text: str) -> None:
    """Write a file beside its place and move it there: a process that is killed leaves all of it or nothing."""
    part = file.with_name(f"{file.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(file)


def _check_json(file: Path) -> None:
    json.loads(file.read_text(encoding="utf-8"))


def _check_safetensors(file: Path) -> None:
    with safe_open(file, framework="np"):  # compares the header with the file's length
        pass


def _check_torch(file: Path) -> None:
    with file.open("rb") as stream:
        zipped = stream.read(2) == b"PK"
    if zipped:
        with zipfile.ZipFile(file):  # finds the directory, which is written last
            pass
    elif file.name in _LOADED or file.name.startswith(_LOADED_PREFIXES):
        with safe_globals():  # as the Trainer loads it
            torch.load(file, map_location="cpu", weights_only=True)


_CHECKS: dict[str, Callable[[Path], None]] = {
    ".json": _check_json,
    ".safetensors": _check_safetensors,
    ".pt": _check_torch,
    ".pth": _check_torch,
    ".bin": _check_torch,
}
