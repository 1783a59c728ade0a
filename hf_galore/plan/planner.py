"""Will it fit? The memory of a training run, found without a GPU, weights or data.

The real steps of a Trainer run with fake tensors:

    print(plan(lambda: SFTTrainer("meta-llama/Llama-2-7b-hf", args, train_dataset=data)))

Recipes are planned by `hf_galore.recipes.planning`, which makes their Trainers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import re
import time
from collections.abc import Callable, Iterator
from typing import Any, get_args

import datasets
import torch
import transformers
from transformers import Trainer

from ..log import logger
from .fakes import Target, fake_training
from .rehearsal import Progress, Record, rehearse

GIB = 2**30

# What a card has to have besides what tensors take. Neither has been measured by us: the first is what CUDA's context
# and the libraries' work spaces are commonly said to take on consumer cards, the second an allowance for blocks of the
# allocator that are free but in the wrong places, with PYTORCH_ALLOC_CONF=expandable_segments:True.
CONTEXT_BYTES = GIB // 2
FRAGMENTATION = 0.03


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """What a training run takes on its device. Sizes are in bytes, of tensors' storages in multiples of 512."""

    peak_bytes: int
    """The most that is alive at a time, in the steps, an evaluation and a checkpoint."""
    resident_bytes: int
    """What stays between two steps: weights, moments, bases."""
    breakdown: dict[str, int]
    """The peak by what it is made of, largest first."""
    phase: str
    """When the peak falls: forward, backward, update, evaluation, saving a checkpoint."""
    phase_peaks: dict[str, int]
    """The peak of each phase, highest first."""
    device: str
    """What the tensors stood for."""
    seconds: float
    """How long the plan took."""
    parameters: int
    """How many numbers the model has."""
    tokens_per_step: int | None = None
    """The largest number of tokens in an optimizer step, where it is known."""
    vram_bytes: int | None = None
    """The card's memory, where it is known."""
    notes: tuple[str, ...] = ()
    """What was assumed in place of something that was not there."""

    @property
    def needed_bytes(self) -> int:
        """The memory that a card needs for it: the peak, fragmentation of the allocator, CUDA's context."""
        return needed_bytes(self.peak_bytes)

    @property
    def fits(self) -> bool | None:
        """Whether it fits into the card's memory; `None` where that is not known."""
        return None if self.vram_bytes is None else self.needed_bytes <= self.vram_bytes

    def as_dict(self) -> dict[str, Any]:
        """The fields, `needed_bytes` and `fits`, for JSON."""
        return {**dataclasses.asdict(self), "needed_bytes": self.needed_bytes, "fits": self.fits}

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {in_gib(size)}" for name, size in self.breakdown.items() if size >= GIB / 100)
        line = f"peak {in_gib(self.peak_bytes)} ({self.phase}): {parts}; {in_gib(self.resident_bytes)} between steps"
        if self.vram_bytes is None:
            return f"{line}; needs a card of {in_gib(self.needed_bytes)}"
        verdict = "fits" if self.fits else "does not fit"
        return f"{line}; {verdict} into {in_gib(self.vram_bytes)}, needs {in_gib(self.needed_bytes)}"


def needed_bytes(peak_bytes: int) -> int:
    """The memory that a card needs for a peak: with fragmentation of the allocator and CUDA's context."""
    return int(peak_bytes * (1 + FRAGMENTATION)) + CONTEXT_BYTES


def in_gib(nbytes: int) -> str:
    """A size in GiB, to two places."""
    return f"{nbytes / GIB:.2f} GiB"


_UNITS = {"": GIB, "k": 2**10, "m": 2**20, "g": GIB, "t": 2**40}


