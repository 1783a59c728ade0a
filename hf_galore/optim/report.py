"""What an optimizer can tell of its refreshes, skipped updates and memory, kept so that asking is all that costs."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..log import and_others, logger
from .skipped import Skipped, SkippedUpdates


class Stopwatch:
    """Times what happens on a device between its making and `stop()`, without waiting for it."""

    def __init__(self, device: torch.device) -> None:
        # On a GPU the host runs ahead: the device's own clock is read, when somebody asks.
        self._events = [torch.Event(device, enable_timing=True) for _ in range(2)] if device.type == "cuda" else []
        self._start = time.perf_counter()
        self._seconds = 0.0
        if self._events:
            self._events[0].record()

    def stop(self) -> None:
        """The end of what is timed."""
        self._seconds = time.perf_counter() - self._start
        if self._events:
            self._events[1].record()

    def seconds(self) -> float:
        """The time between; waits for the device."""
        if not self._events:
            return self._seconds
        self._events[1].synchronize()
        return float(self._events[0].elapsed_time(self._events[1])) / 1000


@dataclasses.dataclass(frozen=True)
class Refresh:
    """What is known of one refresh."""

    captured_energy: float  # ‖R‖² / ‖G‖² with the new basis
    overlap: float | None  # of the new basis with the old; None for the first
    watch: Stopwatch


# Nobody may ever ask: what is older than so many refreshes, some gaps of a large model, is forgotten.
_MOST_REFRESHES = 10_000


class RefreshLog:
    """The refreshes since somebody last asked, the last 10,000 of them."""

    def __init__(self) -> None:
        self._refreshes: deque[Refresh] = deque(maxlen=_MOST_REFRESHES)

    def add(self, refresh: Refresh) -> None:
        """Note a refresh."""
        self._refreshes.append(refresh)

    def take(self) -> dict[str, float]:
        """Their figures, which are forgotten; empty where there was no refresh. Waits for the device."""
        refreshes = list(self._refreshes)
        self._refreshes.clear()
        if not refreshes:
            return {}
        energies = [refresh.captured_energy for refresh in refreshes]
        figures = {
            "captured_energy_min": min(energies),
            "captured_energy_median": statistics.median(energies),
            "refresh_seconds": sum(refresh.watch.seconds() for refresh in refreshes),
        }
        overlaps = [refresh.overlap for refresh in refreshes if refresh.overlap is not None]
        if overlaps:
            figures["overlap_median"] = statistics.median(overlaps)
        return figures


@dataclasses.dataclass
class Memory:
    """What an optimizer's state holds, and of how many parameters."""

    moment_bytes: int = 0
    basis_bytes: int = 0
    targets: int = 0
    full_rank: int = 0

    def count(
        self, state: Mapping[str, Tensor], *, projected: bool, moments: Sequence[str], bases: Sequence[str]
    ) -> None:
        """Add one parameter's state: whether it is a target, and the keys of its moments and of its bases."""
        self.targets += projected
        self.full_rank += not projected
        self.moment_bytes += sum(state[key].nbytes for key in moments if key in state)
        self.basis_bytes += sum(state[key].nbytes for key in bases if key in state)


@dataclasses.dataclass
class Journal:
    """What an optimizer's parameters note down for whoever asks."""

    refreshes: RefreshLog = dataclasses.field(default_factory=RefreshLog)
    skipped: SkippedUpdates = dataclasses.field(default_factory=SkippedUpdates)
    warned_of_skipped: bool = False

    def warn_of(self, skipped: Mapping[str, Skipped]) -> None:
        """Warn, once, if updates were skipped."""
        if self.warned_of_skipped or not skipped:
            return
        self.warned_of_skipped = True
        name, (_, step) = min(skipped.items(), key=lambda item: item[1].first_step)
        logger.warning(
            "A gradient was NaN or infinite: the update of %s%s was skipped at step %d. This is said once; "
            "optimizer.skipped_updates() counts.",
            name,
            and_others(len(skipped) - 1),
            step,
        )


class Counting(Protocol):
    """What a target tells of its refreshes."""

    @property
    def present_state(self) -> dict[str, Tensor]:
        """What the optimizer keeps of it; empty where that is yet to be made."""

    def refresh_counts(self) -> tuple[int, int | None]:
        """How many refreshes there were, and with `lazy_refresh` how many it has saved."""


def refresh_figures(journal: Journal, targets: Sequence[Counting]) -> dict[str, float]:
    """The figures of the refreshes since the last call, and their counts so far. Waits for the device."""
    figures = journal.refreshes.take()
    counts = [target.refresh_counts() for target in targets if target.present_state]
    figures["refreshes"] = sum(done for done, _ in counts)
    saved = [saved for _, saved in counts if saved is not None]
    if saved:
        figures["refreshes_saved"] = max(sum(saved), 0)
    return figures
