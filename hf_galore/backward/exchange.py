"""Reducing what the processes of DistributedDataParallel have of a step, during their backward passes.

===================  =========================================================================================
a target's           is exchanged by
===================  =========================================================================================
low-rank gradient R  a mean over all processes, several at a time
gradient G           a mean over all processes, where R is not to be reduced (`exchange=dense`)
G for a refresh      a mean in one process, which takes the new basis from it and sends all others basis and R; but R
                     where only experts are due that have tokens in none
===================  =========================================================================================

The processes do so in one order, whatever the order in which their gradients come: else each would wait for another.
What one of them has no gradient for counts as zero. Within `no_sync()` nothing is exchanged but what refreshes need,
since all micro-batches of a window share a basis.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Variable

from ..int8 import elements_of
from .passes import in_segment
from .processes import Processes
from .shared_refresh import SharedRefresh, waits_for_gradients
from .whole_window import WholeWindow

if TYPE_CHECKING:
    from .window import Window

Kind = Literal["low_rank", "whole", "refresh"]


class _InFlight(NamedTuple):
    """Something that has been sent, and what is to be done when all have."""

    work: Any
    finish: Callable[[], None]


class Exchange:
    """Reduces the gradients of targets over the processes that train copies of their model.

    Args:
        processes: that have the copies.
        windows: of the targets, in the same order in all of them.
        dense: whether G is reduced and not R.
        tolerant: whether a target may have no gradient in some or all processes.
        bucket_bytes: how many bytes of low-rank gradients are sent at a time.
    """

    def __init__(
        self, processes: Processes, windows: Sequence[Window], *, dense: bool, tolerant: bool, bucket_bytes: int
    ) -> None:
        self.processes = processes
        self.dense = dense
        self._tolerant = tolerant
        self._bucket_bytes = bucket_bytes
        # Gradients come about in the reverse of the order in which modules were made, until the first pass tells.
        self._order = list(reversed(windows))
        self._order_is_known = False
        self._reduces = False
        self._accumulates = False
        self._sent: set[int] = set()  # what has been exchanged since a forward pass began
        self._has_begun = False  # a forward pass whose backward pass is to come
        self._is_part = False  # the present pass, of an accumulation
        self._forget_pass()

    def _forget_pass(self) -> None:
        self._queue: deque[Window] | None = None
        self._kinds: dict[int, Kind] = {}
        self._ready: dict[int, bool] = {}  # whether it has a gradient, of those that may be sent
        self._arrivals: dict[int, int] = {}  # how often autograd has come by, of those that have something to send
        self._expected: dict[int, int] = {}
        self._bucket: list[tuple[Window, Tensor]] = []
        self._in_flight: deque[_InFlight] = deque()
        self._last_mean: Any = None  # of a gradient for a refresh
        self._calls_back = False

    def send_weights(self) -> None:
        """Give all processes the weights that the first has, as DistributedDataParallel does with those it reduces."""
        parts = [part for window in self._order for part in elements_of(window.param.detach())]
        works = [self.processes.send_(part, 0) for part in parts]
        for work in works:
            work.wait()

    # ---- a pass

    @property
    def accumulates(self) -> bool:
        """Whether the present window has several micro-batches: what they bring is kept until a pass that reduces."""
        return self._accumulates

    def begin(self, *, reduces: bool, closes_window: bool) -> None:
        """Note that a forward pass has begun, with a backward pass to follow.

        Args:
            reduces: whether its gradients are to be reduced.
            closes_window: whether the optimizer's step comes next.

        Raises:
            RuntimeError: in the last one some targets had no gradient, and they have to.
        """
        self.end()
        for window in self._order:
            window.exchange = self  # a model may have several wrappers
        self._reduces = reduces
        self._has_begun = True
        self._sent.clear()
        self._is_part = not (reduces and closes_window)
        self._accumulates = self._accumulates or self._is_part

    def kind(self, window: Window) -> Kind | None:
        """What is exchanged for a target in the present backward pass; `None` where nothing is."""
        if self._queue is None:
            self._open()
        return self._kinds.get(id(window))

    def _open(self) -> None:
        """Work out what is exchanged in the present backward pass: the same in all processes."""
        # One of no forward pass in the wrapper may be of this process alone: it is not to wait for others.
        has_begun, self._has_begun = self._has_begun, False
        # What earlier micro-batches have left is R.
        self._queue = deque()
        for window in self._order if has_begun else ():
            usual: Kind = "whole" if self._is_dense(window) and not self._accumulates else "low_rank"
            refresh = window.refresh_is_due()
            # Autograd may come by again when all has been exchanged that was to be.
            if id(window) not in self._sent and window.param.requires_grad and (refresh or self._reduces):
                self._queue.append(window)
                # Random projections, which follow from a seed, are not sent.
                self._kinds[id(window)] = "refresh" if refresh and window.trained.basis_keys else usual

    def _is_dense(self, window: Window) -> bool:
        """Whether a target's G is reduced between refreshes, and not R."""
        return self.dense or window.trained.needs_gradient is not None

    def receive(self, window: Window) -> None:
        """Send what is in a target's `.grad`, when that is all of this pass and it is the target's turn.

        Raises:
            RuntimeError: it was sent in this pass before.
        """
        if self.kind(window) is None:
            return
        key = id(window)
        self._arrivals[key] = self._arrivals.get(key, 0) + 1
        self._expected.setdefault(key, window.passes.count())
        if key in self._ready:
            raise RuntimeError(
                f"A second gradient arrived for {window.trained.name} in one backward pass, after the first had been "
                "reduced over the processes. Reentrant checkpoints and find_unused_parameters=True do not go together: "
                "use gradient_checkpointing_kwargs={'use_reentrant': False}."
            )
        if self._arrivals[key] >= self._expected[key]:
            self._ready[key] = True
            self._advance()
        self._call_back()

    def notice(self) -> None:
        """Note that a backward pass is under way: it may bring none of the targets a gradient."""
        if torch.is_grad_enabled():
            return
        if self._queue is None:
            self._open()
        self._call_back()

    def _call_back(self) -> None:
        if self._queue and self._tolerant and not self._calls_back and not in_segment():
            self._calls_back = True
            Variable._execution_engine.queue_callback(self.end)

    def _advance(self) -> None:
        while self._queue and id(self._queue[0]) in self._ready:
            self._send(self._queue.popleft())
        while self._in_flight and self._in_flight[0].work.is_completed():
            self._finish_first()
        if self._queue is not None and not self._queue:
            self._close()

    def end(self) -> None:
        """Let the present pass be over: what has not come counts as zero.

        Raises:
            RuntimeError: it has to come.
        """
        if not self._queue:
            if self._queue is not None:
                self._close()
            return
        missing = [window for window in self._queue if id(window) not in self._ready]
        absent = [window for window in missing if id(window) not in self._arrivals]
        if absent and not self._tolerant:
            names = ", ".join(window.trained.name for window in absent[:3]) + (", ..." if len(absent) > 3 else "")
            self._forget_pass()
            raise RuntimeError(
                f"{len(absent)} target(s) had no gradient in this process: {names}. The others wait for theirs. "
                "Make the wrapper with find_unused_parameters=True (with a Trainer: ddp_find_unused_parameters=True), "
                "or freeze what the loss does not depend on."
            )
        for window in missing:
            self._ready[id(window)] = id(window) in self._arrivals
        self._advance()

    def _close(self) -> None:
        self._seal()
        while self._in_flight:
            self._finish_first()
        if self._reduces and not self._order_is_known:
            self._learn_order()
        self._forget_pass()
        # A backward pass with no forward pass before it is not reduced, as it is not by DistributedDataParallel.
        self._reduces = False

    def reset(self) -> None:
        """Forget what backward passes have brought; a forward pass may have begun the next."""
        if not self._has_begun:
            self._reduces = self._is_part = False
        self._sent.clear()
        self._forget_pass()
        self._accumulates = self._is_part

    def close(self) -> None:
        """Reduce no more."""
        self.reset()
        for window in self._order:
            window.exchange = None

    def start_window(self) -> None:
        """Begin the next window."""
        self._accumulates = False

    def _learn_order(self) -> None:
        """Take the order in which the first process's gradients have come for that of all."""
        self._order_is_known = True
        places = {id(window): place for place, window in enumerate(self._order)}
        came = [places[key] for key in self._arrivals]
        came += [place for place in range(len(self._order)) if place not in set(came)]
        order = torch.tensor(came, device=self._order[0].param.device)
        self.processes.send_(order, 0).wait()
        self._order = [self._order[place] for place in order.tolist()]

    # ---- sending

    def _send(self, window: Window) -> None:
        self._sent.add(id(window))
        kind = self._kinds[id(window)]
        if kind == "low_rank":
            self._add(window, window.low_rank_to_send())
            return
        self._seal()
        whole, dense = window.whole_to_send(), self._is_dense(window)
        if kind == "refresh" and not dense and waits_for_gradients(window.target, whole, self.processes):
            with torch.no_grad(), torch.autocast(whole.device.type, enabled=False):
                bases = window.target.with_probes(window.target.bases())
                low_rank = window.target.projected_by(whole, bases)
                if self._reduces:
                    self._add(window, low_rank)
                else:
                    window.use_low_rank(low_rank)  # which holds it
            return
        if kind == "whole":
            work, used = self.processes.mean_(whole), self._used([window])
            self._in_flight.append(_InFlight(work, lambda: window.use_whole(whole) if all(used()) else None))
        else:
            self._refresh(window, whole)

    def _add(self, window: Window, low_rank: Tensor) -> None:
        """Send a low-rank gradient, with others."""
        if self._bucket and not _alike(self._bucket[0][1], low_rank):
            self._seal()
        self._bucket.append((window, low_rank))
        if sum(part.nbytes for _, part in self._bucket) >= self._bucket_bytes:
            self._seal()

    def _seal(self) -> None:
        """Send the low-rank gradients that have come together."""
        if not self._bucket:
            return
        bucket, self._bucket = self._bucket, []
        flat = torch.cat([low_rank.reshape(-1) for _, low_rank in bucket])
        shapes = [low_rank.shape for _, low_rank in bucket]
        views = [view.view(shape) for view, shape in zip(flat.split([*map(math.prod, shapes)]), shapes, strict=True)]
        windows = [window for window, _ in bucket]
        for window, view in zip(windows, views, strict=True):
            window.hold_sent(view)
        del bucket
        work, used = self.processes.mean_(flat), self._used(windows)

        def finish() -> None:
            for window, view, is_used in zip(windows, views, used(), strict=True):
                if is_used:
                    window.use_low_rank(view)

        self._in_flight.append(_InFlight(work, finish))

    def _used(self, windows: Sequence[Window]) -> Callable[[], list[bool]]:
        """Whether any process has a gradient, for each of some targets; to be asked when all have sent theirs."""
        here = [self._ready[id(window)] for window in windows]
        if not self._tolerant:
            return lambda: here
        shares = torch.tensor([*map(float, here)], device=windows[0].param.device)
        work = self.processes.mean_(shares)

        def used() -> list[bool]:
            work.wait()
            if all(here):
                return here  # without waiting for the device
            return [share > 0 for share in shares.tolist()]

        return used

    def _refresh(self, window: Window, whole: Tensor) -> None:
        """Let one process take a new basis from a gradient, and send it to the others."""
        target, processes = window.target, self.processes
        if self._last_mean is not None:
            self._last_mean.wait()  # one gradient at a time
        used = self._used([window])
        owner = target.index % processes.size  # so that they share the work
        in_all = isinstance(window, WholeWindow)
        self._last_mean = processes.mean_(whole) if in_all else processes.mean_in_(whole, owner)
        if owner == processes.rank or in_all:
            self._last_mean.wait()
        refresh = SharedRefresh(target, whole, owner, processes, held=True)

        def finish() -> None:
            if not all(used()):
                return
            if isinstance(window, WholeWindow):
                window.use_refresh_of(refresh.made(), whole)
            else:
                window.use_refresh(refresh.made())

        self._in_flight.append(_InFlight(refresh.send(), finish))

    def _finish_first(self) -> None:
        arrived = self._in_flight.popleft()
        arrived.work.wait()
        with torch.no_grad(), torch.autocast(self._order[0].param.device.type, enabled=False):
            arrived.finish()


def _alike(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.device == b.device
