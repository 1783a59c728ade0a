"""A target's bases in an optimizer's state: their form, the counters beside them, and taking a refresh back.

State of a target, besides its moments (`left`, `right`, as far as that side is projected)::

    basis_left, basis_right                 the bases, or their codes (see `hf_galore.lowrank.quantize`)
    basis_left_absmax, basis_right_absmax   with 8 and 4 bits
    refreshed_at, refreshes                 the step of the last refresh, and how many there were
    gap_factor                              with lazy_refresh, how many gaps it waits for the next

Of a stack of k matrices all of it has a dimension k before the others, the counters too: a matrix whose gradient was
zero when the others were refreshed, such as that of an expert without tokens, has its refresh later.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..config import ProjBits
from ..lowrank.projection import Bases, BasisShapes
from ..lowrank.quantize import QuantizedBasis, dequantize_basis, empty_basis, quantize_basis
from ..lowrank.schedule import NEVER
from .report import Stopwatch

State = dict[str, Tensor]
"""What an optimizer keeps of one parameter."""

COUNTERS = ("refreshed_at", "refreshes", "gap_factor")
"""Of a target's refreshes. They live on the CPU, as the step does in torch.optim: reading them never waits."""
ON_HOST = ("step", *COUNTERS)
"""What of a state is on the CPU wherever the parameter is."""


class BasisLayout:
    """How the bases of one target lie in its state.

    Args:
        shapes: of the bases.
        bits: that an element is kept in.
    """

    def __init__(self, shapes: BasisShapes, bits: ProjBits) -> None:
        self.bits = bits
        self._sides = {f"basis_{side}": shape for side, shape in zip(Bases._fields, shapes, strict=True)}
        kept = [key for key, shape in self._sides.items() if shape is not None]
        scales = [] if bits == 16 else [f"{key}_absmax" for key in kept]
        self.keys = (*kept, *scales)

    def of(self, count: int) -> BasisLayout:
        """The layout of a stack of so many bases, of those of a stack."""
        shapes = (None if shape is None else (count, *shape[1:]) for shape in self._sides.values())
        return BasisLayout(BasisShapes(*shapes), self.bits)

    def empty(self, like: Tensor) -> State:
        """Room for the bases of a weight like this one."""
        entries: State = {}
        for key, shape in self._sides.items():
            if shape is not None:
                entries.update(_entries(key, empty_basis(shape, self.bits, like)))
        return entries

    def read(self, state: State, dtype: torch.dtype) -> Bases:
        """The bases in a weight's dtype; zeros before the first refresh."""
        return Bases(
            *(
                None
                if shape is None
                else dequantize_basis(QuantizedBasis(state[key], state.get(f"{key}_absmax")), shape, self.bits, dtype)
                for key, shape in self._sides.items()
            )
        )

    def read_here(self, state: State, dtype: torch.dtype) -> Bases:
        """The bases as far as the part of the weight that this process has is projected with them."""
        return self.read(state, dtype)

    def kept(self, bases: Bases, dtype: torch.dtype) -> State:
        """New bases in the form and under the keys that a target's state keeps them.

        Args:
            bases: float32 or float64.
            dtype: of the weight, for 16 bits.
        """
        entries: State = {}
        for key, basis in zip(self._sides, bases, strict=True):
            if basis is not None:
                entries.update(_entries(key, quantize_basis(basis, self.bits, dtype)))
        return entries


def _entries(key: str, basis: QuantizedBasis) -> State:
    return {key: basis.codes} if basis.absmax is None else {key: basis.codes, f"{key}_absmax": basis.absmax}


class OfStack(NamedTuple):
    """What there is to know of the refresh of each matrix of a stack."""

    matrices: tuple[int, ...]
    """Those that have a new basis."""
    overlaps: tuple[float, ...]
    """Of their new bases with the old."""


# Beside the bases, whose keys are those of a state.
_LOW_RANK, _FIGURES = "low_rank", "figures"
_NO_BASIS = -1.0


