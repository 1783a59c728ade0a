"""What is in memory while a model trains: every tensor's storage, from its first operation to its last reference.

Counts the same for real tensors and for fake ones (`hf_galore.plan.fakes`), as far as operations allocate: what a
kernel uses inside, as a work space, is not seen.
"""

from __future__ import annotations

import functools
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..backward.gradient import StandIn, in_backward
from ..int8 import Int8Weight, elements_of
from .accumulation import ADD, ADD_IN_PLACE, adds_in_place, uses_by_one

WRAPPERS = (StandIn, Int8Weight)
"""Tensors that have no storage of their own, and answer operations with operations on what they hold."""

# CUDA's allocator hands out multiples of this many bytes.
GRANULE = 512

FORWARD, BACKWARD = "forward", "backward"

_DEVICE = torch.ops.prim.device.default

# What a storage is when nobody has said it.
ACTIVATIONS, TEMPORARIES = "activations", "temporaries"


class Peak(NamedTuple):
    """The most that was alive at a time."""

    nbytes: int
    phase: str
    event: int
    """How many births and deaths had been recorded; for `StorageTracker.breakdown`."""


class Allocation(NamedTuple):
    """Storages of one kind, for looking closer at a peak."""

    label: str
    operation: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    number: int
    nbytes: int


class _Storage:
    __slots__ = ("dtype", "label", "nbytes", "operation", "phase", "recomputed", "shape")

    def __init__(self, nbytes: int, tensor: Tensor, operation: Any, phase: str, recomputed: bool) -> None:
        self.nbytes = nbytes
        self.operation = operation
        self.shape = tuple(tensor.shape)
        self.dtype = tensor.dtype
        self.phase = phase
        self.recomputed = recomputed
        self.label: str | None = None


