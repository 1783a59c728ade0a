"""The model that a run has saved, or a checkpoint of it: where it is, whether it is whole, and loading it."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import (
    ADAPTER_CONFIG_NAME,
    ADAPTER_SAFE_WEIGHTS_NAME,
    ADAPTER_WEIGHTS_NAME,
    CONFIG_NAME,
)

from ..config import nearest
from ..errors import UserError
from .checkpoints import INDEXES, MODELS, checkpoints_in
from .errors import reporting_complaints
from .whole_files import cut_off

LATEST = "latest"
_TOKENIZERS = ("tokenizer*", "vocab*", "*.model", "*.tiktoken")
"""What the files of tokenizers are called."""
_ADAPTERS = (ADAPTER_SAFE_WEIGHTS_NAME, ADAPTER_WEIGHTS_NAME)


class Saved(NamedTuple):
    """A model in a folder, whole."""

    folder: Path
    adapter: bool
    """Whether it is an adapter, whose model is elsewhere."""
    remark: str | None = None
    """Why it is this one, where somebody may have expected another."""


def find_saved(folder: Path, checkpoint: str | None = None) -> Saved:
    """The model that somebody means who names a run's folder.

    That which the run saved at its end; of a run that did not end, its last whole checkpoint.

    Args:
        folder: a run's folder, a checkpoint's, or any with a model that transformers or PEFT saved.
        checkpoint: `latest`, `checkpoint-200` or `200`: that one instead.

    Raises:
        UserError: there is no such folder, no model in it that is whole, or no such checkpoint.
    """
    _check_folder(folder)
    checkpoints = checkpoints_in(folder)
    if checkpoint is not None:
        return _checkpoint(folder, checkpoints, checkpoint)
    problem = flaw(folder)
    if problem is None:
        return Saved(folder, _is_adapter(folder), _newer(folder, checkpoints))
    reason = "the run has not ended" if problem == _NOTHING else f"the model beside it is not whole: {problem}"
    for candidate in checkpoints:
        its = flaw(candidate)
        if its is None:
            return Saved(candidate, _is_adapter(candidate), reason)
        reason += f"; {candidate.name} is not whole: {its}"
    raise _no_model(folder, problem, checkpoints)


_NOTHING = "it holds none"


def flaw(folder: Path) -> str | None:
    """The reason why a model cannot be loaded from a folder; `None` where it can.

    Tensors are not read: it takes no longer for 13 GB.
    """
    adapter = _is_adapter(folder)
    weights = [name for name in (_ADAPTERS if adapter else MODELS) if (folder / name).is_file()]
    index = next((name for name in INDEXES if (folder / name).is_file()), None)
    if not adapter and not (folder / CONFIG_NAME).is_file():
        return _NOTHING
    if not weights and not adapter and index is not None:
        broken = cut_off(folder / index)
        if broken is not None:
            return f"{index} is cut off ({broken})"
        weights = sorted(set(json.loads((folder / index).read_text(encoding="utf-8"))["weight_map"].values()))
    if not weights:
        return _NOTHING
    for name in (ADAPTER_CONFIG_NAME if adapter else CONFIG_NAME, *weights):
        if not (folder / name).is_file():
            return f"{name} is missing"
        broken = cut_off(folder / name)
        if broken is not None:
            return f"{name} is cut off ({broken})"
    return None


def load(saved: Saved, device: str | None = None) -> tuple[Any, Any]:
    """Load a model and its tokenizer, in the dtype that it was saved in.

    Args:
        saved: where it is.
        device: by default the first card, where there is one.

    Raises:
        UserError: it writes no text, or the libraries cannot load it.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    with reporting_complaints(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of libraries, about each other
        if not saved.adapter:
            _check_writes_text(saved.folder)
        _check_tokenizer(saved.folder)
        tokenizer = AutoTokenizer.from_pretrained(saved.folder)
        how: dict[str, Any] = {"dtype": "auto", "device_map": {"": device}}
        if saved.adapter:
            from peft import AutoPeftModelForCausalLM

            model = AutoPeftModelForCausalLM.from_pretrained(saved.folder, **how)
        else:
            model = AutoModelForCausalLM.from_pretrained(saved.folder, **how)
    return model.eval(), tokenizer


def _check_folder(folder: Path) -> None:
    if folder.is_dir():
        return
    if folder.exists():
        raise UserError(f"{folder} is a file; give the folder of a run.")
    parent = folder.parent
    beside = [path.name for path in _folders(parent) if _holds_model(path)] if parent.is_dir() else []
    hint = nearest(folder.name, beside) or (f" Beside it models are in {', '.join(beside[:5])}." if beside else "")
    raise UserError(f"there is no folder {folder}; give one in which a run has saved its model (output_dir).{hint}")


def _checkpoint(folder: Path, checkpoints: list[Path], wanted: str) -> Saved:
    """The checkpoint that is asked for."""
    names = [path.name for path in checkpoints]
    if not names:
        raise UserError(f"{folder} holds no checkpoint; leave out --checkpoint for the model itself.")
    if wanted.lower() == LATEST:
        chosen = next((path for path in checkpoints if flaw(path) is None), checkpoints[0])
    else:
        found = [path for path in checkpoints if path.name in (wanted, f"checkpoint-{wanted}")]
        if not found:
            raise UserError(f"{folder} holds no checkpoint {wanted}, only {', '.join(reversed(names))}; or {LATEST}.")
        (chosen,) = found
    problem = flaw(chosen)
    if problem is not None:
        raise UserError(f"{chosen} cannot be loaded: {_in_words(problem)}. Others: {', '.join(reversed(names))}.")
    return Saved(chosen, _is_adapter(chosen))


def _no_model(folder: Path, problem: str, checkpoints: list[Path]) -> UserError:
    if checkpoints:
        return UserError(f"neither {folder} nor one of its {len(checkpoints)} checkpoints holds a model that is whole.")
    if problem != _NOTHING:
        return UserError(f"the model in {folder} cannot be loaded: {problem}.")
    below = [path for path in _folders(folder) if _holds_model(path)]
    hint = f" There is one in {' and in '.join(map(str, below[:3]))}." if below else ""
    return UserError(f"{folder} holds no model and no checkpoint; give the output_dir of a run.{hint}")


def _in_words(problem: str) -> str:
    return "it holds no model" if problem == _NOTHING else problem


def _newer(folder: Path, checkpoints: list[Path]) -> str | None:
    """A remark where the last checkpoint was written after the model: a run that was resumed, and has not ended."""
    if not checkpoints or flaw(checkpoints[0]) is not None:
        return None
    written, last = (max(file.stat().st_mtime for file in _weights(path)) for path in (folder, checkpoints[0]))
    if last <= written:
        return None
    return f"{checkpoints[0].name} in it is newer: --checkpoint {LATEST} loads that"


def _weights(folder: Path) -> Iterable[Path]:
    names = (*_ADAPTERS, *MODELS, *INDEXES)
    return [folder / name for name in names if (folder / name).is_file()]


def _is_adapter(folder: Path) -> bool:
    return (folder / str(ADAPTER_CONFIG_NAME)).is_file()


def _holds_model(folder: Path) -> bool:
    return flaw(folder) is None or bool(checkpoints_in(folder))


def _folders(parent: Path) -> list[Path]:
    return sorted(path for path in parent.iterdir() if path.is_dir())


def _check_writes_text(folder: Path) -> None:
    architectures = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8")).get("architectures") or []
    kinds = ("ForSequenceClassification", "ForTokenClassification", "ForMaskedLM", "ForImageClassification")
    other = [name for name in architectures if name.endswith(kinds)]
    if other:
        raise UserError(f"{folder} holds a {other[0]}, which writes no text: there is nothing to talk to.")


def _check_tokenizer(folder: Path) -> None:
    if not any(path.is_file() for pattern in _TOKENIZERS for path in folder.glob(pattern)):
        raise UserError(
            f"{folder} holds a model without its tokenizer: copy tokenizer.json and tokenizer_config.json there, from "
            "the model that it was trained from."
        )
