"""The machine besides its cards: system, memory, disk, where the libraries keep what they download."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from ..expandable_segments import SETTING, VARIABLE, in_use, supported, use_expandable_segments
from .findings import Finding

_GIB = 2**30
_LITTLE_DISK, _NO_DISK = 40, 1  # GiB; a 7B model takes 13 of them, each checkpoint of it 20
_CGROUPS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def hosted(environ: Mapping[str, str] = os.environ) -> str | None:
    """Whose notebook this is: Colab or Kaggle; `None` elsewhere."""
    if "COLAB_RELEASE_TAG" in environ or "COLAB_GPU" in environ:
        return "Colab"
    return "Kaggle" if "KAGGLE_KERNEL_RUN_TYPE" in environ else None


def system(host: str | None, card: str | None) -> Finding:
    """The operating system, and whose machine it is.

    Args:
        host: as `hosted` returns it.
        card: the name of the first card, if there is one.
    """
    text = f"{platform.system()} {platform.release()}, {platform.machine()}, {os.cpu_count()} cores"
    if "microsoft" in platform.release().lower():
        text += "; WSL"
    if host is not None:
        text = f"{host} ({card or 'no card'}); {text}"
    return Finding("system", "ok", text)


def memory() -> Finding:
    """The main memory, or what of it this container may use."""
    total = _total_memory()
    if total is None:
        return Finding("memory", "note", "the system does not say how much there is")
    limits = [limit for limit in map(_limit, _CGROUPS) if limit is not None and limit < total]
    container = f" (the machine has {total / _GIB:.1f})" if limits else ""
    return Finding("memory", "ok", f"{min([total, *limits]) / _GIB:.1f} GiB{container}")


def _total_memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # Windows has none
        return None


def _limit(file: Path) -> int | None:
    try:
        return int(file.read_text(encoding="ascii"))
    except (OSError, ValueError):  # not there, or "max"
        return None


def disk(topic: str, folder: Path) -> Finding:
    """What is free where a folder is, or will be."""
    place = next((path for path in (folder, *folder.parents) if path.exists()), Path("/"))
    try:
        free = shutil.disk_usage(place).free / _GIB
    except OSError as error:
        return Finding(topic, "problem", f"{shown(folder)} cannot be looked at: {error.strerror}")
    text = f"{free:,.1f} GiB free for {shown(folder)}"
    if not os.access(place, os.W_OK):
        return Finding(topic, "note", f"{text}, which cannot be written to.", "Give another folder, as --output_dir.")
    if free < _NO_DISK:
        return Finding(topic, "problem", text, "No checkpoint and no model has room there.")
    if free < _LITTLE_DISK:
        return Finding(topic, "note", text, "A 7B model takes 13 GB, and each checkpoint of it about 20.")
    return Finding(topic, "ok", text)


def disks() -> Iterator[Finding]:
    """What is free in this folder, and where the libraries keep what they download."""
    from huggingface_hub import constants

    yield disk("disk", Path.cwd())
    yield disk("Hub's cache", Path(constants.HF_HUB_CACHE))


def shown(path: Path) -> str:
    """A path without the user's name."""
    try:
        return f"~/{path.relative_to(Path.home()).as_posix()}".removesuffix("/.")
    except (ValueError, RuntimeError):
        return str(path)


def segments(environ: Mapping[str, str] = os.environ) -> Finding:
    """Whether torch's allocator has expandable segments in what a command of ours trains."""
    topic = "allocator"
    if not supported():
        return Finding(topic, "note", f"torch has no expandable segments on {_named()}: it keeps more of a card.")
    would = dict(environ)
    advice = use_expandable_segments(would)  # as a command does, in a copy
    if advice is not None or not in_use(would):
        return Finding(topic, "note", "without expandable segments", advice)
    return Finding(topic, "ok", f"{VARIABLE}={would.get(VARIABLE, SETTING)}; commands set it where it is not set")


def _named() -> str:
    return {"win32": "Windows", "darwin": "macOS"}.get(sys.platform, platform.release())
