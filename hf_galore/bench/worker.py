"""Does one job of a bench, in a process that has the card's memory to itself: `python -m hf_galore.bench.worker`.

Weights and tokens are random, which makes no difference to memory or time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import logging
import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import datasets
import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback

from ..errors import UserError
from ..integrations.random_weights import random_weights
from ..integrations.trainer import optim_name, unregister
from ..recipes.checks import galore_config
from ..recipes.errors import reporting_complaints
from ..recipes.planning import plan_recipe
from ..recipes.stand_in import prepare, shape_of
from ..recipes.weight_bits import weight_bits_of
from . import machine
from .jobs import (
    OUT_OF_MEMORY,
    TRAINERS_OWN,
    WARM_UP,
    Failed,
    Job,
    Look,
    Measured,
    Planned,
)
from .recipe import parsed_recipe

_TRAINING = ("forward", "backward", "update")


def main(arguments: list[str]) -> int:
    """Read a job from a file and write what came of it to another."""
    job_file, result_file = map(Path, arguments)
    job = Job(**json.loads(job_file.read_text(encoding="utf-8")))
    result = result_of(job)
    written = {"kind": type(result).__name__, **dataclasses.asdict(result)}
    result_file.write_text(json.dumps(written), encoding="utf-8")
    return 0


def result_of(job: Job) -> Look | Planned | Measured | Failed:
    """Do a job; running out of memory and mistakes of whoever gave it are results, too."""
    try:
        with tempfile.TemporaryDirectory() as folder, reporting_complaints():
            if job.task == "look":
                return look(job, Path(folder))
            if job.task == "plan":
                return planned(job, Path(folder))
            return measured(job, Path(folder))
    except UserError as error:
        return Failed(str(error), mistake=True)
    except (RuntimeError, MemoryError) as error:
        if not _is_about_memory(error):
            raise
        return Failed(OUT_OF_MEMORY, " ".join(str(error).split()))


def _is_about_memory(error: Exception) -> bool:
    """Whether memory has run out: torch's, or that of a library beside it, whose handles need some too."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return any(words in str(error) for words in ("out of memory", "ALLOC_FAILED"))


def _device(job: Job) -> torch.device:
    return torch.device("cpu" if job.small else "cuda")


# ---- the jobs


def look(job: Job, folder: Path) -> Look:
    """Look at the machine and at the recipe; makes nothing on the card but CUDA's context, for as long as it looks."""
    parsed = parsed_recipe(job, folder)
    training, config = parsed.training, galore_config(parsed.training)
    assert config is not None
    shape = shape_of(parsed)
    has_card = torch.cuda.is_available() and not job.small
    free, total = torch.cuda.mem_get_info() if has_card else (None, None)
    if has_card:
        total = torch.cuda.get_device_properties(0).total_memory
    driver, power = machine.driver() if has_card else (None, None)
    return Look(
        device="cuda" if has_card else "cpu" if job.small else None,
        card=torch.cuda.get_device_name() if has_card else f"CPU, {platform.machine()}",
        memory_bytes=total,
        free_bytes=free,
        driver=driver,
        power_limit=power,
        versions=machine.versions(cuda=has_card),
        allocator=os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF"),
        model="a tiny Llama" if job.small else str(parsed.model_name),
        recipe=parsed.recipe.name if parsed.recipe else "the command line",
        optim=optim_name(training),
        rank=config.rank,
        layers=shape.layers,
        rows=training.per_device_train_batch_size,
        max_length=training.max_length or 0,
        micro_batches=training.gradient_accumulation_steps,
        clips=training.max_grad_norm > 0,
        galore_torch=machine.version_of("galore-torch") if importlib.util.find_spec("galore_torch") else None,
        weight_bits=weight_bits_of(parsed.model),
    )


def planned(job: Job, folder: Path) -> Planned:
    """Plan a run's memory, with fake tensors."""
    found = plan_recipe(parsed_recipe(job, folder), layers=job.layers)
    peak = max(found.phase_peaks[phase] for phase in _TRAINING if phase in found.phase_peaks)
    return Planned(peak, found.needed_bytes)


