"""Complaints of libraries about what a person gave: each becomes one line, without a traceback; bugs keep theirs."""

from __future__ import annotations

import contextlib
import linecache
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from ..errors import UserError
from .full_disk import full_disk


@contextlib.contextmanager
def reporting_errors(output_dir: str, *, leaves_nothing: bool = False) -> Iterator[None]:
    """Turn complaints of libraries into `UserError`, and leave no empty `output_dir` behind.

    Among them are a full disk, a card whose memory has run out, and another process of the run that is gone.

    Args:
        output_dir: the folder, which is made meanwhile.
        leaves_nothing: whether it is of no use without an error either.
    """
    folder = Path(output_dir).absolute()
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    with reporting_complaints():
        try:
            yield
        except BaseException as error:
            remove_empty(missing)
            full = full_disk(error, Path(output_dir))
            if full is not None:
                raise full from error
            lost = lost_process(error)
            if lost is not None:
                raise lost from error
            if isinstance(error, torch.OutOfMemoryError):
                raise UserError(
                    f"{str(error).partition('. If reserved')[0]}. Give a lower per_device_train_batch_size, max_length "
                    "or rank; `hf-galore plan` says of a recipe what it needs, and with --suggest what fits."
                ) from error
            raise
        if leaves_nothing:
            remove_empty(missing)


def lost_process(error: BaseException) -> UserError | None:
    """The error that says that another process of the run is gone; `None` where `error` tells of something else.

    gloo raises a plain RuntimeError, which has the place in its source.
    """
    group = torch.distributed
    if not isinstance(error, RuntimeError) or not group.is_available() or not group.is_initialized():
        return None
    if not isinstance(error, group.DistError) and "gloo/transport" not in str(error):
        return None
    reason = str(error).partition("]")[2].partition(". ")[0] if "gloo/transport" in str(error) else str(error)
    return UserError(
        f"another of the {group.get_world_size()} processes is gone, or does not answer ({reason.strip()[:200]}). "
        "What it has printed says why. To go on from the last checkpoint, start all of them with "
        "--resume_from_checkpoint."
    )


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
        if _is_of_template(error):
            raise UserError(f"A conversation cannot be put into the chat template: {error}") from error
        if _is_about_arguments(error):
            raise UserError(str(error)) from error
        raise


# The libraries that read a recipe's values, or those of another library's configuration.
_CHECKING = ("hf_galore", "trl", "transformers", "datasets", "peft", "axolotl", "huggingface_hub")

_JINJA = {"__jinja_template__", "__jinja_exception__"}  # what the global names of a template's frames are told by


def _is_of_template(error: Exception) -> bool:
    """Whether a chat template failed on what it was given: it may do so in the middle of the data."""
    from jinja2 import TemplateError

    frames = traceback.walk_tb(error.__traceback__)
    return isinstance(error, TemplateError) or any(not _JINJA.isdisjoint(frame.f_globals) for frame, _ in frames)


def _is_about_arguments(error: Exception) -> bool:
    """Whether a library raised `error` on purpose, about what it was given; a bug's traceback is to be seen."""
    import datasets  # which nobody waits for who has made no mistake

    if not isinstance(error, (ValueError, ImportError, OSError, datasets.exceptions.DatasetsError)):
        return False
    if isinstance(error, OSError) and error.errno is not None:  # the operating system's: disk full, and the like
        return False
    frame, line = list(traceback.walk_tb(error.__traceback__))[-1]
    raised = linecache.getline(frame.f_code.co_filename, line).lstrip().startswith("raise ")
    module = str(frame.f_globals.get("__name__"))
    return raised and (module.partition(".")[0] in _CHECKING or module.startswith("torch.optim."))
