"""`hf-galore compare --sweep`: the runs of a sweep, one after the other, each in a process of its own."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from types import FrameType

from ..compare.sweep import SETTINGS_FILE, Sweep, Trial, options_to_go_on
from ..errors import Interrupted
from ..recipes.errors import remove_empty
from ..recipes.output_folder import check_unused
from ..recipes.whole_files import write_whole
from ..recipes.writable import unwritable_folder
from .interrupts import SIGHUP, STOPPING, Stopped, handled
from .training_command import to_go_on

_PATIENCE = 10  # seconds that a run has that is told to stop at once
_STOPPED = tuple(128 + number for number in STOPPING)


def run_sweep(sweep: Sweep, prog: str, arguments: Sequence[str], *, to_stderr: bool = False) -> int:
    """Run what is not finished, one after the other.

    Args:
        sweep: from `plan_sweep`.
        prog: the command, to say how to go on.
        arguments: all that it was given, to say how to go on.
        to_stderr: whether what the runs print is kept out of stdout.

    Returns:
        0, or the exit status of the run that failed, after which no other is begun.

    Raises:
        Stopped: Ctrl-C or SIGTERM.
        UserError: a folder holds a run, and the sweep neither goes on with it nor overwrites it.
    """
    stream = sys.stderr if to_stderr else sys.stdout
    again = shlex.join(to_go_on(arguments))
    # All are checked before the first is run.
    for trial in sweep.trials:
        check_unused(trial.folder, sweep.output, resumes=sweep.resumes, of_sweep=True)
    todo = [(trial, options_to_go_on(trial) if sweep.resumes else []) for trial in sweep.trials]
    for count, (trial, options) in enumerate(todo, start=1):
        progress = f"{trial.name} ({count} of {len(todo)})"
        if options is None:
            print(f"{progress} is finished: it is not run again.", file=stream, flush=True)
            continue
        command = [*trial.command, *options]
        print(f"{progress}: hf-galore {shlex.join(command)}", file=stream, flush=True)
        status = _run(trial, command, to_stderr)
        if status in _STOPPED:
            raise Stopped(f"interrupted in {trial.name}; go on with: {prog} {again}", status)
        if status:
            print(
                f"{prog}: {trial.name} failed with exit status {status}, and the sweep stops: hf-galore "
                f"{shlex.join(command)}. What is finished is kept; go on with: {prog} {again}",
                file=sys.stderr,
            )
            return status
    return 0


def _run(trial: Trial, command: Sequence[str], to_stderr: bool) -> int:
    """Run one, and return its exit status: 128 and the signal's number, as shells have it, where a signal ended it."""
    folder, record = trial.folder, trial.folder / SETTINGS_FILE
    missing = [path for path in (folder.absolute(), *folder.absolute().parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(record, json.dumps(trial.settings, indent=2) + "\n")
    except OSError as error:
        raise unwritable_folder("output_dir", folder, error) from error
    status = _wait([sys.executable, "-m", "hf_galore.cli.main", *command], to_stderr)
    if status and list(folder.iterdir()) == [record]:  # it left nothing, and so do we
        record.unlink()
        remove_empty(missing)
    return status


def _wait(command: Sequence[str], to_stderr: bool) -> int:
    asked = set[int]()

    def interrupt(number: int, frame: FrameType | None) -> None:
        if number == SIGHUP and number in asked:  # of the terminal, and of its shell: nobody insists
            return
        asked.add(number)
        raise Interrupted(number)

    with handled(interrupt):
        process = subprocess.Popen(command, stdout=2 if to_stderr else None)
        try:
            status = process.wait()
        except Interrupted as interrupted:
            _stop(process)
            return 128 + interrupted.number
    return 128 - status if status < 0 else status


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Wait until a run has finished its step and written a checkpoint; what comes meanwhile stops it at once."""
    try:
        # A terminal has sent Ctrl-C to it too, others to this process alone. This is another signal: it does not count
        # as Ctrl-C once more. (On Windows it would end the run at once, and there Ctrl-C reaches both.)
        if os.name != "nt":
            process.terminate()
        process.wait()
    except Interrupted:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_PATIENCE)
    finally:
        process.kill()  # or else it has ended
        process.wait()
