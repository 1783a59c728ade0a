"""Commands of hf-galore in two processes that train together, forked from one that has imported all they need.

Under torchrun's own agent, or by hand as from two shells. Importing torch and TRL takes longer than all that they do.
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn, TypeAlias

import torch
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

import hf_galore.cli.dpo
import hf_galore.cli.glue
import hf_galore.cli.pretrain
import hf_galore.cli.sft  # noqa: F401  (for the processes to come)
from hf_galore.cli.main import main as hf_galore_main
from tests.support.warm import torchrun

COUNT = 2

Prepare: TypeAlias = Callable[[int], None]
"""Called in each process with its number, before its command."""


def settle() -> None:
    """Make this process one to fork from."""
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()


def _work(arguments: list[str], prepare: Prepare | None, folder: Path) -> None:
    rank = int(os.environ["RANK"])
    (folder / f"pid-{rank}").write_text(str(os.getpid()), encoding="utf-8")
    if prepare is not None:
        prepare(rank)
    status = hf_galore_main(arguments)
    (folder / f"status-{rank}").write_text(str(status), encoding="utf-8")
    if status:
        raise SystemExit(status)


def under_torchrun(arguments: list[str], folder: Path, prepare: Prepare | None = None) -> int:
    """Run a command in two processes under torchrun's agent, and return its status.

    Args:
        arguments: of `hf-galore`.
        folder: where the processes leave their numbers, their statuses and what they print.
        prepare: what each does before.
    """
    try:
        torchrun(COUNT, folder / "logs", _work, arguments, prepare, folder)
    except ChildFailedError:
        return 1
    return 0


def by_hand(arguments: list[str], folder: Path, prepare: Prepare | None = None) -> int:
    """Run a command in two processes that nobody watches, and return how many failed; otherwise as `under_torchrun`."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    children = [_forked(arguments, folder, prepare, rank, port) for rank in range(COUNT)]
    return sum(os.waitpid(child, 0)[1] != 0 for child in children)


def _forked(arguments: list[str], folder: Path, prepare: Prepare | None, rank: int, port: int) -> int:
    child = os.fork()
    if child:
        return child
    status = 1
    for number, name in ((1, "stdout"), (2, "stderr")):
        with (folder / f"{name}-{rank}.log").open("w") as stream:
            os.dup2(stream.fileno(), number)
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": COUNT, "LOCAL_WORLD_SIZE": COUNT, "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in own.items()}, MASTER_ADDR="localhost")
    with contextlib.suppress(BaseException):
        _work(arguments, prepare, folder)
        status = 0
    os._exit(status)  # not through what the parent has registered for its own end


@contextlib.contextmanager
def at_most(seconds: float, what: str) -> Iterator[None]:
    """End this process with an error where what is within takes longer."""

    def late(*_: object) -> NoReturn:
        raise SystemExit(f"{what}: not at its end after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(int(seconds))
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def printed(folder: Path, rank: int, stream: str) -> str:
    """What a process under torchrun's agent has printed, to `stdout` or `stderr`."""
    (found,) = folder.glob(f"logs/*/*/{rank}/{stream}.log")
    return found.read_text(encoding="utf-8")


def all_printed(folder: Path) -> str:
    """What the processes of a run have printed, for errors."""
    files = sorted(path for path in folder.rglob("*.log") if path.is_file())
    return "\n".join(f"--- {path.relative_to(folder)}\n{path.read_text(encoding='utf-8')}" for path in files)
