"""A target's bases in an optimizer's state: their form, reading them, and when they are next renewed.

State of a target, besides its moments (`left`, `right`, as far as that side is projected)::

    basis_left, basis_right                 the bases, or their codes (see `hf_galore.quantize`)
    basis_left_absmax, basis_right_absmax   with 8 and 4 bits
    refreshed_at, refreshes                 the step of the last refresh, and how many there were
    gap_factor                              with lazy_refresh, how many gaps it waits for the next
"""

from __future__ import annotations

import torch
from torch import Tensor

from .groups import Group
from .projection import Bases, basis_shapes, side_of
from .quantize import QuantizedBasis, dequantize_basis, empty_basis, quantize_basis
from .schedule import NEVER, next_refresh

State = dict[str, Tensor]

# Counters live on the CPU, as in torch.optim: reading them never waits for the device.
ON_HOST = frozenset({"step", "refreshed_at", "refreshes", "gap_factor"})


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
    return int(state["step"].item()) >= next_refresh(refreshed_at(state), group["update_proj_gap"], phase, factor)
