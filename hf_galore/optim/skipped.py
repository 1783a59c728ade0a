"""Counting the updates that are skipped because a gradient is not finite.

On a GPU only the device knows. The norms of a step's gradients are looked at together, at the step's end, in a few
kernels for all parameters; the counts of updates, which are the host's, are put right when it next waits for the device
anyway: with a Trainer's log, with a checkpoint, and for a target with a refresh, whose place among its updates is kept.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from ..lowrank.nonfinite import flags_of, has_numbers

_NEVER = 1e9

Key = TypeVar("Key")
Value = TypeVar("Value")


class Skipped(NamedTuple):
    """What happened to one parameter."""

    times: int
    first_step: int


class _Record(NamedTuple):
    """Times and first step since the last read, 0-dimensional, on the device that the parameter was on."""

    times: Tensor
    first_step: Tensor


class _Update(NamedTuple):
    """An update of which only the device knows whether it is skipped."""

    param: Tensor
    norm: Tensor
    step: int


class SkippedUpdates:
    """Counts, for each parameter, the updates skipped and the step of the first."""

    def __init__(self) -> None:
        self._known: dict[Tensor, Skipped] = {}
        self._records: dict[Tensor, _Record] = {}
        self._present: list[_Update] = []  # of this step

    def note_known(self, param: Tensor, step: int, times: int = 1) -> None:
        """Note that updates of `param` were skipped, the first of them that of `step`."""
        known = self._known.get(param)
        self._known[param] = Skipped(times, step) if known is None else Skipped(known.times + times, known.first_step)

    def note(self, param: Tensor, norm: Tensor, step: int) -> None:
        """Note an update, which is skipped if the norm of its gradient is not finite; counted by `count`.

        Args:
            param: of the device that is to know.
            norm: 0-dimensional.
            step: the number of the update.
        """
        self._present.append(_Update(param, norm, step))

    @torch.no_grad()
    def count(self) -> None:
        """Look at the norms noted in this step, without waiting for the device."""
        updates, self._present = self._present, []
        keyed = (((update.norm.device, update.norm.dtype, update.step), update) for update in updates)
        for (_, _, step), alike in _grouped(keyed).items():
            records = [self._record(update) for update in alike]
            flags = flags_of(torch.stack([update.norm for update in alike]))
            first_steps = (1 - flags).mul_(_NEVER).add_(step)
            torch._foreach_add_([record.times for record in records], list(flags.unbind()))
            torch._foreach_clamp_max_([record.first_step for record in records], list(first_steps.unbind()))

    def _record(self, update: _Update) -> _Record:
        record, device = self._records.get(update.param), update.norm.device
        if record is None or record.times.device != device:
            # Filled there: copying from the host would wait.
            record = _Record(torch.zeros((), device=device), torch.full((), _NEVER, device=device))
            self._records[update.param] = record
        return record

    def uncounted(self, param: Tensor) -> Tensor | None:
        """What `read` would read of a parameter, for whoever waits for its device anyway, and then calls `settle`.

        Returns:
            2 numbers on the parameter's device; `None` where there are none.
        """
        record = self._records.get(param)
        if record is None or record.times.device != param.device or not has_numbers(record.times):
            return None
        return torch.stack(record)

    def settle(self, param: Tensor, times: float, first_step: float) -> int:
        """Note what was read of a parameter. Returns the updates that were skipped but counted as made."""
        if times:
            self.note_known(param, int(first_step), int(times))
            record = self._records[param]
            record.times.zero_()
            record.first_step.fill_(_NEVER)
        return int(times)

    def read(self) -> dict[Tensor, int]:
        """The updates that were skipped since the last time but counted as made, by parameter. Waits for devices."""
        self.count()
        found = {}
        with_numbers = [(param, record) for param, record in self._records.items() if has_numbers(record.times)]
        for records in _grouped((record.times.device, (param, record)) for param, record in with_numbers).values():
            # Of all parameters in one: each read of its own would wait for the device again.
            numbers = torch.stack([number for _, record in records for number in record]).view(-1, 2).tolist()
            for (param, _), (times, first_step) in zip(records, numbers, strict=True):
                if self.settle(param, times, first_step):
                    found[param] = int(times)
        return found

    def known(self) -> dict[Tensor, Skipped]:
        """The parameters with skipped updates, as far as the host knows."""
        return dict(self._known)


def uncount(state: dict[str, Tensor], times: int) -> None:
    """Take back the count of updates that a parameter's state has as made; nothing of a state that is gone."""
    if times and "step" in state:
        # A state may have been made anew since. Out of place, as it is counted.
        state["step"] = (state["step"] - times).clamp(min=0)


def _grouped(pairs: Iterable[tuple[Key, Value]]) -> dict[Key, list[Value]]:
    """Lists of the values that have a key in common."""
    found: dict[Key, list[Value]] = {}
    for key, value in pairs:
        found.setdefault(key, []).append(value)
    return found
