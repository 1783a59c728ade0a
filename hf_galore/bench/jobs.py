"""What is measured beside what: the contenders, and the job of one process, as JSON both ways."""

from __future__ import annotations

import dataclasses
from typing import Literal

Task = Literal["look", "plan", "train"]
Contender = Literal["galore", "adamw_8bit", "trainers_own"]

GALORE: Contender = "galore"
ADAMW_8BIT: Contender = "adamw_8bit"
TRAINERS_OWN: Contender = "trainers_own"

# The first step makes all bases, and the second still finds kernels and memory that nobody has asked for before.
WARM_UP = 2
STEPS = 8
ROUNDS = 2
SMALL_LAYERS = 2
SMALL_RANK = 16

OUT_OF_MEMORY = "out of memory"


@dataclasses.dataclass(frozen=True)
class Job:
    """What one process is to do: look at the machine and the recipe, plan a run's memory, or train."""

    task: Task
    arguments: tuple[str, ...]
    """`--config FILE`, and `--key value ...` as `hf-galore sft` takes them."""
    contender: Contender = GALORE
    layers: int | None = None
    """`None` stands for the model's own number."""
    rank: int | None = None
    """`None` stands for the recipe's."""
    steps: int = STEPS
    """Steps that are timed, after those that warm up."""
    small: bool = False
    """Whether a tiny model on the CPU, in float32, takes the place of the recipe's."""
    svd: bool = False
    """Whether the Trainer's own GaLore computes its SVDs, or is spared them."""
    limit_bytes: int | None = None
    """The most that torch may reserve; `None` stands for all that there is."""


@dataclasses.dataclass(frozen=True)
class Look:
    """What there is to measure on, and what."""

    device: str | None
    """`cuda`; `cpu` of a small bench; `None` where there is no GPU."""
    card: str
    """The GPU's name; of a CPU its kind."""
    memory_bytes: int | None
    """Of the card, as torch sees it."""
    free_bytes: int | None
    """While a process looks, whose own share of the card is not among them."""
    driver: str | None
    power_limit: str | None
    versions: dict[str, str]
    allocator: str | None
    """What the allocator was told: PYTORCH_ALLOC_CONF."""
    model: str
    recipe: str
    optim: str
    rank: int
    layers: int
    """Of the whole model."""
    rows: int
    """Of a micro-batch."""
    max_length: int
    micro_batches: int
    clips: bool
    galore_torch: str | None
    """Its version, where it is installed."""
    weight_bits: int = 16
    """Of the linear layers' weights while GaLore trains them."""


@dataclasses.dataclass(frozen=True)
class Planned:
    """A run's memory as it is planned, in bytes."""

    peak_bytes: int
    """Of the training steps."""
    needed_bytes: int
    """The card's memory that the plan asks for."""


@dataclasses.dataclass(frozen=True)
class Measured:
    """One run, in a process of its own. Sizes in bytes, of a GPU only."""

    seconds: list[float]
    """Of each step; the first ones warm up."""
    tokens_per_step: int
    parameters: int
    losses: list[float]
    allocated: int | None = None
    reserved: int | None = None
    resident: int | None = None
    """Allocated between steps."""
    outside_torch: int | None = None
    """What of the card is taken, by whomever, and not reserved by torch."""
    first_refreshes: float | None = None
    """Seconds of the first step's refreshes."""
    refreshes: int | None = None
    """After the first step."""
    refresh_seconds: float | None = None
    """Of all those."""
    warnings: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Failed:
    """What a process ended with instead of a result."""

    reason: str
    """In words: `OUT_OF_MEMORY`, ..."""
    detail: str = ""
    mistake: bool = False
    """Whether what was given is wrong: nothing else will go better then."""
