"""The line on how a training goes: what it says, that it fits, and that it waits for nothing."""

from __future__ import annotations

import contextlib
import io
import logging
import math
import os
import pty
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PrinterCallback, ProgressCallback, TrainerControl, TrainerState

from hf_galore.cli import progress
from hf_galore.cli.progress import ProgressLine, duration, number
from hf_galore.recipes.embedded_model import Embedded
from hf_galore.recipes.training import with_callbacks
from tests.support.commands import command_line, options, recorded_trainer, short_run
from tests.support.releases import needs_newest

LOG = {"loss": 1.934, "tokens_per_second": 3120.0, "peak_memory_gib": 21.94}


class Seconds:
    """A clock that goes as it is told."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def console(width: int = 80, *, terminal: bool) -> Console:
    return Console(file=io.StringIO(), width=width, force_terminal=terminal, color_system=None, highlight=False)


def text_of(shown: Console) -> str:
    assert isinstance(shown.file, io.StringIO)
    return shown.file.getvalue()


@pytest.fixture(autouse=True)
def _no_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*progress._NOTEBOOKS, "TERM"):
        monkeypatch.delenv(name, raising=False)


class Run:
    """A Trainer's calls of a callback, without a Trainer."""

    def __init__(self, line: ProgressLine, clock: Seconds, steps: int = 784, **settings: Any) -> None:
        self.line, self.clock = line, clock
        self.args: Any = SimpleNamespace(disable_tqdm=settings.pop("disable_tqdm", False))
        self.state = TrainerState(max_steps=steps, **{"is_world_process_zero": True, **settings})
        self.control = TrainerControl()

    def tell(self, event: str, **more: Any) -> None:
        getattr(self.line, f"on_{event}")(self.args, self.state, self.control, **more)

    def step(self, to: int, seconds: float = 2.0) -> None:
        self.clock.now += seconds * (to - self.state.global_step)
        self.state.global_step = to
        self.tell("step_end")


@contextlib.contextmanager
def begun(shown: Console, *metrics: str, **settings: Any) -> Iterator[Run]:
    clock = Seconds()
    with contextlib.closing(ProgressLine(metrics, shown, clock)) as line:
        run = Run(line, clock, **settings)
        run.tell("train_begin")
        yield run


def last_line(run: Run, width: int = 80) -> str:
    """What a terminal shows now."""
    shown = Console(file=io.StringIO(), width=width, force_terminal=True, color_system="standard")
    shown.print(run.line)
    return re.sub(r"\x1b\[[0-9;]*m", "", text_of(shown)).rstrip("\n")


# ---- in a pipe


def test_each_log_is_a_short_line_where_there_is_no_terminal() -> None:
    shown = console(terminal=False)
    with begun(shown) as run:
        run.step(1, seconds=60)  # the first, which makes all bases, does not count
        run.step(119)
        run.tell("log", logs={"eval_loss": 2.1, "eval_runtime": 3.0})
        run.step(120)
        run.tell("log", logs=LOG)
        run.tell("log", logs={"train_runtime": 1.0, "train_loss": 2.0})
        run.step(784)
        run.tell("log", logs={"loss": math.nan})
        run.tell("train_end")
    assert text_of(shown).splitlines() == [
        "step 119/784 · held-out 2.10",
        "step 120/784 · loss 1.93 · held-out 2.10 · 3.1k tokens/s · 21.9 GiB · 22 min left",
        "step 784/784 · loss NaN · held-out 2.10",
    ]


def test_a_narrow_pipe_breaks_no_line() -> None:
    shown = console(20, terminal=False)
    with begun(shown) as run:
        run.step(120)
        run.tell("log", logs=LOG)
    assert text_of(shown) == "step 120/784 · loss 1.93 · 3.1k tokens/s · 21.9 GiB\n"


def test_other_processes_than_the_first_say_nothing() -> None:
    for terminal in (False, True):
        shown = console(terminal=terminal)
        with begun(shown, is_world_process_zero=False) as run:
            run.step(120)
            run.tell("log", logs=LOG)
        assert text_of(shown) == ""


