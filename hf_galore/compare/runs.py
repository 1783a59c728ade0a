"""Runs as plain data: what a Trainer logged, and what a run of ours wrote down beside it."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from ..config import GaLoreConfig
from ..integrations.trainer import KINDS
from ..recipes.run_record import RunFacts

MIB = 2**20

TRAINING_LOSS, HELD_OUT_LOSS = "loss", "eval_loss"
STEP_SECONDS, TOKENS_PER_SECOND, PEAK_MEMORY = "step_seconds", "tokens_per_second", "peak_memory_gib"
# What an evaluation logs of itself and not of the model.
_NO_METRICS = ("runtime", "samples_per_second", "steps_per_second", "num_tokens", "model_preparation_time")
_RESUMED = 1.01  # times of steps add up to that much more than the training took: they are of several parts

Series = list[tuple[int, float]]


@dataclasses.dataclass(frozen=True)
class Run:
    """One training, finished or not, as its folder tells it."""

    name: str
    folder: Path
    facts: RunFacts | None
    """`None` where another program made the run."""
    log: tuple[Mapping[str, float], ...]
    """The numbers of the Trainer's `log_history`; each entry has a `step`."""
    step: int
    """Steps done."""
    max_steps: int
    finished: bool
    adapter: Mapping[str, Any]
    """peft's settings where the folder has them; else empty."""
    config: Mapping[str, Any]
    """The model's settings where the folder has them; else empty."""

    @property
    def runs(self) -> tuple[Run, ...]:
        """The run itself: what is compared is a run, or several that differ in their seed."""
        return (self,)

    def series(self, key: str) -> Series:
        """The values that were logged as `key`: pairs of step and value, in the order of the steps."""
        return sorted(((int(entry["step"]), entry[key]) for entry in self.log if key in entry), key=lambda at: at[0])

    def last(self, key: str) -> float | None:
        """The latest value of `key`."""
        series = self.series(key)
        return series[-1][1] if series else None

    @cached_property
    def broken(self) -> tuple[str, int] | None:
        """The first of what was logged that is NaN, or a loss that is infinite, and its step; `None` for a sound run.

        NaN is looked for in everything, and not in the losses alone: where a Trainer filters those, as transformers'
        does by default, a loss of NaN is logged as 0, and the norm of the gradient says it.
        """
        keys = dict.fromkeys(key for entry in self.log for key in entry)
        found = [(step, key) for key in keys if (step := first_nan(self.series(key))) is not None]
        for key in (TRAINING_LOSS, HELD_OUT_LOSS):
            infinite = first_not_finite(self.series(key))
            found += [] if infinite is None else [(infinite, key)]
        if not found:
            return None
        step, key = min(found, key=lambda one: (one[0], one[1] != TRAINING_LOSS))
        return key, step

    # ---- settings

    @cached_property
    def method(self) -> str | None:
        """What was trained and how: `GaLore r=64, 8-bit, layerwise`, `LoRA r=16`, `AdamW`."""
        rank = self.facts.lora_rank if self.facts else self.adapter.get("r")
        adapters = None if rank is None else f"LoRA r={rank}"
        optimizer = self._optimizer()
        if adapters and optimizer and optimizer != "AdamW":
            return f"{adapters}, {optimizer}"
        return adapters or optimizer

    def _optimizer(self) -> str | None:
        if self.facts is not None:
            return optimizer_words(self.facts.optim, self.facts.optim_args)
        # The callback of a GaLore optimizer logs that much wherever it trains.
        return "GaLore" if any(key.startswith("galore/") for entry in self.log for key in entry) else None

    @cached_property
    def model(self) -> str | None:
        """The model's name or folder; where that is not known, its class."""
        if self.facts is not None:
            return self.facts.model
        name = self.adapter.get("base_model_name_or_path") or self.config.get("_name_or_path")
        classes = self.config.get("architectures") or [None]
        return None if name is None and classes[0] is None else str(name or classes[0])

    @cached_property
    def learning_rate(self) -> float | None:
        """The learning rate that was set; of a run of another program the highest that was logged."""
        if self.facts is not None:
            return self.facts.learning_rate
        return max(_finite(value for _, value in self.series("learning_rate")), default=None)

    # ---- results

    @cached_property
    def training_loss(self) -> float | None:
        """The mean of what was logged over the last tenth of the steps."""
        series = self.series(TRAINING_LOSS)
        return statistics.fmean(v for step, v in series if step >= 0.9 * series[-1][0]) if series else None

    @cached_property
    def metrics(self) -> dict[str, float]:
        """The last value of each `eval_*` but the loss."""
        keys = {key for entry in self.log for key in entry if key.startswith("eval_") and key != HELD_OUT_LOSS}
        found = {key: self.last(key) for key in sorted(keys) if not key.endswith(_NO_METRICS)}
        return {key: value for key, value in found.items() if value is not None}

    @cached_property
    def step_seconds(self) -> float | None:
        """The median time of a step, without evaluations and checkpoints; see `times_whole_training`."""
        logged = _finite(value for _, value in self.series(STEP_SECONDS))
        if logged:
            return statistics.median(logged)
        runtime = self.last("train_runtime")
        return runtime / self.step if runtime and self.step else None

    @cached_property
    def tokens_per_second(self) -> float | None:
        """The median of the tokens per second, without evaluations and checkpoints; see `times_whole_training`."""
        logged = _finite(value for _, value in self.series(TOKENS_PER_SECOND))
        if logged:
            return statistics.median(logged)
        runtime, tokens = self.last("train_runtime"), self.last("num_tokens")
        return tokens / runtime if runtime and tokens else None

    @property
    def times_whole_training(self) -> bool:
        """Whether steps were not timed on their own: then their time is a share of all of it."""
        return not self.series(STEP_SECONDS)

    @cached_property
    def training_seconds(self) -> float | None:
        """The training's time, with evaluations and checkpoints.

        `None` where it is not known: also of a run that was resumed, of which the Trainer times the last part.
        """
        runtime, steps = self.last("train_runtime"), self.seconds_in_steps
        return None if runtime is None or (steps or 0) > _RESUMED * runtime else runtime

    @cached_property
    def seconds_in_steps(self) -> float | None:
        """The time of all steps, without evaluations and checkpoints."""
        before, total = 0, 0.0
        for step, seconds in self.series(STEP_SECONDS):
            total += (step - before) * seconds
            before = step
        return total / before * self.step if before else None  # the last steps may not have been logged

    @cached_property
    def peak_memory_gib(self) -> float | None:
        """The peak of the memory over the whole run, in GiB."""
        return max(_finite(value for _, value in self.series(PEAK_MEMORY)), default=None)

    @cached_property
    def optimizer_bytes(self) -> int | None:
        """The bytes of the optimizer's state.

        Of an unfinished run, and one of another program, what GaLore's callback logged, if it did.
        """
        if self.facts is not None and self.facts.optimizer_bytes is not None:
            return self.facts.optimizer_bytes
        moments, bases = self.last("galore/moment_mib"), self.last("galore/basis_mib")
        return None if moments is None or bases is None else round((moments + bases) * MIB)


