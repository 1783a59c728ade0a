"""Loading data with the `datasets` library, by a name, a folder or a file, with its errors said in one line."""

from __future__ import annotations

import contextlib
import json
import logging
import lzma
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets

from ..errors import UserError

READERS = {
    ".json": "json",
    ".jsonl": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".txt": "text",
}
"""Of one file, by the end of its name, that of `datasets`."""

_COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
_CUT_OFF = (EOFError, zlib.error, lzma.LZMAError)
"""Raised of a compressed file that is not whole."""


def load_dataset(given: str, *args: Any, **options: Any) -> Any:
    """Load the splits of a dataset.

    Args:
        given: what names the data, for the error: `dataset_name org/data`.
        args: those of `datasets.load_dataset`.
        options: those of `datasets.load_dataset`.

    Raises:
        UserError: it cannot be loaded.
    """
    with reading(given):
        return datasets.load_dataset(*args, **options)


def load_named(given: str, name: str, *, config: str | None = None, streaming: bool = False) -> Any:
    """Load the splits of a dataset by its name on the Hub, its folder, or its file, which is the split `train`.

    Args:
        given: what names the data, for the error: `dataset_name data.jsonl`.
        name: the name.
        config: which of the dataset's configurations.
        streaming: whether it is a stream.

    Raises:
        UserError: it cannot be loaded.
    """
    path = Path(name).expanduser()
    if path.is_file():
        kind = ending(path)
        if kind not in READERS:
            raise UserError(
                f"{given} is a file whose name ends in none of {', '.join(READERS)}. Give one of these, a folder with "
                "such files, or a dataset's name."
            )
        more = {"sep": "\t"} if kind == ".tsv" else {}
        return load_files(given, READERS[kind], {"train": [str(path)]}, streaming=streaming, **more)
    if ending(path) in READERS and not path.exists():
        raise UserError(f"{given}: there is no such file.")
    if not path.is_dir():
        found = load_dataset(given, name, name=config, streaming=streaming)
        if not streaming:
            _check_no_folders_copy(given, found)
        return found
    with _naming_the_line(given, visible_files(path)):
        return load_dataset(given, str(path), name=config, streaming=streaming)


# The folder in its cache where `datasets` keeps what it has read from files has a hash of them as its name. What comes
# from the Hub is kept by its commit, of 40 digits.
_OF_FILES = re.compile("[0-9a-f]{16}")


def _check_no_folders_copy(given: str, splits: Mapping[str, Any]) -> None:
    """Check that data of a name come from the Hub: without it, `datasets` takes what a folder of that name once held.

    Raises:
        UserError: they do not.
    """
    kept = {Path(file["filename"]).parent for split in splits.values() for file in getattr(split, "cache_files", ())}
    copies = sorted(str(folder) for folder in kept if _OF_FILES.fullmatch(folder.name))
    if copies:
        raise UserError(
            f"{given}: there is no such folder here, and the Hub cannot be reached. What {copies[0]} has are files of "
            "a folder of that name that were read before, here or elsewhere. Give a folder that is there, or go online."
        )


def load_files(given: str, reader: str, files: Mapping[str, Sequence[str]], **options: Any) -> Any:
    """Load the splits of a dataset from files.

    Args:
        given: what names the data, for the error.
        reader: that of `datasets`, one of the values of `READERS`.
        files: of each split.
        options: those of `datasets.load_dataset`.

    Raises:
        UserError: they cannot be loaded.
    """
    with _naming_the_line(given, [Path(name) for names in files.values() for name in names]):
        return load_dataset(given, reader, data_files=dict(files), **options)


