"""Kill one of two processes that train together, again and again, each time where they went on from the last whole
checkpoint.

    python -m tests.support.killed_ranks FOLDER MODEL DATA OPTIM

Writes, as JSON, for each kill its moment, the seconds to the end of both processes, and which checkpoints are whole;
ends with an error where a run hung, or ended elsewhere than one that was left alone.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from transformers import Trainer
from trl import SFTTrainer

from hf_galore.recipes.checkpoints import checkpoints_in, flaw
from tests.support.commands import options, short_run, weights
from tests.support.helpers import assert_identical
from tests.support.ranks import COUNT, all_printed, at_most, by_hand, settle, under_torchrun

STEPS = 8


class Kill(NamedTuple):
    """When which process kills itself."""

    moment: str
    rank: int
    step: int


# In the order in which one run meets them. Steps from 1 on; a checkpoint is written after each.
KILLS = (
    Kill("in a step", 1, 2),
    Kill("in the backward pass", 0, 4),
    Kill("before its part of a checkpoint", 1, 5),
    Kill("in the middle of a file of a checkpoint", 0, 6),
)
LAUNCHERS = (under_torchrun, under_torchrun, by_hand, under_torchrun)


def end_self(folder: Path) -> NoReturn:
    """Leave the time in a file, and end as by `kill -9`."""
    (folder / "killed").write_text(str(time.time()), encoding="utf-8")
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("a process has outlived SIGKILL")


def prepare(kill: Kill, folder: Path, rank: int) -> None:
    """Let this process end itself at a moment of its training, if it is its turn."""
    if rank != kill.rank:
        return
    train, save_states, save = SFTTrainer.training_step, Trainer._save_rng_state, torch.save

    def training_step(self: SFTTrainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == kill.step - 1:
            if kill.moment == "in a step":
                end_self(folder)
            if kill.moment == "in the backward pass":  # the embedding's gradient is the last to come
                next(self.model.parameters()).register_hook(lambda gradient: end_self(folder))
        return train(self, *args, **kwargs)

    def save_rng_state(self: Trainer, output_dir: str) -> None:
        if kill.moment == "before its part of a checkpoint" and self.state.global_step == kill.step:
            end_self(folder)
        save_states(self, output_dir)

    def half(found: Any, path: Any, *args: Any, **kwargs: Any) -> None:
        save(found, path, *args, **kwargs)
        if str(path).endswith(os.path.join(f"checkpoint-{kill.step}", "optimizer.pt")):
            os.truncate(path, os.path.getsize(path) // 2)
            end_self(folder)

    SFTTrainer.training_step, Trainer._save_rng_state = training_step, save_rng_state
    if kill.moment == "in the middle of a file of a checkpoint":
        torch.save = half  # type: ignore[assignment]


def main(folder: Path, model: Path, data: Path, optim: str) -> None:
    """Kill processes at each of the moments, go on after each, and hold the end against a run that was left alone."""
    settle()

    def given(out: Path, *, resume: bool = False) -> list[str]:
        settings = {
            **short_run(model, data, out),
            "optim": optim,
            "optim_args": "rank=8, update_proj_gap=3, proj_bits=16",
            "max_steps": STEPS,
            "save_steps": 1,
        }
        return ["sft", *options({**settings, **({"resume_from_checkpoint": "true"} if resume else {})})]

    def logs_of(name: str) -> Path:
        logs = folder / name
        logs.mkdir()
        return logs

    found = []
    out, alone = folder / "killed", folder / "alone"
    for number, (kill, launch) in enumerate(zip(KILLS, LAUNCHERS, strict=True)):
        logs = logs_of(f"kill-{number}")
        with at_most(300, f"killed {kill.moment}"):
            failed = launch(given(out, resume=number > 0), logs, functools.partial(prepare, kill, logs))
        if not failed or not (logs / "killed").exists():
            raise SystemExit(f"{kill}: status {failed}\n{all_printed(logs)}")
        seconds = time.time() - float((logs / "killed").read_text())
        for rank in range(COUNT):
            with contextlib.suppress(ProcessLookupError):
                os.kill(int((logs / f"pid-{rank}").read_text()), 0)
                raise SystemExit(f"{kill}: process {rank} is still there")
        flaws = {path.name: flaw(path) for path in checkpoints_in(out)}
        found.append({"moment": kill.moment, "by": launch.__name__, "seconds": seconds, "flaws": flaws})
    for name, arguments in (("last", given(out, resume=True)), ("left-alone", given(alone))):
        logs = logs_of(name)
        with at_most(300, name):
            if under_torchrun(arguments, logs):
                raise SystemExit(all_printed(logs))
    assert_identical(weights(out), weights(alone))
    states = (torch.load(path / f"checkpoint-{STEPS}" / "optimizer.pt", weights_only=True) for path in (out, alone))
    assert_identical(*states)
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4])