def optimizer_words(optim: str, optim_args: str | None) -> str:
    """`GaLore r=64, 8-bit, layerwise`, `AdamW, 8-bit` and the like; a name that is neither stays as it is."""
    kind = KINDS.get(optim)
    if kind is not None:
        algorithm = "GaLore Adafactor" if "adafactor" in optim else "GaLore"
        try:
            words = [f"{algorithm} r={GaLoreConfig.from_optim_args(optim_args).rank}"]
        except ValueError:  # of a version that had other options
            words = [algorithm]
    elif "adamw" in optim and optim.startswith(("adamw_", "paged_adamw")):
        words = ["AdamW"]
    else:
        return optim
    words += [word for sign, word in (("8bit", "8-bit"), ("4bit", "4-bit"), ("paged", "paged")) if sign in optim]
    return ", ".join([*words, "layerwise"] if kind is not None and kind.layerwise else words)


def shared_metrics(runs: Iterable[Run]) -> list[str]:
    """The `eval_*` that every run has which was evaluated, without the loss."""
    evaluated = [set(run.metrics) for run in runs if run.metrics or run.series(HELD_OUT_LOSS)]
    return sorted(set.intersection(*evaluated)) if evaluated else []


def is_finite(value: float | None) -> bool:
    """Whether there is a number that can be compared."""
    return value is not None and math.isfinite(value)


def first_not_finite(series: Series) -> int | None:
    """The step of the first value that is NaN or infinite."""
    return next((step for step, value in series if not math.isfinite(value)), None)


def first_nan(series: Series) -> int | None:
    """The step of the first value that is NaN."""
    return next((step for step, value in series if math.isnan(value)), None)


def _finite(values: Iterable[float]) -> list[float]:
    return [value for value in values if math.isfinite(value)]