def ending(path: Path) -> str:
    """The end of a file's name that says its format: `.jsonl`, of `data.jsonl.gz` too."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in _COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def visible_files(folder: Path) -> list[Path]:
    """The files in a folder and those below, as `datasets` finds them: without hidden ones."""
    found = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return [path for path in found if not any(part.startswith((".", "__")) for part in path.relative_to(folder).parts)]


@contextlib.contextmanager
def _naming_the_line(given: str, files: list[Path]) -> Iterator[None]:
    """Say which file is empty, or which line of which file cannot be read; `datasets` says the place in a block.

    An empty file beside others may be one that it does not read, or takes for no rows.

    Raises:
        UserError: what is within cannot load them; the message says why.
    """
    try:
        yield
    except UserError:
        for path in files:
            if ending(path) in READERS and path.stat().st_size == 0:
                raise UserError(f"{given} cannot be loaded: {path} is empty. Give it rows, or remove it.") from None
        reason = next((found for path in files if (found := _flaw(path)) is not None), None)
        if reason is None:
            raise
        raise UserError(f"{given} cannot be loaded: {reason}.") from None


def _flaw(path: Path) -> str | None:
    """The first line of a file that cannot be read, and why; `None` where there is none, or nobody can tell."""
    kind = path.suffix.lower()
    if READERS.get(kind) not in ("json", "csv"):
        return None
    rows = 0 if READERS[kind] == "json" else -1  # the first of a table has the names of its columns
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            flaw = _flaw_of(line, is_json=kind == ".jsonl")
            if flaw is not None:
                return f"{path}, line {number} {flaw}"
            rows += bool(line.strip())
    return None if rows > 0 else f"{path} has no rows"


def _flaw_of(line: bytes, *, is_json: bool) -> str | None:
    try:
        text = line.decode("utf-8")
        if is_json and text.strip():
            json.loads(text)
    except UnicodeDecodeError as error:
        return f"is not text in UTF-8 ({error.reason}); save it in that encoding"
    except json.JSONDecodeError as error:
        return f"is no JSON ({error.msg}, at character {error.pos + 1})"
    return None


@contextlib.contextmanager
def reading(given: str) -> Iterator[None]:
    """Turn what `datasets` raises where it reads files for the first time into `UserError`.

    Args:
        given: what names the data, for the error.
    """
    with reporting_unreadable(given):
        try:
            yield
        except KeyError as error:  # that of datasets 4 for rows of which some lack a column
            raise UserError(f"{given} cannot be loaded: it has rows without {error}") from error


def first_row(split: Any, given: str) -> Any:
    """The first row of a split; `None` where it has none.

    Args:
        split: of a dataset; a stream reads its first file now.
        given: what names the data, for the error.

    Raises:
        UserError: it cannot be read.
    """
    with reading(given):
        return next(iter(split), None)


@contextlib.contextmanager
def reporting_unreadable(given: str) -> Iterator[None]:
    """Turn what `datasets` raises of data that it cannot read into `UserError`.

    Args:
        given: what names the data, for the error.
    """
    # It logs which file it was, above the line that says it again.
    said = logging.getLogger("datasets.packaged_modules")
    level = said.level
    said.setLevel(logging.CRITICAL)
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, datasets.exceptions.DatasetsError, StopIteration, *_CUT_OFF) as error:
        raise UserError(f"{given} cannot be loaded: {_reason(error)}") from error
    finally:
        said.setLevel(level)


def _reason(error: Exception) -> str:
    cause = error.__cause__ or error.__context__
    for one in (error, cause):
        if isinstance(one, UnicodeDecodeError):
            return f"it holds a file that is not text in UTF-8 ({one}). Save it in that encoding"
    if isinstance(error, StopIteration):
        return "it holds a file without rows"
    if isinstance(error, _CUT_OFF) or isinstance(cause, _CUT_OFF):
        return f"it holds a compressed file that is not whole ({error}). Copy or make it again"
    # This one says that something went wrong; what that was says its cause.
    says_nothing = type(error) is datasets.exceptions.DatasetGenerationError
    return str(cause if says_nothing and cause is not None else error)


def split_of(splits: Any, name: str, key: str) -> Any:
    """The split of a dataset that a key names.

    Args:
        splits: from `load_dataset`.
        name: of the split.
        key: where the name comes from: `dataset_train_split`.

    Raises:
        UserError: there is no such split.
    """
    if name not in splits:
        none = ", or eval_strategy to 'no'" if key == "dataset_test_split" else ""
        raise UserError(
            f"The dataset has no split {name!r}; it has {', '.join(splits)}. Set {key} to one of them{none}."
        )
    return splits[name]
