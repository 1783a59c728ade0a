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
        self._records: dict[Tensor, Tensor] = {}  # [times, first step], on the parameter's device

    def note(self, param: Tensor, skip: Tensor, step: int) -> None:
        """Note whether this step's update of `param` is skipped.

        Args:
            skip: 0-dimensional, 1 where it is and 0 where not.
        """
        record = self._records.get(param)
        if record is None or record.device != param.device:
            # Filled there: copying from the host would wait.
            record = self._records[param] = torch.zeros(2, device=param.device)
            record[1].fill_(_NEVER)
        record[0].add_(skip)
        record[1].clamp_(max=step + (1 - skip) * _NEVER)

    def read(self) -> dict[Tensor, Skipped]:
        """The parameters with skipped updates. Waits for the device."""
        found = {}
        for param, record in self._records.items():
            times, first_step = record.tolist()
            if times:
                found[param] = Skipped(int(times), int(first_step))
        return found