def test_a_task_is_told_by_its_metric() -> None:
    shown = console(terminal=False)
    with begun(shown, "matthews_correlation", "accuracy") as run:
        run.tell("log", logs={"eval_loss": 1.0, "eval_accuracy": 0.9})
        run.tell("log", logs={"eval_loss": 1.0, "eval_accuracy": 0.9, "eval_matthews_correlation": 0.6})
    assert text_of(shown).splitlines() == [
        "step 0/784 · held-out accuracy 0.900",
        "step 0/784 · held-out matthews 0.600",
    ]


@pytest.mark.parametrize(
    ("terminal", "tqdm", "environment"),
    [(True, False, {"JPY_PARENT_PID": "7"}), (True, True, {}), (False, False, {}), (True, False, {"TERM": "dumb"})],
)
def test_a_line_that_is_written_over_is_for_terminals(
    terminal: bool, tqdm: bool, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    shown = console(terminal=terminal)
    with begun(shown, disable_tqdm=tqdm) as run:
        run.step(120)
        run.tell("log", logs=LOG)
    assert text_of(shown).splitlines() == ["step 120/784 · loss 1.93 · 3.1k tokens/s · 21.9 GiB"]


# ---- at a terminal


def test_the_line_of_a_terminal_has_all_in_80_columns() -> None:
    with begun(console(terminal=True)) as run:
        run.step(1)
        run.step(120)
        run.tell("log", logs={**LOG, "eval_loss": 2.1})
        assert last_line(run) == "120/784 ━╺━━━━━  loss 1.93  held-out 2.10  3.1k tokens/s  21.9 GiB  22 min left"


@pytest.mark.parametrize("width", [40, 60, 79, 80, 100, 200])
@pytest.mark.parametrize("steps", [9, 784, 100_000])
def test_nothing_is_cut_off_and_nothing_wraps(width: int, steps: int) -> None:
    with begun(console(terminal=True), steps=steps) as run:
        run.step(1)
        run.step(steps - 3)
        run.tell("log", logs={**LOG, "eval_loss": 2.1})
        line = last_line(run, width)
    step, *parts = line.split("  ")
    every = ["loss 1.93", "held-out 2.10", "3.1k tokens/s", "21.9 GiB", "6 s left"]
    assert re.fullmatch(rf"{steps - 3}/{steps} [━╸╺]{{4,30}}", step)
    assert [part for part in every if part in parts] == parts
    assert parts[-1:] == ["6 s left"]
    assert "\n" not in line
    assert len(line) < width
    assert parts == every or width < 80


def test_what_stands_still_says_why() -> None:
    with begun(console(terminal=True)) as run:
        run.step(1)
        run.control.should_evaluate = run.control.should_save = True
        run.step(2)
        run.tell("prediction_step")
        assert last_line(run).endswith("evaluating")
        run.tell("evaluate")
        assert last_line(run).endswith("saving")
        run.tell("save")
        assert last_line(run).endswith(" left")


def test_a_resumed_run_counts_its_own_steps() -> None:
    with begun(console(terminal=True), global_step=700) as run:
        run.step(701, seconds=50)
        assert "left" not in last_line(run)
        run.step(744, seconds=1)
        assert last_line(run).endswith("40 s left")


def test_without_colours_nothing_moves() -> None:
    with begun(console(terminal=True), steps=10) as run:
        run.step(5)
        run.tell("log", logs={"loss": 1.0})
        shown = console(terminal=True)
        shown.print(run.line)
    assert text_of(shown) == f"5/10 {'━' * 15}{' ' * 15}  loss 1.00"


class Terminal(io.StringIO):
    """A stream that says that it is one."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("fails", [False, True])
def test_what_is_logged_comes_above_the_line_and_all_is_left_as_it_was(
    fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    stderr, shown = Terminal(), Console(file=Terminal(), force_terminal=True, width=80, color_system=None)
    monkeypatch.setattr(sys, "stderr", stderr)
    logger = logging.getLogger("tests.of_a_library")
    logger.propagate = False
    handler = logging.StreamHandler(stderr)
    logger.addHandler(handler)
    try:
        with contextlib.suppress(KeyboardInterrupt), begun(shown) as run:
            run.step(3)
            logger.warning("A warning.")
            if fails:
                raise KeyboardInterrupt
            run.tell("train_end")
        logger.warning("Another.")
    finally:
        logger.removeHandler(handler)
    assert sys.stderr is stderr
    assert stderr.getvalue() == "Another.\n"
    said = text_of(shown)
    assert said.count("\x1b[?25l") == said.count("\x1b[?25h") == 1  # the cursor
    assert re.search(r"A warning\. *\n3/784 ", said)


# ---- of a Trainer


def test_it_takes_the_place_of_the_trainers_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for disable in (True, False):
        shown = console(terminal=False)
        trainer = recorded_trainer(tmp_path, "galore_adamw", max_steps=2, disable_tqdm=disable)
        trainer.record("", None, "", "")
        with_callbacks(trainer, [ProgressLine(console=shown)])
        kinds = [type(callback) for callback in trainer.callback_handler.callbacks]
        assert not {PrinterCallback, ProgressCallback} & set(kinds)
        trainer.train()
        first, second = text_of(shown).splitlines()
        assert re.fullmatch(r"step 1/2 · loss \d\.\d\d · \d\.\d GiB", first)
        assert second.startswith("step 2/2 · loss ")
        assert "loss" not in capsys.readouterr().out


class NoTorch(TorchDispatchMode):
    """Within, nothing is asked of a tensor: on a GPU that would wait for all that has been launched."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        pytest.fail(f"{func} was called")


def test_it_asks_nothing_of_any_tensor(tmp_path: Path) -> None:
    """Each of a Trainer's events, with a terminal that is drawn each time."""
    shown = console(terminal=True)
    line = ProgressLine(console=shown)
    told = []

    def guarded(event: str, method: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> None:
            told.append(event)
            with NoTorch():
                method(*args, **kwargs)
                shown.print(line)

        return call

    for event in [name for name in vars(ProgressLine) if name.startswith("on_")]:
        setattr(line, event, guarded(event, getattr(line, event)))
    given = {"max_steps": 2, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    trainer = recorded_trainer(tmp_path, "galore_adamw", disable_tqdm=False, **given)
    trainer.record("", None, "", "")
    with_callbacks(trainer, [line])
    trainer.train()
    assert set(told) == {name for name in vars(ProgressLine) if name.startswith("on_")}
    assert "2/2 " in text_of(shown)


@needs_newest
@pytest.mark.skipif(not hasattr(os, "openpty"), reason="no pseudo-terminals here")
def test_a_run_at_a_terminal(small: Embedded, tmp_path: Path) -> None:
    """In 80 columns: the model's line, one line that stays, and where the model is."""
    given = {**short_run(small.model, small.data, tmp_path / "out"), "save_strategy": "no"}
    del given["disable_tqdm"]
    ours, theirs = pty.openpty()
    environment = {**os.environ, "COLUMNS": "80", "TERM": "xterm", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command_line("sft", *options(given)), stdout=theirs, stderr=theirs, stdin=theirs, env=environment
    ) as process:
        os.close(theirs)
        said = read_all(ours)
    assert process.returncode == 0
    lines = [re.split(r"\r\x1b\[2K", line)[-1] for line in said.replace("\r\n", "\n").split("\n")]
    lines = [re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", line) for line in lines]
    assert [re.sub(r"\d+(\.\d+)?(k|K|M)?", "#", line) for line in lines if line] == [
        "GaLore projects # matrices (# parameters, # %) at rank #; full-rank: embeddings # %, output head # %, norms "
        "and biases # %.",
        "#/# ━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━  loss #  # tokens/s  # GiB",
        f"The model is in {re.sub(r'[0-9]+', '#', str(tmp_path / 'out'))}.",
    ]


def read_all(descriptor: int) -> str:
    found = b""
    with contextlib.suppress(OSError):  # which is how a closed terminal ends
        while part := os.read(descriptor, 65536):
            found += part
    os.close(descriptor)
    return found.decode()


# ---- numbers


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (1.934, "1.93"),
        (12.3456, "12.35"),
        (0.05, "0.05"),
        (0.00123, "0.00123"),
        (0.0, "0.00"),
        (math.nan, "NaN"),
        (math.inf, "inf"),
        (torch.tensor(2.5), "2.50"),
    ],
)
def test_a_loss_in_few_digits(value: Any, shown: str) -> None:
    assert number(value) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"), [(3, "3 s"), (89, "89 s"), (720, "12 min"), (3 * 3600 + 1500, "3.4 h"), (200_000, "2.3 days")]
)
def test_a_time_in_one_unit(seconds: float, shown: str) -> None:
    assert duration(seconds) == shown
