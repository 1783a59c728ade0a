"""A disk that is full when a run saves: in whose words libraries say it, and what to do then."""

from __future__ import annotations

import errno
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from ..errors import UserError
from .checkpoints import checkpoints_in, flaw
from .writable import nearest_there

_NUMBERS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Of safetensors and tokenizers, in Rust; and of torch's zip files, which say no reason.
_WORDS = re.compile(rf"\(os error ({'|'.join(map(str, _NUMBERS))})\)")
_TORCHS = re.compile(r"inline_container\.cc|PytorchStreamWriter failed|iostream error")


def full_disk(error: BaseException, output_dir: Path) -> UserError | None:
    """The error that says that a run's disk is full; `None` where it is another error that ended it.

    Args:
        error: what ended the run.
        output_dir: the run's folder.
    """
    reason = next((found for one in _chain(error) if (found := _reason(one)) is not None), None)
    if reason is None:
        return None
    free = shutil.disk_usage(nearest_there(output_dir)).free
    checkpoints = checkpoints_in(output_dir)
    whole = next((folder for folder in checkpoints if flaw(folder) is None), None)
    useless = "".join(f" {folder} is not whole: delete it." for folder in checkpoints[:1] if folder != whole)
    if whole is None:
        then = "then run the same command again, with --overwrite_output_dir where it says so"
    else:
        then = f"then go on from {whole} by --resume_from_checkpoint"
    return UserError(
        f"output_dir {output_dir}: what the run saves could not be written ({reason}); {free / 2**20:.0f} MiB are free "
        f"there.{useless} Free some, or set save_total_limit lower; {then}."
    )


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _reason(error: BaseException) -> str | None:
    if isinstance(error, OSError) and error.errno in _NUMBERS:
        return str(error)
    if _WORDS.search(str(error)):
        return str(error)
    if isinstance(error, RuntimeError) and _TORCHS.search(str(error)):
        return "torch could not write a file to its end"
    return None
