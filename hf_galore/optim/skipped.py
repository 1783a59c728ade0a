"""Counting the updates that are skipped because a gradient is not finite.

The counts of updates, which are the host's, are put right when it next waits for the device anyway: with a Trainer's
log.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..lowrank.nonfinite import has_numbers

_NEVER = 1e9


class Skipped(NamedTuple):
    """What happened to one parameter."""

    times: int
    first_step: int


class SkippedUpdates:
    """Counts, for each parameter, the updates skipped and the step of the first."""

    def __init__(self) -> None:
        self._known: dict[Tensor, Skipped] = {}
        # Times and first step since the last read, on the parameter's device.
        self._records: dict[Tensor, tuple[Tensor, Tensor]] = {}

    def note_known(self, param: Tensor, step: int, times: int = 1) -> None:
        """Note that updates of `param` were skipped, the first of them that of `step`."""
        known = self._known.get(param)
        self._known[param] = Skipped(times, step) if known is None else Skipped(known.times + times, known.first_step)

    def note(self, param: Tensor, skip: Tensor, step: int) -> None:
        """Note whether this step's update of `param` is skipped.

        Args:
            skip: 0-dimensional, 1 where it is and 0 where not.
        """
        record = self._records.get(param)
        if record is None or record[0].device != param.device:
            # Filled there: copying from the host would wait.
            record = (torch.zeros((), device=param.device), torch.full((), _NEVER, device=param.device))
            self._records[param] = record
        times, first_step = record
        times.add_(skip)
        first_step.clamp_(max=(1 - skip).mul_(_NEVER).add_(step))

    def read(self) -> dict[Tensor, int]:
        """The updates that were skipped since the last time but counted as made, by parameter. Waits for devices."""
        found = {}
        on_devices: dict[torch.device, dict[Tensor, tuple[Tensor, Tensor]]] = {}
        for param, record in self._records.items():
            if has_numbers(record[0]):
                on_devices.setdefault(record[0].device, {})[param] = record
        for records in on_devices.values():
            # Of all parameters in one: each read of its own would wait for the device again.
            numbers = torch.stack([number for record in records.values() for number in record]).view(-1, 2).tolist()
            for (param, (times, first_step)), (count, first) in zip(records.items(), numbers, strict=True):
                if count:
                    found[param] = int(count)
                    self.note_known(param, int(first), int(count))
                    times.zero_()
                    first_step.fill_(_NEVER)
        return found

    def known(self) -> dict[Tensor, Skipped]:
        """The parameters with skipped updates, as far as the host knows."""
        return dict(self._known)
