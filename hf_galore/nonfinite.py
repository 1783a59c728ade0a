"""Updates that were skipped because a gradient was not finite: counted on the device, without waiting for it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_NEVER = 1e9


class Skipped(NamedTuple):
    """What happened to one parameter."""

    times: int
    first_step: int


class SkippedUpdates:
    """Counts, for each parameter, the updates skipped and the step of the first."""

    def __init__(self) -> None:
        self._records: dict[Tensor, tuple[Tensor, Tensor]] = {}  # times and first step, on the parameter's device

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

    def read(self) -> dict[Tensor, Skipped]:
        """The parameters with skipped updates. Waits for the device."""
        found = {}
        for param, (times, first_step) in self._records.items():
            count = int(times.item())
            if count:
                found[param] = Skipped(count, int(first_step.item()))
        return found
