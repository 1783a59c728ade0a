"""Operations on fake tensors, remembered by shapes: a model's layers repeat the same thousand of them.

`FakeTensorMode` has such a cache of its own, but takes a fifth of a millisecond to look something up. A plan is some
200,000 operations.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode


class _Fresh(NamedTuple):
    """A tensor with a storage of its own."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


class _View(NamedTuple):
    """A tensor on the storage of an argument."""

    argument: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    device: torch.device


class _Argument(NamedTuple):
    """An argument itself, as operations in place return it."""

    argument: int


_Output = _Fresh | _View | _Argument | torch.dtype | None
_aten = torch.ops.aten
_PLAIN = (int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)


# What is known holds no tensors, and is true of every plan: the next one begins with it.
_known: dict[Any, tuple[type, list[_Output]]] = {}
_MOST_KNOWN = 200_000  # of some 500 bytes


class ShapeCache:
    """Answers operations that it has seen with arguments of the same shapes, strides, dtypes and devices.

    Args:
        mode: that the tensors belong to.
    """

    def __init__(self, mode: FakeTensorMode) -> None:
        self._mode = mode

    def call(self, func: Any, args: Any, kwargs: Any) -> Any:
        """What `func(*args, **kwargs)` gives."""
        tensors: list[FakeTensor] = []
        key = None if _changes_shape(func) else self._key(func, args, kwargs, tensors)
        if key is None:
            return func(*args, **kwargs)
        known = _known.get(key)
        if known is None:
            result = func(*args, **kwargs)
            outputs = self._describe(result, tensors)
            if outputs is not None:
                if len(_known) >= _MOST_KNOWN:
                    _known.clear()
                _known[key] = (type(result) if isinstance(result, (tuple, list)) else Tensor, outputs)
            return result
        kind, outputs = known
        made = [self._make(output, tensors) for output in outputs]
        return made[0] if kind is Tensor else kind(made)

    def _key(self, func: Any, args: Any, kwargs: Any, tensors: list[FakeTensor]) -> Any:
        """What the result depends on, and the tensors among the arguments; `None` where that is not known."""
        parts: list[Any] = [func, torch.get_default_dtype()]  # which new tensors have where none is given
        if not (self._add(args, parts, tensors) and self._add(kwargs.values(), parts, tensors)):
            return None
        return (*parts, *kwargs)

    def _add(self, values: Iterable[Any], parts: list[Any], tensors: list[FakeTensor]) -> bool:
        for value in values:
            if isinstance(value, FakeTensor):
                # A number that is known makes a result that is known: torch has to see to that.
                if value.constant is not None or value.fake_mode is not self._mode:
                    return False
                tensors.append(value)
                parts.append((value.shape, value.stride(), value.storage_offset(), value.dtype, value.device))
            elif isinstance(value, _PLAIN):
                parts.append((type(value), value))  # 1, 1.0 and True are equal
            elif isinstance(value, torch.Generator):
                parts.append((torch.Generator, value.device))  # what it has drawn so far is of no shape
            elif isinstance(value, (list, tuple)):
                parts.append(len(value))
                if not self._add(value, parts, tensors):
                    return False
            else:
                return False
        return True

    def _describe(self, result: Any, tensors: list[FakeTensor]) -> list[_Output] | None:
        outputs: list[_Output] = []
        storages = [tensor.untyped_storage()._cdata for tensor in tensors]
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if value is None:
                outputs.append(None)
                continue
            if isinstance(value, torch.dtype):
                outputs.append(value)
                continue
            if not isinstance(value, FakeTensor) or value.constant is not None or value.layout != torch.strided:
                return None
            same = [index for index, tensor in enumerate(tensors) if tensor is value]
            storage = value.untyped_storage()
            if same:
                outputs.append(_Argument(same[0]))
            elif storage._cdata in storages:
                outputs.append(
                    _View(
                        storages.index(storage._cdata),
                        tuple(value.shape),
                        value.stride(),
                        int(value.storage_offset()),
                        value.dtype,
                        value.device,
                    )
                )
            else:
                outputs.append(_Fresh(tuple(value.shape), value.stride(), value.dtype, value.device))
        return outputs

    def _make(self, output: _Output, tensors: list[FakeTensor]) -> FakeTensor | torch.dtype | None:
        if output is None or isinstance(output, torch.dtype):
            return output
        if isinstance(output, _Argument):
            return tensors[output.argument]
        if isinstance(output, _Fresh):
            with torch._C._DisableTorchDispatch():
                meta = torch.empty_strided(output.shape, output.stride, dtype=output.dtype, device="meta")
        else:
            storage = tensors[output.argument].untyped_storage()
            with torch._C._DisableTorchDispatch():
                meta = torch.empty(0, dtype=output.dtype, device="meta")
                meta.set_(storage, output.offset, output.shape, output.stride)
        return FakeTensor(self._mode, meta, output.device)


@functools.cache
def _changes_shape(func: Any) -> bool:
    """Whether an operation gives an argument another shape or storage: that has to happen each time."""
    return torch.Tag.inplace_view in func.tags or func.overloadpacket in (_aten.set_, _aten.resize_)
