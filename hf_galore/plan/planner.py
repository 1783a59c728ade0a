"""Will it fit? The memory of a training run, found without a GPU, weights or data.

The real steps of a Trainer run with fake tensors:

    print(plan(lambda: SFTTrainer("meta-llama/Llama-2-7b-hf", args, train_dataset=data)))

Recipes are planned by `hf_galore.recipes.planning`, which makes their Trainers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any, get_args

import transformers
from transformers import Trainer
from transformers.utils import is_datasets_available

from ..expandable_segments import in_use as expandable_in_use
from ..integrations.accelerate import unwrapped
from ..integrations.callback import galore_optimizer
from ..integrations.target_summary import grouped, projection_line
from ..log import silenced
from ..optim.groups import shape_in
from .cards import parse_size, present_card
from .fakes import Target, fake_training, forget_tables
from .needs import CONTEXT, OUTSIDE, OUTSIDE_BYTES, allocator_bytes
from .rehearsal import Progress, Record, rehearse

GIB = 2**30

Look = Callable[[Trainer, Record], None]
"""Called with the Trainer after its steps, while tensors are still fake, and with what they took."""


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
    expandable_bytes: int
    """The most that torch's allocator takes of a card with expandable segments, by a model of it."""
    segmented_bytes: int
    """The same without them."""
    expandable: bool = True
    """Which of both is this machine's: what commands set, where they work."""
    tokens_per_step: int | None = None
    """The largest number of tokens in an optimizer step, where it is known."""
    vram_bytes: int | None = None
    """The card's memory, where it is known."""
    free_bytes: int | None = None
    """What others leave of it, where it is this machine's."""
    notes: tuple[str, ...] = ()
    """What was assumed in place of something that was not there."""
    projection: str | None = None
    """How much of the model is projected, and of what kinds the rest is; `None` without GaLore."""

    @property
    def reserved_bytes(self) -> int:
        """What torch's allocator takes of the card: the peak, and what it has of blocks that are free."""
        return self.expandable_bytes if self.expandable else self.segmented_bytes

    @property
    def needed_bytes(self) -> int:
        """The memory that a card has to have for it: what torch's allocator takes, and what is outside of that."""
        return self.reserved_bytes + OUTSIDE_BYTES

    @property
    def fits(self) -> bool | None:
        """Whether it fits into the card's memory; `None` where that is not known."""
        return None if self.vram_bytes is None else self.needed_bytes <= self.vram_bytes

    @property
    def fits_now(self) -> bool | None:
        """Whether it fits into what is free of this machine's card; `None` where the card is another."""
        return None if self.free_bytes is None else self.needed_bytes <= self.free_bytes

    def as_dict(self) -> dict[str, Any]:
        """The fields, what a card needs and of what, and whether it fits, for JSON."""
        found = ("reserved_bytes", "needed_bytes", "fits", "fits_now")
        return {
            **dataclasses.asdict(self),
            **{name: getattr(self, name) for name in found},
            "outside_bytes": dict(OUTSIDE),
        }

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {in_gib(size)}" for name, size in self.breakdown.items() if size >= GIB / 100)
        line = f"peak {in_gib(self.peak_bytes)} ({self.phase}): {parts}; {in_gib(self.resident_bytes)} between steps"
        if self.vram_bytes is None:
            return f"{line}; needs a card of {in_gib(self.needed_bytes)}"
        verdict = "fits" if self.fits else "does not fit"
        verdict = f"{line}; {verdict} into {in_gib(self.vram_bytes)}, needs {in_gib(self.needed_bytes)}"
        if self.fits and self.fits_now is False and self.free_bytes is not None:
            return f"{verdict}, but only {in_gib(self.free_bytes)} are free"
        return verdict


def in_gib(nbytes: int) -> str:
    """A size in GiB, to two places."""
    return f"{nbytes / GIB:.2f} GiB"