def measured(job: Job, folder: Path) -> Measured:
    """Train for some steps, and return what the card had to give."""
    on_card = not job.small
    device = _device(job)
    if on_card and job.limit_bytes is not None:
        _limit_memory(job.limit_bytes)
    parsed = parsed_recipe(job, folder)
    steps = WARM_UP + job.steps
    warnings, watch = _Warnings(), StepWatch(on_card)
    logging.getLogger("hf_galore").addHandler(warnings)
    ready = prepare(parsed, job.layers)
    with random_weights(device):
        trainer = ready.make_trainer()
    trainer.train_dataset = _random_rows(trainer, steps, parsed.training.max_length)
    trainer.add_callback(watch)
    with contextlib.ExitStack() as stack:
        if job.contender == TRAINERS_OWN:
            unregister()  # the name means transformers' own from here on
            if not job.svd:
                stack.enter_context(_no_svd())
            if not on_card:  # it waits for a card by name
                stack.enter_context(mock.patch.object(torch.cuda, "synchronize", return_value=None))
        if on_card:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        trainer.train()
    return _figures(trainer, watch, ready.tokens_per_step, warnings.messages, on_card)


def _limit_memory(limit_bytes: int) -> None:
    """Let torch reserve so much, and run out of memory above it."""
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, limit_bytes / total))


def _figures(trainer: Trainer, watch: StepWatch, tokens: int, warnings: list[str], on_card: bool) -> Measured:
    logs = trainer.state.log_history
    refreshes = [entry["galore/refreshes"] for entry in logs if "galore/refreshes" in entry]
    seconds = {entry["step"]: entry["galore/refresh_seconds"] for entry in logs if "galore/refresh_seconds" in entry}
    found = Measured(
        seconds=watch.seconds,
        tokens_per_step=tokens,
        parameters=sum(param.numel() for param in trainer.model.parameters()),
        losses=[entry["loss"] for entry in logs if "loss" in entry],
        first_refreshes=seconds.pop(1, None),
        refreshes=int(refreshes[-1] - refreshes[0]) if refreshes else None,
        refresh_seconds=sum(seconds.values()) if refreshes else None,
        warnings=warnings,
    )
    if not on_card:
        return found
    free, total = torch.cuda.mem_get_info()
    return dataclasses.replace(
        found,
        allocated=torch.cuda.max_memory_allocated(),
        reserved=torch.cuda.max_memory_reserved(),
        resident=torch.cuda.memory_allocated(),
        outside_torch=total - free - torch.cuda.memory_reserved(),
    )


class StepWatch(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """The seconds of each step, until the device has done it all."""

    def __init__(self, on_card: bool) -> None:
        self.seconds: list[float] = []
        self._on_card = on_card
        self._start = 0.0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """The data are there, and nothing else of the step."""
        self._start = self._now()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Weights have moved, gradients are gone."""
        self.seconds.append(self._now() - self._start)

    def _now(self) -> float:
        if self._on_card:
            torch.cuda.synchronize()
        return time.perf_counter()


class _Warnings(logging.Handler):
    """What the library warned of: plain torch in place of a kernel explains a time."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def _random_rows(trainer: Trainer, steps: int, length: int) -> datasets.Dataset:
    """As many rows as the steps take, like the trainer's own but of random tokens: equal ones make gradients of rank 1,
    whose bases are other work."""
    count = steps * trainer.args.per_device_train_batch_size * trainer.args.gradient_accumulation_steps
    vocabulary = trainer.model.config.get_text_config().vocab_size
    ids = torch.randint(vocabulary, (count, length), generator=torch.Generator().manual_seed(0)).tolist()
    columns = {**{key: [value] * count for key, value in trainer.train_dataset[0].items()}, "input_ids": ids}
    return datasets.Dataset.from_dict({**columns, "labels": ids})


@contextlib.contextmanager
def _no_svd() -> Iterator[None]:
    """Within, random matrices take the place of SVDs, which take minutes: a step takes as long with them."""

    def svd(matrix: Tensor, full_matrices: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        (m, n), size = matrix.shape, min(matrix.shape)
        left, right = (torch.randn(*shape, device=matrix.device) * size**-0.5 for shape in ((m, size), (size, n)))
        return left, torch.ones(size, device=matrix.device), right

    with mock.patch.object(torch.linalg, "svd", svd):
        yield


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
