"""Complaints of libraries about what a person gave: each becomes one line, without a traceback; bugs keep theirs."""

from __future__ import annotations

import contextlib
import linecache
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path

from ..errors import UserError


@contextlib.contextmanager
def reporting_errors(output_dir: str, *, leaves_nothing: bool = False) -> Iterator[None]:
    """Turn complaints of libraries about arguments into `UserError`, and leave no empty `output_dir` behind.

    Args:
        output_dir: the folder, which is made meanwhile.
        leaves_nothing: whether it is of no use without an error either.
    """
    folder = Path(output_dir).absolute()
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    with reporting_complaints():
        try:
            yield
        except BaseException:
            remove_empty(missing)
            raise
        if leaves_nothing:
            remove_empty(missing)


def remove_empty(folders: Iterable[Path]) -> None:
    """Remove those of the folders that are there and empty, in the order in which they are given."""
    for folder in folders:
        with contextlib.suppress(OSError):  # it is not there, or not empty
            folder.rmdir()


@contextlib.contextmanager
def reporting_complaints() -> Iterator[None]:
    """Turn complaints of libraries about arguments into `UserError`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if _is_about_arguments(error):
            raise UserError(str(error)) from error
        raise


# The libraries that read a recipe's values, or those of another library's configuration.
_CHECKING = ("hf_galore", "trl", "transformers", "datasets", "peft", "axolotl")


def _is_about_arguments(error: Exception) -> bool:
    """Whether a library raised `error` on purpose, about what it was given; a bug's traceback is to be seen."""
    import datasets  # which nobody waits for who has made no mistake

    if not isinstance(error, (ValueError, ImportError, OSError, datasets.exceptions.DatasetsError)):
        return False
    if isinstance(error, OSError) and error.errno is not None:  # the operating system's: disk full, and the like
        return False
    frame, line = list(traceback.walk_tb(error.__traceback__))[-1]
    raised = linecache.getline(frame.f_code.co_filename, line).lstrip().startswith("raise ")
    return raised and str(frame.f_globals.get("__name__")).partition(".")[0] in _CHECKING