class StorageTracker(TorchDispatchMode):
    """Records the births and deaths of storages on one device while it is entered.

    Labels may come at any time of a storage's life and hold for all of it: a gradient is one from the moment that its
    matrix product allocates it. A storage without a label is an activation if it was alive when a backward pass
    began, or was made in recomputing a checkpointed part; else a temporary.

    Args:
        device: where storages count; those elsewhere do not.
        call: calls an operation with its arguments; by default just that.
    """

    def __init__(self, device: torch.device, call: Callable[[Any, Any, Any], Any] | None = None) -> None:
        super().__init__()
        self._device = device
        self._call = call or (lambda func, args, kwargs: func(*args, **kwargs))
        self._phase: Callable[[], str] = lambda: FORWARD
        self._after_backward: Callable[[], None] = lambda: None
        self._live: dict[int, int] = {}  # a storage's address to its index
        self._references: dict[int, Any] = {}
        self._storages: list[_Storage] = []
        self._events: list[tuple[int, int]] = []  # index, bytes born or, below zero, dead
        self._bytes = 0
        self._peaks: dict[str, Peak] = {}  # by phase
        self._in_backward = False
        self._modules = 0  # whose forward is running
        self._handles: list[Any] = []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Nothing is compiled here, and keeping the compiler off would take longer than all else that is done.
        return False

    def __enter__(self) -> StorageTracker:
        self._handles = [
            register_module_forward_pre_hook(self._enter_module),
            register_module_forward_hook(self._leave_module, always_call=True),  # checkpoints leave by an exception
        ]
        uses_by_one()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for handle in self._handles:
            handle.remove()

    def _enter_module(self, *_: Any) -> None:
        self._modules += 1

    def _leave_module(self, *_: Any) -> None:
        self._modules -= 1

    def use_phases(self, phase: Callable[[], str], after_backward: Callable[[], None] = lambda: None) -> None:
        """Ask `phase` at each operation what is going on; while autograd runs it is the backward pass anyhow.

        Args:
            phase: gives the phase's name.
            after_backward: called at the first operation after a backward pass.
        """
        self._phase, self._after_backward = phase, after_backward

    @property
    def live_bytes(self) -> int:
        """What is alive now."""
        return self._bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _DEVICE:  # asked half of the time, and nothing is allocated
            return args[0].device
        if any(issubclass(kind, WRAPPERS) for kind in types):
            return NotImplemented  # it answers with operations on what it holds, which are seen
        running = in_backward()
        if running and not self._in_backward:
            self._label_activations()
        elif self._in_backward and not running:
            self._after_backward()
        self._in_backward = running
        if running and func is ADD and adds_in_place(args, kwargs or {}):
            func = ADD_IN_PLACE
        out = self._call(func, args, kwargs or {})
        for leaf in (out,) if isinstance(out, Tensor) else tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._see(leaf, func)
        return out

    def label(self, tensors: Iterable[Tensor], label: str) -> None:
        """Say what the storages of `tensors` are, seen before or not; overrides what was said before."""
        for tensor in tensors:
            for inner in elements_of(tensor):
                storage = self._see(inner, "")
                if storage is not None:
                    storage.label = label

    def _see(self, tensor: Tensor, operation: Any) -> _Storage | None:
        if isinstance(tensor, WRAPPERS):
            return None
        if tensor.device != self._device:
            return None
        storage = tensor.untyped_storage()
        key = storage._cdata
        nbytes = -(-storage.nbytes() // GRANULE) * GRANULE
        index = self._live.get(key)
        if index is None:
            if nbytes == 0:
                return None
            index = len(self._storages)
            recomputed = self._in_backward and self._modules > 0
            self._storages.append(_Storage(nbytes, tensor, operation, self._present_phase(), recomputed))
            self._live[key] = index
            self._references[key] = weakref.ref(storage, functools.partial(self._dead, key))
            self._record(index, nbytes)
        elif nbytes != self._storages[index].nbytes:  # resized
            self._record(index, nbytes - self._storages[index].nbytes)
            self._storages[index].nbytes = nbytes
        return self._storages[index]

    def _dead(self, key: int, _: Any) -> None:
        del self._references[key]
        index = self._live.pop(key)
        self._record(index, -self._storages[index].nbytes)

    def _present_phase(self) -> str:
        return BACKWARD if self._in_backward else self._phase()

    def _record(self, index: int, nbytes: int) -> None:
        self._bytes += nbytes
        self._events.append((index, nbytes))
        if nbytes > 0:
            phase = self._present_phase()
            peak = self._peaks.get(phase)
            if peak is None or self._bytes > peak.nbytes:
                self._peaks[phase] = Peak(self._bytes, phase, len(self._events))

    def _label_activations(self) -> None:
        for index in self._live.values():
            storage = self._storages[index]
            if storage.label is None and storage.phase == FORWARD:
                storage.label = ACTIVATIONS

    # ---- what there is to report

    def events(self) -> Sequence[tuple[int, int]]:
        """What was recorded, in its order: the number of a storage, and by how many bytes it grew or shrank."""
        return self._events

    def peaks(self) -> list[Peak]:
        """The peak of each phase, highest first."""
        return sorted(self._peaks.values(), key=lambda peak: -peak.nbytes)

    def peaks_by(self, shares: Mapping[str, float]) -> list[Peak]:
        """The peak of each phase where of some labels only a share counts, as where others hold the rest of them.

        Args:
            shares: by label; all of the others counts.

        Returns:
            Peaks whose bytes are the shares, highest first.
        """
        found: dict[str, Peak] = {}
        total = 0.0
        for number, (index, nbytes) in enumerate(self._events, 1):
            total += nbytes * shares.get(self._label_of(index), 1.0)
            phase = self._storages[index].phase
            if nbytes > 0 and (phase not in found or total > found[phase].nbytes):
                found[phase] = Peak(int(total), phase, number)
        return sorted(found.values(), key=lambda peak: -peak.nbytes)

    def breakdown(self, event: int | None = None) -> dict[str, int]:
        """Live bytes by label after so many events, largest first; now, where none is given."""
        totals: dict[str, int] = defaultdict(int)
        for index, nbytes in self._events[:event]:
            totals[self._label_of(index)] += nbytes
        return {label: nbytes for label, nbytes in sorted(totals.items(), key=lambda item: -item[1]) if nbytes}

    def allocations(self, event: int | None = None) -> list[Allocation]:
        """What was alive after so many events, storages of the same origin together; largest first."""
        alive: dict[int, int] = defaultdict(int)
        for index, nbytes in self._events[:event]:
            alive[index] += nbytes
        found: dict[tuple[str, str, Sequence[int], torch.dtype], list[int]] = defaultdict(list)
        for index, nbytes in alive.items():
            if nbytes:
                storage = self._storages[index]
                found[self._label_of(index), str(storage.operation), storage.shape, storage.dtype].append(nbytes)
        return sorted(
            (Allocation(*key, len(each), sum(each)) for key, each in found.items()),  # type: ignore[arg-type]
            key=lambda allocation: -allocation.nbytes,
        )

    def _label_of(self, index: int) -> str:
        storage = self._storages[index]
        if storage.label is not None:
            return storage.label
        return ACTIVATIONS if storage.recomputed else TEMPORARIES
