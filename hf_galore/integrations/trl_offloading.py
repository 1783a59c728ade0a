"""What a plan puts in the place of TRL's `OffloadActivations`: activations on the host, in memory that is not a card's.

TRL copies what autograd saves to pinned memory of the host on a stream of its own, and back in the backward pass. Here
the same decisions are taken, and nothing is copied: what has left the card is not there, and comes back as a new
tensor.

Source: TRL 1.16, `trl/models/activation_offloading.py` (`OffloadActivations`, with streams and pinned memory).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from .signatures import moved

_MODULE = "trl.models.activation_offloading"
_CLASS = "OffloadActivations"

PARTS: dict[str, str] = {
    "__init__": "(self, use_pin_memory=True, use_streams=True, min_offload_size=1024, max_fwd_stash_size=5)",
    "update_model_params": "(self, model)",
}


def moved_offloading() -> list[str]:
    """What this TRL no longer has as it is needed here, in words; empty where all is well."""
    import trl.models.activation_offloading as module

    return moved(getattr(module, _CLASS, None), _CLASS, PARTS)


def offloading() -> list[tuple[Any, str, Any]]:
    """Owner, name and replacement of what moves activations to the host; empty where TRL is not installed."""
    if importlib.util.find_spec("trl") is None:
        return []
    import trl.models.activation_offloading as module

    return [(module, _CLASS, Offloaded)]


class _OnHost(NamedTuple):
    """What was saved of a tensor that has left the card."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    elements: int
    """Of its storage: fewer than the shape's where a dimension is repeated."""
    dtype: torch.dtype
    device: torch.device


class Offloaded(saved_tensors_hooks):  # type: ignore[misc, unused-ignore]
    """Saved tensors that are on the card only as long as TRL's `OffloadActivations` has them there.

    Takes its arguments. Pinned or not, the host's memory is not of interest here.
    """

    def __init__(
        self,
        use_pin_memory: bool = True,
        use_streams: bool = True,
        min_offload_size: int = 1024,
        max_fwd_stash_size: int = 5,
    ) -> None:
        self._streams = use_streams
        self._least_bytes = min_offload_size
        self._stash_size = max_fwd_stash_size
        self._param_storages: set[int] = set()
        self._forget()
        super().__init__(self._pack, self._unpack)

    def _forget(self) -> None:
        self._count = 0
        self._saved: dict[int, Tensor | _OnHost] = {}
        self._leaving: dict[int, Tensor] = {}  # alive until their copies are certainly made
        self._keys: dict[int, tuple[int, torch.dtype]] = {}  # of what leaves, by which a second use is known
        self._back: dict[int, Tensor] = {}  # alive until the node that asked for them is done
        self._node: Any = None

    def __enter__(self) -> None:
        self._forget()
        super().__enter__()

    def __exit__(self, *error: Any) -> None:
        self._forget()
        super().__exit__(*error)

    def update_model_params(self, model: nn.Module) -> None:
        """Take note of the parameters, which stay where they are."""
        self._param_storages = {param.untyped_storage()._cdata for param in model.parameters()}

    def _pack(self, tensor: Tensor) -> int:
        self._count += 1
        number, storage = self._count, tensor.untyped_storage()._cdata
        key = (storage + tensor.storage_offset(), tensor.dtype)
        stays = (
            (self._streams and key in self._keys.values())
            or tensor.element_size() * tensor.nelement() < self._least_bytes
            or isinstance(tensor, (nn.Parameter, nn.Buffer))
            or storage in self._param_storages
        )
        if stays:
            self._saved[number] = tensor
            return number
        repeats = 0 in tensor.stride()
        if not repeats and tensor.storage_offset() != 0:
            tensor = tensor.clone(memory_format=torch.contiguous_format)
        elif not repeats:
            tensor = tensor.contiguous()
        elements = tensor.untyped_storage().nbytes() // tensor.element_size() if repeats else tensor.nelement()
        self._saved[number] = _OnHost(tuple(tensor.shape), tensor.stride(), elements, tensor.dtype, tensor.device)
        if self._streams:
            self._let_go(number - self._stash_size)
            self._leaving[number], self._keys[number] = tensor, key
        return number

    def _let_go(self, last: int) -> None:
        """Drop what began to leave so long ago that it has arrived."""
        for number in [number for number in self._leaving if number <= last]:
            del self._leaving[number]
            self._keys.pop(number, None)

    def _unpack(self, number: int) -> Tensor:
        saved = self._saved.pop(number)
        self._keys.pop(number, None)
        if isinstance(saved, Tensor):
            return saved
        if not self._streams:
            return _brought_back(saved)
        node, before = torch._C._current_autograd_node(), list[int]()
        if node != self._node:
            self._node, before = node, list(self._back)
        if number in self._leaving:
            tensor, uses = self._leaving[number], None
        else:
            tensor = self._back[number] = _brought_back(saved)
            uses = _uses(tensor)
        node.register_hook(self._after(number, uses, before))
        return tensor

    def _after(self, number: int, uses: int | None, before: list[int]) -> Callable[[Any, Any], None]:
        """What is let go once a node is done: what it does not hold any longer, and what nodes before it asked for."""

        def hook(inputs: Any, outputs: Any) -> None:
            if uses is not None and number in self._back and _uses(self._back[number]) > uses:
                del self._back[number]  # somebody else holds it, and knows when to let go
            self._let_go(self._count)
            for one in before:
                self._back.pop(one, None)

        return hook


def _uses(tensor: Tensor) -> int:
    return int(torch._C._storage_Use_Count(tensor.untyped_storage()._cdata))


def _brought_back(saved: _OnHost) -> Tensor:
    flat = torch.empty(saved.elements, dtype=saved.dtype, device=saved.device)
    return flat.as_strided(saved.shape, saved.stride)