@dataclasses.dataclass(frozen=True)
class NewBasis:
    """A refresh that has been computed, and of which the target's state has nothing yet."""

    kept: State
    """The new bases as a `BasisLayout` keeps them."""
    low_rank: Tensor
    """R of the gradient in the new bases; zeros of a gradient that is zero, NaN of one that is not finite."""
    norm: float
    """‖G‖_F"""
    captured_energy: float
    overlap: float
    watch: Stopwatch
    of_stack: OfStack | None = None
    """Of a stack, what there is to know of each matrix."""
    probes: Bases | None = None
    """The norm probes of the new bases, where they have been made: R is R' then."""

    def tensors(self) -> State:
        """All of it as tensors by name, to be sent to other processes."""
        figures = [self.norm, self.captured_energy, self.overlap]
        if self.of_stack is not None:
            overlaps = dict(zip(*self.of_stack, strict=True))
            count = next(len(value) for value in self.kept.values())
            figures += [overlaps.get(index, _NO_BASIS) for index in range(count)]
        return {**self.kept, _LOW_RANK: self.low_rank, _FIGURES: torch.tensor(figures, dtype=torch.float64)}

    @classmethod
    def from_tensors(cls, tensors: State, watch: Stopwatch) -> NewBasis:
        """What another process has sent. Waits for the device."""
        kept = {key: value for key, value in tensors.items() if key not in (_LOW_RANK, _FIGURES)}
        norm, captured_energy, overlap, *overlaps = tensors[_FIGURES].tolist()
        made = {index: value for index, value in enumerate(overlaps) if value != _NO_BASIS}
        of_stack = OfStack(tuple(made), tuple(made.values())) if overlaps else None
        return cls(kept, tensors[_LOW_RANK], norm, captured_energy, overlap, watch, of_stack)

    @staticmethod
    def parts(kept: State, low_rank: torch.Size, dtype: torch.dtype) -> dict[str, tuple[torch.Size, torch.dtype]]:
        """The shapes and dtypes of `tensors()`.

        Args:
            kept: bases as they are kept, which the new ones are like.
            low_rank: the shape of R.
            dtype: of R.
        """
        of_bases = {key: (value.shape, value.dtype) for key, value in kept.items()}
        figures = 3 + (low_rank[0] if len(low_rank) == 3 else 0)
        return {**of_bases, _LOW_RANK: (low_rank, dtype), _FIGURES: (torch.Size([figures]), torch.float64)}

    @property
    def is_zero(self) -> bool:
        """Whether there was nothing to learn from the gradient."""
        return self.norm == 0

    @property
    def is_lost(self) -> bool:
        """Whether the gradient is not finite."""
        return not math.isfinite(self.norm)

    @property
    def usable(self) -> bool:
        """Whether the gradient was one to make a basis from; of a stack whether that of any matrix was."""
        made = self.of_stack is None or bool(self.of_stack.matrices)
        return self.norm > 0 and not self.is_lost and made


class Before(NamedTuple):
    """What a refresh has changed in a target's state, as it was."""

    entries: State
    """Counters, and copies of the bases if they were to be kept."""
    unset: tuple[str, ...]
    """The keys of bases that were zeros, because there had been no refresh."""
    complete: bool
    """Whether that is all it takes to undo the refresh."""
    matrices: tuple[int, ...] | None = None
    """Those of a stack that have new bases."""

    @property
    def had_basis(self) -> bool:
        """Whether there was a refresh before."""
        return not self.unset

    def restored(self, state: State) -> State:
        """A target's state as it was before the refresh; `state` stays as it is."""
        return {**state, **self.entries, **{key: torch.zeros_like(state[key]) for key in self.unset}}


def before_refresh(
    state: State, basis_keys: tuple[str, ...], *, keep: bool, matrices: tuple[int, ...] | None = None
) -> Before:
    """What a refresh is going to change in a target's state.

    Args:
        state: the target's.
        basis_keys: of its bases.
        keep: whether the bases are copied.
        matrices: of a stack those that have new bases.
    """
    entries: State = {key: state[key] for key in COUNTERS if key in state}
    if never_refreshed(state):
        return Before(entries, basis_keys, complete=True, matrices=matrices)
    if keep:
        entries |= {key: state[key].clone() for key in basis_keys}
    return Before(entries, (), complete=keep, matrices=matrices)


def take_back(state: State, before: Before) -> None:
    """Undo a refresh."""
    for key, value in before.restored(state).items():
        if key in COUNTERS:
            state[key] = value
        elif state[key] is not value:
            state[key].copy_(value)


def new_counters(lazy: bool, count: int | None = None) -> State:
    """The counters of a target before its first refresh; of a stack of `count` matrices those of each."""
    start = {"refreshed_at": float(NEVER), "refreshes": 0.0, **({"gap_factor": 1.0} if lazy else {})}
    return {key: counter(value if count is None else [value] * count) for key, value in start.items()}


def counter(value: float | Sequence[float]) -> Tensor:
    """A number, or one for each matrix of a stack, as a state has it."""
    if isinstance(value, (int, float)):
        return torch.tensor(float(value))
    # Not made by torch: under fake tensors, which know single numbers only, they are numbers still.
    return torch.from_numpy(np.array(value, dtype=np.float32))


def numbers_of(value: Tensor) -> list[int]:
    """The number, or the numbers, of a counter."""
    return [int(value.item())] if value.ndim == 0 else [int(number) for number in value.numpy().tolist()]


def count_refresh(state: State, step: int, matrices: Sequence[int] | None = None) -> None:
    """Note a refresh after `step` steps; of a stack that of some matrices."""
    # Out of place, as the step is counted: fake tensors know such numbers.
    if matrices is None:
        state["refreshed_at"] = counter(step)
        state["refreshes"] = state["refreshes"] + 1
        return
    steps, counts = numbers_of(state["refreshed_at"]), numbers_of(state["refreshes"])
    for index in matrices:
        steps[index], counts[index] = step, counts[index] + 1
    state["refreshed_at"], state["refreshes"] = counter(steps), counter(counts)


def never_refreshed(state: State) -> bool:
    """Whether a target has never been refreshed, nor any matrix of a stack."""
    return all(step == NEVER for step in numbers_of(state["refreshed_at"]))
