"""Whether something can be written where it is to go: found before minutes or hours of work, not after them."""

from __future__ import annotations

import tempfile
from pathlib import Path

from ..errors import UserError


def check_folder(option: str, folder: Path, *, make: bool = False) -> None:
    """Raise an error unless files can be written into a folder, which need not be there.

    Args:
        option: what the folder was given as, for the error: `output_dir`, `--output`.
        folder: where the files are to go.
        make: whether to make it now; or else the nearest folder above it that is there is tried.

    Raises:
        UserError: it cannot be written to, or a file is in its place.
    """
    nearest = nearest_there(folder)
    if not nearest.is_dir():
        raise UserError(f"{option} {folder} cannot be a folder, because {nearest} is a file. Give another one.")
    try:
        if make:
            folder.mkdir(parents=True, exist_ok=True)
        _try(folder if make else nearest)
    except OSError as error:
        raise unwritable_folder(option, folder, error) from error


def nearest_there(folder: Path) -> Path:
    """A folder, or the nearest above it that is there."""
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())


def check_file(option: str, file: Path) -> None:
    """Raise an error unless a file, which need not be there, can be written; its folder has to be there.

    Raises:
        UserError: it cannot be written, or is a folder, or there is no folder for it.
    """
    if not file.parent.is_dir():
        raise UserError(f"{option} {file}: there is no folder {file.parent}. Make it, or give another file.")
    if file.is_dir():
        raise UserError(f"{option} {file} is a folder. Give a file.")
    try:
        if file.exists():
            with file.open("r+b"):
                pass
        else:
            _try(file.parent)
    except OSError as error:
        raise UserError(f"{option} {file} cannot be written ({error}). Give another file.") from error


def unwritable_folder(option: str, folder: Path, error: OSError) -> UserError:
    """The error that says that a folder cannot be written to, and why."""
    return UserError(f"{option} {folder} cannot be written to ({error}). Give another one.")


def _try(folder: Path) -> None:
    # Permissions alone do not say it: file systems have rules of their own.
    with tempfile.TemporaryFile(dir=folder):
        pass
