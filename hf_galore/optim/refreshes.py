"""Refreshes of an optimizer without hooks, shared among the processes of DistributedDataParallel.

All of them have the same gradients. Each takes the new bases of some targets, and sends them to the others: it takes a
part of the time, and the bases are the same also where processors round differently.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from ..backward.gradient import StandIn
from ..backward.passes import gone
from ..backward.processes import Processes, send_seeds
from ..backward.shared_refresh import SharedRefresh, waits_for_gradients
from ..integrations import ddp
from ..lowrank.projection import norm_of
from .bases import NewBasis
from .residual import TargetOfGradient
from .target import Target
from .trained import Trained

if TYPE_CHECKING:
    from .optimizer import GaLoreOptimizer


class SharedRefreshes:
    """The refreshes of one step.

    Args:
        processes: that have the same gradients.
        parameters: the optimizer's.
    """

    def __init__(self, processes: Processes, parameters: Sequence[Trained]) -> None:
        self._processes = processes
        self._due = [trained for trained in parameters if isinstance(trained, Target) and _is_whole(trained)]
        # Random projections, which follow from a seed, are the same everywhere as they are.
        self._due = [target for target in self._due if target.basis_keys and target.due() and not _waits(target)]
        self._made: dict[int, NewBasis] = {}

    def step(self, trained: Trained) -> bool:
        """One optimizer step of a target whose refresh is due; returns whether it is one.

        The targets come in the order of the optimizer.
        """
        if not self._due and id(trained) not in self._made:
            return False
        if self._due and self._due[0] is trained:
            self._compute()
        made = self._made.pop(id(trained), None)
        if made is None or not isinstance(trained, Target):
            return False
        if isinstance(trained, TargetOfGradient):
            gradient = trained.param.grad
            assert gradient is not None
            trained.use_refreshed(made, gradient, norm_of(gradient), spare=False)
            return True
        before = trained.use_basis(made, trained.new_version(), keep=False) if made.usable else None
        trained.update(made.low_rank, before=before)
        return True

    def _compute(self) -> None:
        """Compute the next refreshes, one in each process: no more of them are held at a time."""
        next_ones, self._due = self._due[: self._processes.size], self._due[self._processes.size :]
        refreshes: list[tuple[Target, SharedRefresh]] = []
        for owner, target in enumerate(next_ones):
            gradient = target.param.grad
            assert gradient is not None
            refreshes.append((target, SharedRefresh(target, gradient, owner, self._processes, held=False)))
        works = [refresh.send() for _, refresh in refreshes]
        for work, (target, refresh) in zip(works, refreshes, strict=True):
            work.wait()
            self._made[id(target)] = refresh.made()


def _waits(target: Target) -> bool:
    gradient = target.param.grad
    return gradient is not None and waits_for_gradients(target, gradient, None)


def _is_whole(trained: Trained) -> bool:
    """Whether a parameter has a gradient, and it is not one of hooks."""
    gradient = trained.param.grad
    return gradient is not None and not isinstance(gradient, StandIn) and not gradient.is_sparse


def share_when_wrapped(optimizer: GaLoreOptimizer, model: nn.Module) -> None:
    """Let an optimizer share its refreshes where passes of its model are reduced.

    Args:
        optimizer: without hooks; referred to weakly.
        model: which may be the wrapper itself.
    """
    if not ddp.may_come():
        return
    inner = ddp.inside(model)
    look = _Look(weakref.ref(optimizer))
    look.handle = inner.register_forward_pre_hook(look)


class _Look:
    """A forward pre-hook that tells an optimizer which processes will have the gradients of its next step, if any do.

    The last pass before a step decides. Not those of a pass that is not reduced, nor where processes may stop earlier
    than others (`join()`) or reduce in another way.
    """

    def __init__(self, optimizer: Callable[[], GaLoreOptimizer | None]) -> None:
        self._optimizer = optimizer
        self._processes: Processes | None = None
        self.handle: Any = None

    def __call__(self, module: nn.Module, args: Any) -> None:
        optimizer, wrapper = self._optimizer(), ddp.active()
        if optimizer is None:
            if self.handle is not None:
                self.handle.remove()
            return
        if wrapper is None or not ddp.trains_next():
            return
        alike = ddp.reduces_next(wrapper) and ddp.why_not(wrapper) is None and not ddp.left_out(wrapper)
        if alike and (self._processes is None or self._processes.group is not wrapper.process_group):
            self._processes = Processes(wrapper.process_group)
            send_seeds(optimizer.param_groups, self._processes)
        optimizer.processes = self._processes if alike else None

    def __reduce__(self) -> Any:
        return _Look, (gone,)  # weak references cannot be pickled
