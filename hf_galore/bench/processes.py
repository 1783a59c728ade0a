"""One process for each job: its memory is its own, and what it fails with ends nothing else."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..expandable_segments import use_expandable_segments
from .jobs import OUT_OF_MEMORY, Failed, Job, Look, Measured, Planned

Result = Look | Planned | Measured | Failed
_KINDS: dict[str, Any] = {kind.__name__: kind for kind in (Look, Planned, Measured, Failed)}


def environment(inherited: Mapping[str, str]) -> dict[str, str]:
    """What the processes inherit: one GPU, and expandable segments unless somebody has said otherwise."""
    own = dict(inherited)
    use_expandable_segments(own)
    # With several a Trainer would use all of them.
    own["CUDA_VISIBLE_DEVICES"] = own.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    own.setdefault("TOKENIZERS_PARALLELISM", "false")
    return own


def run_all(jobs: Sequence[Job]) -> list[Result]:
    """Do some jobs at the same time, each in a process of its own, and return what came of each.

    Raises:
        KeyboardInterrupt: Ctrl-C; no process is left.
    """
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folders = [Path(name) / str(place) for place in range(len(jobs))]
        running = [stack.enter_context(_started(job, folder)) for job, folder in zip(jobs, folders, strict=True)]
        for process in running:
            process.wait()
        return [_result(process.returncode, folder) for process, folder in zip(running, folders, strict=True)]


def run(job: Job) -> Result:
    """Do one job; see `run_all`."""
    return run_all([job])[0]


@contextlib.contextmanager
def _started(job: Job, folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The process of a job, which does not outlive the context."""
    folder.mkdir()
    (folder / "job.json").write_text(json.dumps(dataclasses.asdict(job)), encoding="utf-8")
    command = [sys.executable, "-m", f"{__package__}.worker", str(folder / "job.json"), str(folder / "result.json")]
    with (folder / "said").open("wb") as said:
        process = subprocess.Popen(command, env=environment(os.environ), stdout=said, stderr=subprocess.STDOUT)
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def _result(status: int, folder: Path) -> Result:
    if status == 0:
        values = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        result: Result = _KINDS[values.pop("kind")](**values)
        return result
    said = (folder / "said").read_text(encoding="utf-8", errors="replace").strip().splitlines()
    last = said[-1] if said else ""
    if status == -getattr(signal, "SIGKILL", 9):
        return Failed(f"{OUT_OF_MEMORY}, the machine's own, it seems: the process was killed", last)
    return Failed(f"failed with exit status {status}", last)
