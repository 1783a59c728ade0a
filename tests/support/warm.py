"""Processes that begin with their libraries imported: forked from one that has done nothing but import them.

Importing torch, transformers and TRL takes seconds of each process, more than most of what tests let them do. Where a
test is about how a process begins (what it imports, what that says, variables that libraries read while they are
imported, signals amid it), it has to start one of its own.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import forkserver
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any
from unittest import mock

from tests.support.signals import set_defaults

ROOT = Path(__file__).parents[2]
LIMIT = 300.0
"""Seconds that a process is given."""

# Before any test has changed it: the first that asks for a process starts what all are forked from.
_ENVIRONMENT = dict(os.environ)


def begun(
    work: Callable[..., object],
    *arguments: Any,
    streams: Sequence[str | Path],
    folder: Path = ROOT,
    environment: Mapping[str, str] | None = None,
) -> ForkServerProcess:
    """Begin a process.

    Args:
        work: what it does, a function of a module; its exit status is that of a program which does it.
        arguments: of the function.
        streams: the paths of its stdin, stdout and stderr. Where the first is a terminal, the process is of that one.
        folder: where it works.
        environment: what it gets beside this process's own environment.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.support.warm_start"])
    path = os.pathsep.join([str(ROOT), *filter(None, [_ENVIRONMENT.get("PYTHONPATH")])])
    with mock.patch.dict(os.environ, {**_ENVIRONMENT, "PYTHONPATH": path}, clear=True):
        forkserver.ensure_running()
    process = context.Process(
        target=_work,
        args=(work, arguments, [str(stream) for stream in streams], folder, {**os.environ, **(environment or {})}),
    )
    process.start()
    return process


def ran(
    work: Callable[..., object], *arguments: Any, folder: Path = ROOT, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a process to its end; otherwise as `begun`."""
    with tempfile.TemporaryDirectory() as printed:
        stdout, stderr = Path(printed, "stdout"), Path(printed, "stderr")
        streams = (os.devnull, stdout, stderr)
        process = begun(work, *arguments, streams=streams, folder=folder, environment=environment)
        status = ended(process)
        return subprocess.CompletedProcess([*arguments], status, stdout.read_text("utf-8"), stderr.read_text("utf-8"))


def ended(process: ForkServerProcess, seconds: float = LIMIT) -> int:
    """Wait for the end of a process, and return its status as `subprocess` has it.

    Raises:
        AssertionError: it takes longer; it is ended, and those that it has launched too.
    """
    try:
        process.join(seconds)
    finally:  # where somebody has pressed Ctrl-C too, which is not for its terminal
        status = process.exitcode
        end(process)
    assert status is not None, f"not at its end after {seconds:.0f} s"
    return status


def end(process: ForkServerProcess) -> None:
    """End a process, if it has not ended yet: a launcher ends those that it has launched."""
    process.terminate()
    process.join(10)
    process.kill()
    process.join()


def hf_galore(*arguments: str) -> None:
    """What the command `hf-galore` does; an exit status other than 0 is raised."""
    from hf_galore.cli.main import main

    status = main(arguments)
    if status:
        sys.exit(status)  # and 0 is a function's return: one that exits tells torchrun's agent nothing


def torchrun(processes: int, logs: Path | None, work: Callable[..., object], *arguments: Any) -> None:
    """Do the work in several processes of this machine, as `torchrun --standalone` does: by the same agent.

    They end as all that `multiprocessing` has forked, without taking their group apart: gloo waits for ever now and
    then where one process is gone before the other. None may end by `os._exit`, which tells the agent nothing.

    Args:
        processes: how many.
        logs: where what they print goes; where this process prints if `None`.
        work: what each does.
        arguments: of the function.

    Raises:
        ChildFailedError: one of them has failed.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as torchrun does
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id="run",
        max_restarts=0,
        start_method="fork",
        logs_specs=DefaultLogsSpecs(
            log_dir=None if logs is None else str(logs), redirects=Std.NONE if logs is None else Std.ALL
        ),
    )
    elastic_launch(config, _launched)(work, *arguments)


def _launched(work: Callable[..., object], *arguments: Any) -> None:
    set_defaults()  # not what the agent does at a signal
    work(*arguments)


def module(name: str, *arguments: str) -> None:
    """What `python -m` does with a module."""
    sys.argv = [name, *arguments]
    runpy.run_module(name, run_name="__main__", alter_sys=True)


def launch(processes: int, name: str, *arguments: str) -> None:
    """Run a module in several processes of this machine, under torchrun's agent.

    Raises:
        AssertionError: one of them failed; the message has what they printed.
    """
    run = ran(torchrun, processes, None, module, name, *arguments, environment={"OMP_NUM_THREADS": "1"})
    assert run.returncode == 0, run.stdout + run.stderr


def _work(
    work: Callable[..., object],
    arguments: Sequence[Any],
    streams: Sequence[str],
    folder: Path,
    environment: Mapping[str, str],
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    set_defaults()
    os.setsid()
    for number, path in enumerate(streams):
        # The first terminal that the leader of a session opens is the session's, whose Ctrl-C it gets.
        opened = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(opened, number)
        os.close(opened)
    # As Python makes them of such files.
    sys.stdin = os.fdopen(0, encoding="utf-8", closefd=False)
    sys.stdout = os.fdopen(1, "w", buffering=1 if os.isatty(1) else -1, encoding="utf-8", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)
    work(*arguments)
