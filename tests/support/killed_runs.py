"""Kill a run that saves after every step, again and again, each time where it went on from what the last one left.

`python -m tests.support.killed_runs FOLDER SEED KILLS`. The children are forked: importing torch takes longer than all
of their training, and what libraries make at the first training of a process (tables, compiled patterns) takes a third
of it, so that this one trains two steps before. Writes, as JSON, how many kills left a half-written checkpoint; ends
with an error where one did not go on.
"""

from __future__ import annotations

import functools
import gc
import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch

from hf_galore.recipes.checkpoints import check_folders, checkpoints_in, flaw
from tests.support.commands import recorded_trainer, weights
from tests.support.helpers import assert_identical, tiny_llama

OPTIM = "galore_adamw_8bit_layerwise"
PATIENCE = 120.0  # seconds; a child needs a fraction of one
ENDLESS = 100_000


def train(folder: Path, model_seed: int, *, resume: bool = False, **overrides: Any) -> None:
    """A run as the commands make one, up to the end or to its being killed."""
    settings = {"lr_scheduler_type": "constant", "save_strategy": "steps", **overrides}
    trainer = recorded_trainer(folder, OPTIM, tiny_llama(model_seed), **settings)
    trainer.args.resume_from_checkpoint = "true" if resume else None
    check_folders(trainer.args)
    trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)


def forked(log: Path, work: Callable[[], None]) -> int:
    """The process that does `work` and ends, with what it prints in a file."""
    child = os.fork()
    return child if child else _work_and_exit(log, work)


def _work_and_exit(log: Path, work: Callable[[], None]) -> NoReturn:
    status = 1
    try:
        with log.open("w") as stream:
            os.dup2(stream.fileno(), 1)
            os.dup2(stream.fileno(), 2)
        work()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)  # not through what the parent has registered for its own end


def wait_for(step: int, out: Path, child: int, log: Path) -> float:
    """Wait until a child has begun to write the checkpoint of a step, and say when that was."""
    deadline = time.monotonic() + PATIENCE
    while not (out / f"checkpoint-{step}" / "config.json").exists():
        ended, _ = os.waitpid(child, os.WNOHANG)
        if ended or time.monotonic() > deadline:
            raise SystemExit(f"no checkpoint-{step} was begun:\n{log.read_text()}")
        time.sleep(0.001)
    return time.monotonic()


def finish(child: int, log: Path) -> None:
    """Wait for a child that is to end by itself."""
    if os.waitpid(child, 0)[1]:
        raise SystemExit(f"a run failed:\n{log.read_text()}")


def main(folder: Path, seed: int, kills: int) -> None:
    """Kill `kills` runs, go on after each, and hold the end against a run that was left alone."""
    torch.set_num_threads(1)
    for step in (1, 2):
        train(folder / "first", 0, resume=step > 1, save_steps=1, max_steps=step)
    # A Trainer collects garbage when it begins: a child would copy all that the libraries made, to look through it.
    gc.collect()
    gc.freeze()
    delays = random.Random(seed)
    out, log = folder / "killed", folder / "log.txt"
    half_written, reached = 0, 0
    for kill in range(kills):
        # What a resumed run knows of the weights is what the checkpoint says: the model's own are others.
        settings = {"save_steps": 1, "save_total_limit": 2, "max_steps": ENDLESS}
        child = forked(log, functools.partial(train, out, kill, resume=kill > 0, **settings))
        # The first step's may be there in part. The second is begun when that is whole; a moment in the two steps that
        # follow, whatever the machine's speed.
        begun = [wait_for(reached + step, out, child, log) for step in (2, 3)]
        time.sleep(delays.uniform(0, 2 * (begun[1] - begun[0])))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        problems = {path: flaw(path) for path in checkpoints_in(out)}
        half_written += any(problems.values())
        reached = next(int(path.name.partition("-")[2]) for path, problem in problems.items() if problem is None)

    last = {"save_steps": 1, "max_steps": reached + 1}
    finish(forked(log, functools.partial(train, out, kills, resume=True, **last)), log)
    alone = folder / "alone"
    finish(forked(log, functools.partial(train, alone, 0, save_steps=reached + 1, max_steps=reached + 1)), log)
    ended, expected = (path / f"checkpoint-{reached + 1}" for path in (out, alone))
    assert_identical(weights(ended), weights(expected))
    assert_identical(*(torch.load(path / "optimizer.pt", weights_only=True) for path in (ended, expected)))
    sys.stdout.write(json.dumps({"kills": kills, "half_written": half_written, "steps": reached + 1}) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
