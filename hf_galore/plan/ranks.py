"""The memory of a rank, calculated from the plan of one process: what is replicated, and what each holds a part of.

The plan of one process says what is alive in each phase, with the micro-batch that a rank has. Here its weights,
gradients, moments and bases become those of a rank; activations, temporaries and batches stay as they are. What an
engine adds is in `_replicated` and `_sharded`. NCCL's own buffers are not counted.
"""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from ..integrations.fsdp_units import REST
from .parameters import Parameter
from .rehearsal import BASES, EVALUATION, GRADIENTS, LOW_RANK, MOMENTS, PARAMETERS, REFERENCE, REFERENCE_MODEL, UPDATE
from .tracking import BACKWARD, FORWARD, StorageTracker
from .wire import Devices

WEIGHTS, BUCKETS, GATHERED, WORKING = "weights", "DDP's buckets", "gathered units", "activations, temporaries"
PARTS = (WEIGHTS, GRADIENTS, BUCKETS, GATHERED, LOW_RANK, MOMENTS, BASES, WORKING)
"""What the memory of a rank is made of, in the order of a table."""

_OWN = {PARAMETERS, REFERENCE_MODEL, GRADIENTS, LOW_RANK, MOMENTS, BASES}


@dataclasses.dataclass(frozen=True)
class Phase:
    """What one process has alive at the peak of a phase, in bytes by label."""

    name: str
    breakdown: Mapping[str, int]


@dataclasses.dataclass(frozen=True)
class RankMemory:
    """What a rank has at its peak, in bytes."""

    phase: str
    parts: Mapping[str, int]
    """By `PARTS`; what takes nothing is left out."""

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self.parts.values())


def phases_of(tracker: StorageTracker, devices: Devices) -> list[Phase]:
    """What a plan had alive in each phase, at the moment when a rank has most."""
    shares: dict[str, float] = {}
    if devices.sharded:  # what is sharded is the same all the time
        shares = {PARAMETERS: 0.0, REFERENCE_MODEL: 0.0, MOMENTS: 0.0, BASES: 0.0}
        shares[LOW_RANK] = 1 / devices.processes
        if devices.micro_batches == 1:
            shares[GRADIENTS] = 1 / devices.processes
    return [Phase(peak.phase, tracker.breakdown(peak.event)) for peak in tracker.peaks_by(shares)]


def memory_a_rank(
    parameters: Sequence[Parameter], phases: Iterable[Phase], devices: Devices, *, buffer_bytes: int = 0
) -> RankMemory:
    """The memory of the rank that has most, in the phase where it has most.

    Args:
        parameters: of the model.
        phases: of the plan of one process.
        devices: the processes.
        buffer_bytes: of the model's buffers, which no engine shards.
    """
    found = []
    for phase in phases:
        if devices.sharded:
            parts = _sharded(parameters, phase, devices, buffer_bytes)
        else:
            parts = _replicated(parameters, phase, devices)
        parts[WORKING] = sum(nbytes for label, nbytes in phase.breakdown.items() if label not in _OWN)
        found.append(RankMemory(phase.name, {part: parts[part] for part in PARTS if parts.get(part)}))
    return max(found, key=lambda memory: memory.total)


def _replicated(parameters: Sequence[Parameter], phase: Phase, devices: Devices) -> dict[str, int]:
    """Under DDP: all of what one process has, and DDP's buckets for the gradients that it reduces.

    The buckets are there from the start, and gradients are copies of them: `gradient_as_bucket_view` is false in
    torch, and the Trainer leaves it so. An optimizer with hooks reduces its targets itself, and DDP has no buckets for
    them; what is full-rank stays in DDP, also with a layerwise optimizer, and so do all its gradients until the step.

    Sources: torch, `torch/nn/parallel/distributed.py`,
    `torch/csrc/distributed/c10d/reducer.cpp` (`initialize_buckets`).
    """
    alive = phase.breakdown
    in_buckets = sum(
        parameter.numel * parameter.itemsize
        for parameter in parameters
        if parameter.trained and not (devices.hooked and parameter.projection is not None)
    )
    gradients = alive.get(GRADIENTS, 0)
    if devices.hooked and phase.name in (BACKWARD, UPDATE):
        gradients = max(gradients, in_buckets)
    return {
        WEIGHTS: alive.get(PARAMETERS, 0) + alive.get(REFERENCE_MODEL, 0),
        GRADIENTS: gradients,
        BUCKETS: in_buckets,
        LOW_RANK: alive.get(LOW_RANK, 0),
        MOMENTS: alive.get(MOMENTS, 0),
        BASES: alive.get(BASES, 0),
    }


