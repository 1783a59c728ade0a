"""A run on several processes, beside AdamW's on the same: memory a rank and bytes on the wire.

Memory is calculated from what was planned for one process (`hf_galore.plan.ranks`), bytes on the wire from the shapes
alone (`hf_galore.plan.wire`). Neither goes through the ranks: a thousand take no longer than two.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn
from transformers import Trainer

from ..expandable_segments import in_use as expandable_in_use
from ..int8 import is_int8
from ..integrations.accelerate import unwrapped
from ..integrations.fsdp_units import fsdp_units
from ..integrations.target_summary import grouped
from .needs import needed_at_a_guess
from .parameters import Parameter, parameters_of
from .ranks import RankMemory, memory_a_rank, phases_of
from .rehearsal import Record
from .wire import Devices, Exchange, Kind, sent_bytes, wire_bytes


@dataclasses.dataclass(frozen=True)
class RankPlan:
    """What a rank has and sends. In bytes."""

    devices: Devices
    optim: str
    upcast: bool
    """Whether a rank keeps trained weights in float32 that the recipe has in less."""
    memory: RankMemory
    payload: Mapping[Kind, float]
    """Of an optimizer step, the mean over the gap between refreshes, by kind of collective."""
    sent: float
    """A rank, in a step."""
    refresh_payload: Mapping[Kind, float]
    """Of a step in which all targets refresh: the first, and every so many without `stagger`."""

    @property
    def needed_bytes(self) -> int:
        """What a card has to have, with the shares of torch's allocator and of CUDA; without NCCL's buffers."""
        return needed_at_a_guess(self.memory.total, expandable=expandable_in_use())

    def fits(self, vram: int | None) -> bool | None:
        """Whether a card of so many bytes has room for it."""
        return None if vram is None else self.needed_bytes <= vram

    def as_dict(self, vram: int | None) -> dict[str, Any]:
        """For JSON."""
        return {
            "optim": self.optim,
            "phase": self.memory.phase,
            "memory_bytes": dict(self.memory.parts),
            "total_bytes": self.memory.total,
            "needed_bytes": self.needed_bytes,
            "fits": self.fits(vram),
            "payload_bytes_per_step": {kind: round(nbytes) for kind, nbytes in self.payload.items()},
            "payload_bytes_where_all_refresh": {kind: round(nbytes) for kind, nbytes in self.refresh_payload.items()},
            "sent_bytes_per_step": round(self.sent),
        }


@dataclasses.dataclass(frozen=True)
class ProcessesPlan:
    """A run on several processes, and the same with AdamW."""

    devices: Devices
    run: RankPlan
    adamw: RankPlan
    parameters: int
    """How many numbers the model has."""
    tokens_per_step: int | None
    """Of all processes."""
    vram_bytes: int | None
    """Of each card, where it is known."""
    seconds: float
    notes: tuple[str, ...] = ()

    @property
    def fits(self) -> bool | None:
        """Whether the run fits each card."""
        return self.run.fits(self.vram_bytes)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "num_processes": self.devices.processes,
            "sharded": self.devices.sharded,
            "exchange": None if self.devices.sharded else self.devices.exchange,
            "run": self.run.as_dict(self.vram_bytes),
            "adamw": self.adamw.as_dict(self.vram_bytes),
            "parameters": self.parameters,
            "tokens_per_step": self.tokens_per_step,
            "vram_bytes": self.vram_bytes,
            "seconds": self.seconds,
            "notes": list(self.notes),
        }


def rank_plan(
    trainer: Trainer,
    record: Record,
    processes: int,
    *,
    sharded: bool,
    exchange: Exchange | None = None,
) -> RankPlan:
    """What a rank of a run has and sends, from what one process was planned to take.

    Args:
        trainer: after its steps, while tensors are still fake.
        record: of these steps.
        processes: how many there are to be.
        sharded: whether FSDP2 shards the model; else DDP has all of it in each process.
        exchange: what DDP reduces of targets; by default R where the backward pass gives it, else G.

    Raises:
        ValueError: the model is to be sharded, and something is projected that is not when it is, or its weights are in
            8 bits.
    """
    optimizer, model, args = unwrapped(trainer.optimizer), trainer.model, trainer.args
    if sharded:
        check_no_int8(model)
    hooks = getattr(optimizer, "hooks", None)
    hooked = hooks is not None
    if exchange is None:
        exchange = "low_rank" if hooks is not None and hooks.projected_backward else "dense"
    devices = Devices(processes, sharded, exchange, hooked, args.gradient_accumulation_steps)
    parameters = parameters_of(
        model,
        optimizer,
        units=fsdp_units(model) if sharded else None,
        # accelerate makes trained weights float32 where it is told to compute in less (`fsdp2_prepare_model`).
        float32=sharded and (args.bf16 or args.fp16),
    )
    if sharded:
        _check_matrices(parameters)
    buffer_bytes = sum(buffer.nbytes for buffer in model.buffers())
    memory = memory_a_rank(parameters, phases_of(record.tracker, devices), devices, buffer_bytes=buffer_bytes)
    payload, where_all_refresh = (
        wire_bytes(parameters, devices, refreshing=refreshing, buffer_bytes=buffer_bytes)
        for refreshing in (None, {parameter.name for parameter in parameters})
    )
    name = str(getattr(args.optim, "value", args.optim))
    upcast = any(parameter.itemsize != parameter.wire_itemsize for parameter in parameters)
    sent = sent_bytes(payload, processes)
    return RankPlan(devices, name, upcast, memory, payload, sent, where_all_refresh)


def check_no_int8(model: nn.Module) -> None:
    """Check that no weight of a model is in 8 bits, which FSDP2 does not shard.

    Raises:
        ValueError: some are.
    """
    in_8_bits = [name for name, param in model.named_parameters() if is_int8(param)]
    if in_8_bits:
        raise ValueError(
            f"FSDP2 does not shard weights in 8 bits, and those of {grouped(in_8_bits)} are. Plan for DDP, without "
            "sharded, or leave out weight_bits."
        )


def _check_matrices(parameters: Iterable[Parameter]) -> None:
    """Check that all that is projected are matrices, as FSDP2 shards them.

    Raises:
        ValueError: there are stacks or convolutions among them.
    """
    others = [
        parameter.name
        for parameter in parameters
        if parameter.projection is not None and (len(parameter.shape) != 2 or len(parameter.matrices) != 2)
    ]
    if others:
        raise ValueError(
            f"Stacks of experts and convolutions train full-rank where FSDP2 shards them, but this plan has them "
            f"projected: {grouped(others)}. Let optim_target_modules name the others only, such as attn: then the plan "
            "has these as they are trained. Or plan for DDP, without sharded."
        )