def plan(
    make_trainer: Callable[[], Trainer],
    *,
    vram: int | str | None = None,
    target: Target = "cuda",
    progress: Progress | None = None,
    look: Look | None = None,
) -> MemoryPlan:
    """Find the memory of a training run, without a GPU, weights or data.

    While it runs, functions of torch, transformers and other libraries are replaced for the whole process: let no other
    thread use them.

    Args:
        make_trainer: makes the Trainer, which is of no use afterwards. It is called where tensors are fake: a model
            that it makes, with or without `from_pretrained`, has no weights.
        vram: the card: a name or label (`"4090"`, `"24GB"`), its memory as text (`"23.5GiB"`) or in bytes; by default
            this machine's, if there is one.
        target: the device that the tensors stand for; `cpu` gives what the run takes on a CPU.
        progress: called with the phase and the number of the step.
        look: called with the Trainer and what was recorded of it.

    Raises:
        ValueError: something that was given is wrong; the message says what.
        TypeError: the function returns no Trainer.
    """
    if target not in get_args(Target):
        raise ValueError(f"target has to be one of {', '.join(get_args(Target))}, but is {target!r}.")
    card = None if vram is not None else present_card(OUTSIDE[CONTEXT])
    total = _bytes_of(vram) if vram is not None else None if card is None else card.total
    start = time.perf_counter()
    with quiet(), fake_training(target) as fakes:
        trainer = make_trainer()
        if not isinstance(trainer, Trainer):
            raise TypeError(f"The function has to return a Trainer, but returned a {type(trainer).__name__}.")
        record = rehearse(trainer, fakes, progress)
        device = str(trainer.args.device)
        parameters = sum(param.numel() for param in trainer.model.parameters())
        projection, idle = _projection(trainer), _without_gradient(trainer)
        if look is not None:
            look(trainer, record)
    stood_for = target if device.startswith(target) else f"{target} (stood in for by {device} tensors)"
    found = _summary(record, stood_for, start, parameters)
    free = None if card is None else card.free
    return dataclasses.replace(found, vram_bytes=total, free_bytes=free, notes=idle, projection=projection)


def _projection(trainer: Trainer) -> str | None:
    """The line that a training begins with, from what its optimizer has."""
    optimizer = galore_optimizer(trainer.optimizer)
    if optimizer is None:
        return None
    targets = list(optimizer.targets())
    shapes = [shape_in(target.param, target.group) for target in targets]
    ranks = sorted({target.rank for target in targets})
    named = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
    return projection_line(trainer.model, (target.param for target in targets), shapes, named)


def _without_gradient(trainer: Trainer) -> tuple[str, ...]:
    """A note of parameters that no step has trained: of a loop over experts a plan does not know which have tokens."""
    state = unwrapped(trainer.optimizer).state
    idle = [name for name, param in trainer.model.named_parameters() if param.requires_grad and not state.get(param)]
    if not idle:
        return ()
    return (
        f"No step of the plan gave a gradient to {grouped(idle)}: without gradients, moments and activations of these "
        "the plan says too little, if a training does. Experts that are computed in a loop (experts_implementation="
        "'eager') cannot be planned: leave that out, or take 'grouped_mm'.",
    )


def _bytes_of(vram: Any) -> int:
    if isinstance(vram, str):
        return parse_size(vram)
    if not isinstance(vram, int) or vram < 2**20:
        raise ValueError(f"vram is a card's memory in bytes (24 * 2**30) or a text ('24GB'), but was given {vram!r}.")
    return vram


def measure(make_trainer: Callable[[], Trainer], *, progress: Progress | None = None) -> MemoryPlan:
    """Find the figures of a plan by really training for three steps: to compare with it, where the model is small.

    Storages are counted as `plan` counts them; on a GPU, `torch.cuda.max_memory_allocated` also has what kernels use
    inside.

    Args:
        make_trainer: makes the Trainer, which is of no use afterwards.
        progress: called with the phase and the number of the step.
    """
    start = time.perf_counter()
    forget_tables()  # those of an earlier training would not be seen
    with quiet():
        trainer = make_trainer()
        parameters = sum(param.numel() for param in trainer.model.parameters())
        record = rehearse(trainer, None, progress)
    return _summary(record, str(trainer.args.device), start, parameters)


def _summary(record: Record, device: str, start: float, parameters: int) -> MemoryPlan:
    peaks, events = record.tracker.peaks(), record.tracker.events()
    return MemoryPlan(
        peak_bytes=peaks[0].nbytes,
        resident_bytes=record.resident_bytes,
        breakdown=record.tracker.breakdown(peaks[0].event),
        phase=peaks[0].phase,
        phase_peaks={peak.phase: peak.nbytes for peak in peaks},
        device=device,
        parameters=parameters,
        expandable_bytes=allocator_bytes(events, expandable=True),
        segmented_bytes=allocator_bytes(events, expandable=False),
        expandable=expandable_in_use(),
        seconds=time.perf_counter() - start,
    )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence reports of libraries on a training that does not happen, and our own warnings about its numbers."""
    verbosity = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    try:
        with silenced(), _no_progress_bars():
            yield
    finally:
        transformers.utils.logging.set_verbosity(verbosity)


@contextlib.contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Silence those of the datasets library, where it is installed."""
    if not is_datasets_available():
        yield
        return
    import datasets

    bars = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not bars:
            datasets.enable_progress_bars()
