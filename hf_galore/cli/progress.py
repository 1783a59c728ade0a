"""One line on how a training goes: step, losses, tokens a second, memory, time left.

At a terminal it stays where it is, with a bar; elsewhere, and with `disable_tqdm`, each log is a line of its own.
"""

from __future__ import annotations

import logging
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.text import Text
from transformers import (
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

SHORTEST_BAR, LONGEST_BAR = 4, 30
_NOTEBOOKS = ("JPY_PARENT_PID", "COLAB_RELEASE_TAG", "KAGGLE_KERNEL_RUN_TYPE")


def is_live(console: Console) -> bool:
    """Whether a line may be written over: not in a notebook's cell, which `!command` makes look like a terminal."""
    return console.is_terminal and not console.is_dumb_terminal and not any(name in os.environ for name in _NOTEBOOKS)


class ProgressLine(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Shows one line on how a training goes, in the main process.

    All that it shows is in the Trainer's log or counted on the host: it never waits for the device.

    Args:
        metrics: what an evaluation's result is shown by, as its log has it without `eval_`: the first that is there.
        console: where it is shown; stdout by default.
        clock: seconds, as of `time.monotonic`.
    """

    replaces = (ProgressCallback, PrinterCallback)
    """The Trainer's own, which it is there in place of."""

    def __init__(
        self,
        metrics: Sequence[str] = (),
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._metrics = (*metrics, "loss")
        self._console = console or Console(highlight=False)
        self._clock = clock
        self._live: Live | None = None
        self._step = self._steps = 0
        self._loss = self._held_out = self._speed = self._memory = self._doing = ""
        self._pace: _Pace | None = None
        self._handlers: list[logging.StreamHandler[Any]] = []
        self._stderr: Any = None

    # ---- what the Trainer tells

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin the line."""
        self._step, self._steps = state.global_step, state.max_steps
        self._pace = _Pace(self._clock)
        if state.is_world_process_zero and is_live(self._console) and not args.disable_tqdm:
            self._begin_live()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Count the step, and say what comes next: the steps stand still meanwhile."""
        self._step = state.global_step
        self._doing = "saving" if control.should_save and not control.should_evaluate else ""
        if self._pace is not None:
            self._pace.count(self._step)

    def on_prediction_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        eval_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        """Say that an evaluation goes on."""
        self._doing = "evaluating"

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Say no longer that one goes on."""
        self._doing = "saving" if control.should_save else ""

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Say no longer that a checkpoint is written."""
        self._doing = ""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Take what was logged; where the line does not stay, print it."""
        logs = logs or {}
        held_out = self._take(logs)
        if self._live is not None or not state.is_world_process_zero:
            return
        parts = self._parts() if "loss" in logs else (held_out,)
        if any(parts):
            step = f"step {self._step}/{self._steps}"
            self._console.print(Text(" · ".join(filter(None, (step, *parts)))), soft_wrap=True)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """End the line."""
        self.close()

    def close(self) -> None:
        """Leave the terminal as it was, also where the training has failed."""
        if self._live is None:
            return
        for handler in self._handlers:
            handler.setStream(self._stderr)
        self._live.stop()
        self._live = None

    def _begin_live(self) -> None:
        """Show the line, and let what is logged meanwhile come above it."""
        self._stderr = sys.stderr
        self._live = Live(
            self,
            console=self._console,
            refresh_per_second=4,
            redirect_stdout=sys.stdout.isatty(),
            redirect_stderr=sys.stderr.isatty(),
        )
        self._live.start()
        self._handlers = _handlers_on(self._stderr)
        for handler in self._handlers:
            handler.setStream(sys.stderr)

    # ---- what is shown

    def _take(self, logs: Mapping[str, Any]) -> str:
        """Keep what is to be shown of a log, and return an evaluation's result in words, if it has one."""
        if "loss" in logs:
            self._loss = f"loss {number(logs['loss'])}"
            self._speed = f"{_count(logs['tokens_per_second'])} tokens/s" if "tokens_per_second" in logs else ""
            self._memory = f"{logs['peak_memory_gib']:.1f} GiB" if "peak_memory_gib" in logs else ""
        metric = next((metric for metric in self._metrics if f"eval_{metric}" in logs), None)
        if metric is None:
            return ""
        value = float(logs[f"eval_{metric}"])
        if metric == "loss":
            self._held_out = f"held-out {number(value)}"
        else:
            name = metric.partition("_")[0].rpartition("/")[2]  # mcc, accuracies
            self._held_out = f"held-out {name} {value:.3f}"
        return self._held_out

    def _left(self) -> str:
        seconds = None if self._pace is None else self._pace.left(self._steps)
        return "" if seconds is None else f"{duration(seconds)} left"

    def _parts(self) -> tuple[str, str, str, str, str]:
        """What is shown behind the step; what is not known is empty."""
        return self._loss, self._held_out, self._speed, self._memory, self._doing or self._left()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The line for a terminal: what it has no room for is left out, the memory first, and nothing is cut off."""
        step = f"{self._step}/{self._steps}"
        room = options.max_width - len(step) - 2  # some terminals wrap where the last column is used
        loss, held_out, speed, memory, rest = self._parts()
        text = ""
        for kept in (
            (loss, held_out, speed, memory, rest),
            (loss, held_out, speed, rest),
            (loss, held_out, rest),
            (loss, rest),
            (loss,),
        ):
            text = "  ".join(filter(None, kept))
            if len(text) + 2 + SHORTEST_BAR <= room:
                break
        room -= len(text) + 2
        line = Text(f"{step} ", no_wrap=True, overflow="crop", end="")
        if room >= SHORTEST_BAR:
            width = min(room, LONGEST_BAR)
            bar = ProgressBar(max(self._steps, 1), self._step, width, finished_style="bar.complete")
            for segment in console.render(bar, options):
                line.append(segment.text, segment.style)
            line.pad_right(len(step) + 1 + width + 2 - len(line))  # without colours the rest of a bar is not drawn
        line.append(text)
        yield line


def _handlers_on(stream: Any) -> list[logging.StreamHandler[Any]]:
    """The handlers of all loggers that write to a stream, which they have taken when they were made."""
    loggers = [logging.getLogger(), *logging.root.manager.loggerDict.values()]
    found = {id(handler): handler for logger in loggers for handler in getattr(logger, "handlers", ())}
    return [
        handler for handler in found.values() if isinstance(handler, logging.StreamHandler) and handler.stream is stream
    ]


class _Pace:
    """How fast steps go, evaluations and checkpoints with them; without the first, which makes all bases."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._first: tuple[int, float] | None = None
        self._last: tuple[int, float] | None = None

    def count(self, step: int) -> None:
        """Count a step that has ended."""
        self._last = (step, self._clock())
        self._first = self._first or self._last

    def left(self, steps: int) -> float | None:
        """The seconds that the steps to come take; `None` where there are none, or nothing is known yet."""
        if self._first is None or self._last is None or self._last[0] in (self._first[0], steps):
            return None
        (first, since), (last, until) = self._first, self._last
        return (steps - last) * (until - since) / (last - first)


def number(value: Any) -> str:
    """A loss or score in few digits: `1.93`, `0.0312`, `NaN`."""
    value = float(value)
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else str(value)
    return f"{value:.2f}" if abs(value) >= 0.1 or value == 0 else f"{value:.3g}"


def _count(value: float) -> str:
    """A count in three digits: `930`, `3.1k`, `120k`."""
    if value < 999.5:
        return f"{value:.0f}"
    return f"{value / 1000:.1f}k" if value < 99_950 else f"{value / 1000:.0f}k"


def duration(seconds: float) -> str:
    """A time in one unit: `45 s`, `12 min`, `3.4 h`, `2.1 days`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"
