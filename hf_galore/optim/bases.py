"""A target's bases in an optimizer's state: their form, reading them, and when they are next renewed.

State of a target, besides its moments (`left`, `right`, as far as that side is projected)::

    basis_left, basis_right                 the bases, or their codes (see `hf_galore.lowrank.quantize`)
    basis_left_absmax, basis_right_absmax   with 8 and 4 bits
    refreshed_at, refreshes                 the step of the last refresh, and how many there were
    gap_factor                              with lazy_refresh, how many gaps it waits for the next
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..lowrank.projection import Bases, basis_shapes, side_of
from ..lowrank.quantize import QuantizedBasis, dequantize_basis, empty_basis, quantize_basis
from ..lowrank.schedule import NEVER, step_of_next_refresh
from .groups import Group
from .report import Stopwatch

State = dict[str, Tensor]

# Counters live on the CPU, as in torch.optim: reading them never waits for the device.
ON_HOST = frozenset({"step", "refreshed_at", "refreshes", "gap_factor"})


@dataclasses.dataclass(frozen=True)
class NewBasis:
    """A refresh that has been computed, and of which the optimizer does not know yet."""

    kept: State
    """The new bases as `kept_bases` gives them."""
    low_rank: Tensor
    """R of the gradient in the new bases; zeros of a gradient that is zero, NaN of one that is not finite."""
    norm: float
    """‖G‖_F"""
    captured_energy: float
    overlap: float
    watch: Stopwatch

    @property
    def is_zero(self) -> bool:
        """Whether there was nothing to learn from the gradient."""
        return self.norm == 0

    @property
    def usable(self) -> bool:
        """Whether the gradient was one to make a basis from."""
        return self.norm > 0 and math.isfinite(self.norm)


class Before(NamedTuple):
    """What a refresh has changed in a target's state, as it was."""

    entries: State
    """Counters, and copies of the bases if they were to be kept."""
    had_basis: bool
    complete: bool
    """Whether that is all it takes to undo the refresh."""


def new_basis_state(param: Tensor, group: Group) -> State:
    """Room for a target's bases, and its counters before the first refresh."""
    state: State = {"refreshed_at": torch.tensor(float(NEVER)), "refreshes": torch.tensor(0.0)}
    if group["lazy_refresh"]:
        state["gap_factor"] = torch.tensor(1.0)
    shapes = basis_shapes(param.shape, side_of(param.shape, group["proj_type"]), group["rank"])
    for side, shape in zip(Bases._fields, shapes, strict=True):
        if shape is not None:
            empty = empty_basis(shape, group["proj_bits"], param)
            state[f"basis_{side}"] = empty.codes
            if empty.absmax is not None:
                state[f"basis_{side}_absmax"] = empty.absmax
    return state


def read_bases(param: Tensor, group: Group, state: State) -> Bases:
    """A target's bases in its weight's dtype; zeros before the first refresh."""
    shapes = basis_shapes(param.shape, side_of(param.shape, group["proj_type"]), group["rank"])
    return Bases(
        *(
            None
            if shape is None
            else dequantize_basis(
                QuantizedBasis(state[f"basis_{side}"], state.get(f"basis_{side}_absmax")),
                shape,
                group["proj_bits"],
                param.dtype,
            )
            for side, shape in zip(Bases._fields, shapes, strict=True)
        )
    )


def kept_bases(bases: Bases, param: Tensor, group: Group) -> State:
    """New bases in the form and under the keys that a target's state keeps them."""
    entries: State = {}
    for side, basis in zip(Bases._fields, bases, strict=True):
        if basis is not None:
            kept = quantize_basis(basis, group["proj_bits"], param.dtype)
            entries[f"basis_{side}"] = kept.codes
            if kept.absmax is not None:
                entries[f"basis_{side}_absmax"] = kept.absmax
    return entries


def before_refresh(state: State, *, keep: bool) -> Before:
    """What a refresh is going to change in a target's state; `keep` says whether the bases are copied."""
    counters: State = {key: state[key] for key in ("refreshed_at", "refreshes", "gap_factor") if key in state}
    had_basis = refreshed_at(state) != NEVER
    kept = keep and had_basis  # zeros need no copy
    copies = {key: value.clone() for key, value in state.items() if kept and key.startswith("basis")}
    return Before({**counters, **copies}, had_basis, keep or not had_basis)


def as_before(state: State, before: Before) -> State:
    """A target's state as it was before a refresh, which stays as it is."""
    earlier = {**state, **before.entries}
    if not before.had_basis:
        earlier |= {key: torch.zeros_like(value) for key, value in state.items() if key.startswith("basis")}
    return earlier


def take_back(state: State, before: Before) -> None:
    """Undo a refresh."""
    for key, value in as_before(state, before).items():
        if key in ON_HOST:
            state[key] = value
        elif state[key] is not value:
            state[key].copy_(value)


def count_refresh(state: State, step: int) -> None:
    """Note a refresh after `step` steps."""
    # Out of place, as the step is counted: fake tensors know such numbers.
    state["refreshed_at"] = torch.tensor(float(step))
    state["refreshes"] = state["refreshes"] + 1


def refreshed_at(state: State) -> int:
    """The step of a target's last refresh; `NEVER` before the first."""
    return int(state["refreshed_at"].item())


def refresh_due(group: Group, state: State, phase: int) -> bool:
    """Whether a target's next step is one with a new basis."""
    factor = int(state["gap_factor"].item()) if "gap_factor" in state else 1
    return int(state["step"].item()) >= step_of_next_refresh(
        refreshed_at(state), group["update_proj_gap"], phase, factor
    )
