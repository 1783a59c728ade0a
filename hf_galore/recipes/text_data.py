"""Text to pretrain on: a dataset of the Hub or of this machine, or any folder of text files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trl import ScriptArguments

from ..errors import UserError
from .data_loading import READERS, ending, first_row, load_dataset, load_named, split_of, visible_files
from .rows import check_texts

# What `datasets` reads as tables; a folder without such files is one of texts.
_TABLES = {kind for kind, reader in READERS.items() if reader != "text"}


def load_text(script_args: ScriptArguments, text_field: str, held_out: float, *, evaluate: bool) -> tuple[Any, Any]:
    """Load the training and the held-out documents, each a dataset or a stream with a column of text.

    A folder without tables (`.jsonl`, `.parquet`, ...) is read as text: each file in it, or in the folders below it, is
    one document; folders named as the splits are the splits. One file is the split `train`: a table, or one document.

    Args:
        script_args: the dataset's name or folder, its splits, whether it is streamed.
        text_field: the column.
        held_out: which part of the documents is held out, where there is no split for it.
        evaluate: whether held-out documents are wanted.

    Raises:
        UserError: there is no such dataset, split or column, or a file is not text.
    """
    name, test_name = script_args.dataset_name, script_args.dataset_test_split
    if not name:
        raise UserError("dataset_name is missing: give a dataset's name, or a folder with text files.")
    splits = _load(script_args)
    given = f"dataset_name {name}"
    train = _split(splits, script_args.dataset_train_split, "dataset_train_split", text_field, given)
    if not evaluate:
        return train, None
    if test_name in splits:
        return train, _split(splits, test_name, "dataset_test_split", text_field, given)
    every = round(1 / held_out)
    held = train.filter(lambda _, index: index % every == 0, with_indices=True)
    kept = train.filter(lambda _, index: index % every != 0, with_indices=True)
    if next(iter(kept), None) is None:
        raise UserError(
            f"dataset_name {name} has too few documents to hold some out. Set eval_strategy to 'no', or add a split "
            f"{test_name!r}."
        )
    return kept, held


def _load(script_args: ScriptArguments) -> Any:
    name, streaming = str(script_args.dataset_name), script_args.dataset_streaming
    given, path = f"dataset_name {name}", Path(name)
    if path.is_dir():
        files = [file for file in visible_files(path) if file.name.lower() != "readme.md"]
        if not files:
            raise UserError(f"{given} is a folder without files.")
        if _TABLES.isdisjoint(map(ending, files)):
            if not any(file.stat().st_size for file in files):
                raise UserError(f"{given} is a folder of empty files.")
            by_split = _by_split(path, files)
            return load_dataset(given, "text", data_files=by_split, sample_by="document", streaming=streaming)
    if path.is_file() and ending(path) not in _TABLES:
        return load_dataset(given, "text", data_files=name, sample_by="document", streaming=streaming)
    return load_named(given, name, config=script_args.dataset_config, streaming=streaming)


def _by_split(folder: Path, files: list[Path]) -> dict[str, list[str]]:
    known = ("train", "validation", "test")
    found: dict[str, list[str]] = {}
    for path in files:
        first = path.relative_to(folder).parts[0]
        found.setdefault(first if first in known else "train", []).append(str(path))
    return found


def _split(splits: Any, name: str, key: str, text_field: str, given: str) -> Any:
    split = split_of(splits, name, key)
    first = first_row(split, given)
    if first is None:
        raise UserError(f"The dataset's split {name!r} is empty.")
    if text_field not in first:
        raise UserError(
            f"The dataset's split {name!r} has the columns {', '.join(first)}, but no {text_field!r}. Set "
            "dataset_text_field to the one with the text."
        )
    return check_texts(split.select_columns([text_field]), name, given=given, column=text_field)