def parse_size(text: str) -> int:
    """The bytes of `24GiB`, `24GB`, `24G` or `24`: all the same, since a card that is sold with 24 GB has 24 GiB.

    Raises:
        ValueError: it is no size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?", text.strip().lower())
    if match is None or float(match[1]) == 0:
        raise ValueError(f"A memory size reads 24GiB, 16GB or 22528MiB, but was given {text!r}.")
    return int(float(match[1]) * _UNITS[match[2]])


def plan(
    make_trainer: Callable[[], Trainer],
    *,
    vram: int | str | None = None,
    target: Target = "cuda",
    progress: Progress | None = None,
) -> MemoryPlan:
    """Find the memory of a training run, without a GPU, weights or data.

    While it runs, functions of torch, transformers and other libraries are replaced for the whole process: let no other
    thread use them.

    Args:
        make_trainer: makes the Trainer, which is of no use afterwards. It is called where tensors are fake: a model
            that it makes, with or without `from_pretrained`, has no weights.
        vram: the card's memory in bytes, or as text (`"24GiB"`); by default that of the GPU, if there is one.
        target: the device that the tensors stand for; `cpu` gives what the run takes on a CPU.
        progress: called with the phase and the number of the step.

    Raises:
        ValueError: something that was given is wrong; the message says what.
        TypeError: the function returns no Trainer.
    """
    if target not in get_args(Target):
        raise ValueError(f"target has to be one of {', '.join(get_args(Target))}, but is {target!r}.")
    vram = card_bytes() if vram is None else _bytes_of(vram)
    start = time.perf_counter()
    with quiet(), fake_training(target) as fakes:
        trainer = make_trainer()
        if not isinstance(trainer, Trainer):
            raise TypeError(f"The function has to return a Trainer, but returned a {type(trainer).__name__}.")
        record = rehearse(trainer, fakes, progress)
        device = str(trainer.args.device)
        parameters = sum(param.numel() for param in trainer.model.parameters())
    stood_for = target if device.startswith(target) else f"{target} (stood in for by {device} tensors)"
    return _summary(record, stood_for, time.perf_counter() - start, parameters, vram)


def _bytes_of(vram: Any) -> int:
    if isinstance(vram, str):
        return parse_size(vram)
    if not isinstance(vram, int) or vram < 2**20:
        raise ValueError(f"vram is a card's memory in bytes (24 * 2**30) or a text ('24GiB'), but was given {vram!r}.")
    return vram


def card_bytes() -> int | None:
    """The memory of this machine's GPU; `None` where there is none."""
    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None


def measure(make_trainer: Callable[[], Trainer], *, progress: Progress | None = None) -> MemoryPlan:
    """Find the figures of a plan by really training for three steps: to compare with it, where the model is small.

    Storages are counted as `plan` counts them; on a GPU, `torch.cuda.max_memory_allocated` also has what kernels use
    inside.

    Args:
        make_trainer: makes the Trainer, which is of no use afterwards.
        progress: called with the phase and the number of the step.
    """
    start = time.perf_counter()
    with quiet():
        trainer = make_trainer()
        parameters = sum(param.numel() for param in trainer.model.parameters())
        record = rehearse(trainer, None, progress)
    return _summary(record, str(trainer.args.device), time.perf_counter() - start, parameters, vram=None)


def _summary(record: Record, device: str, seconds: float, parameters: int, vram: int | None) -> MemoryPlan:
    peaks = record.tracker.peaks()
    return MemoryPlan(
        peak_bytes=peaks[0].nbytes,
        resident_bytes=record.resident_bytes,
        breakdown=record.tracker.breakdown(peaks[0].event),
        phase=peaks[0].phase,
        phase_peaks={peak.phase: peak.nbytes for peak in peaks},
        device=device,
        seconds=seconds,
        parameters=parameters,
        vram_bytes=vram,
    )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence reports of libraries on a training that does not happen, and our own warnings about its numbers."""
    level, verbosity = logger.level, transformers.utils.logging.get_verbosity()
    bars = datasets.are_progress_bars_disabled()
    logger.setLevel(logging.CRITICAL)
    transformers.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        logger.setLevel(level)
        transformers.utils.logging.set_verbosity(verbosity)
        if not bars:
            datasets.enable_progress_bars()