def _sharded(parameters: Sequence[Parameter], phase: Phase, devices: Devices, buffer_bytes: int) -> dict[str, int]:
    """Under FSDP2: a part of the weights, gradients, moments and bases, and the units that are gathered.

    Weights of a unit come in one piece and are copied out of it. In the backward pass the next unit is gathered while
    one computes; its gradients are copied into one piece, which stays until that is reduce-scattered. The largest basis
    is gathered as it is kept. Between the micro-batches of a step gradients are not reduced: a rank has whole ones, of
    all parameters whose gradient is built.

    Sources: torch, `torch/distributed/fsdp/_fully_shard/_fsdp_collectives.py` (`foreach_all_gather`, `foreach_reduce`),
    `_fsdp_param_group.py` (`post_backward`); accelerate's `no_sync`.
    """
    alive, ranks = phase.breakdown, devices.processes
    computing = phase.name in (FORWARD, BACKWARD, EVALUATION, REFERENCE)
    accumulates = devices.micro_batches > 1 and phase.name in (FORWARD, BACKWARD)
    gathered = 0
    if computing:
        gathered = _gathered(parameters, backward=phase.name == BACKWARD)
        gathered += max((parameter.basis_bytes for parameter in parameters), default=0)
    trained = [parameter for parameter in parameters if parameter.trained]
    gradients = alive.get(GRADIENTS, 0)
    if accumulates:
        built = (parameter.numel * parameter.wire_itemsize for parameter in trained if parameter.builds_gradient)
        gradients = max(gradients, sum(built))
    else:
        upcast = max((parameter.itemsize / parameter.wire_itemsize for parameter in trained), default=1)
        gradients = math.ceil(gradients * upcast / ranks)
    return {
        WEIGHTS: sum(parameter.shard_numel(ranks) * parameter.itemsize for parameter in parameters)
        + buffer_bytes
        + math.ceil(alive.get(REFERENCE_MODEL, 0) / ranks),
        GRADIENTS: gradients,
        GATHERED: gathered,
        LOW_RANK: math.ceil(alive.get(LOW_RANK, 0) / ranks),
        MOMENTS: sum(parameter.moment_bytes_of(ranks) for parameter in trained),
        BASES: sum(math.ceil(parameter.basis_bytes / ranks) for parameter in trained),
    }


def _gathered(parameters: Iterable[Parameter], *, backward: bool) -> int:
    """The most that gathered weights, and gradients that are not reduced yet, take while units follow each other."""
    weights: dict[str, int] = defaultdict(int)  # in the order of the model
    gradients: dict[str, int] = defaultdict(int)
    for parameter in parameters:
        nbytes = parameter.numel * parameter.wire_itemsize
        weights[parameter.unit] += nbytes
        gradients[parameter.unit] += nbytes if parameter.builds_gradient else 0
    stays = weights.pop(REST, 0)
    units = [*weights]
    most = 0
    for unit, before, after in zip(units, ["", *units], [*units[1:], ""], strict=False):
        w, g = weights[unit], gradients[unit]
        if not backward:
            most = max(most, 2 * w, w + weights.get(after, 0))
        else:
            gathered_ahead = weights.get(before, 0)
            most = max(most, w + gathered_ahead + g + gradients.get(after, 0), gathered_ahead + 2 * g)
    return stays + most + (2 * gradients.get(REST, 0) if backward else 0)
