"""A weight that is kept in 8 bits: a tensor to torch, of a floating-point dtype, that has no element in it.

It may be the `weight` of an `nn.Linear`, which computes with tiles of it. What reads it otherwise gets its values in
its dtype; what would change it in place is refused, but for what sets all of it (`copy_`, initialisation): an update
that is smaller than a step of 8 bits would be lost. This package's optimizers round theirs at random, so that it
arrives on average.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.utils._pytree import tree_map_only

from ..lowrank.projection import at_least_float32
from .flat import FlatValues
from .format import Int8Blocks, empty_blocks, read_blocks, write_blocks_
from .layer import linear
from .products import tiles

DTYPES = (torch.bfloat16, torch.float32, torch.float64)
"""That an int8 weight may have to others: those whose range is not smaller than its own."""
_aten = torch.ops.aten
# Set all elements, whatever they were.
_SETTERS = {
    _aten.zero_.default,
    _aten.fill_.Scalar,
    _aten.fill_.Tensor,
    _aten.normal_.default,
    _aten.uniform_.default,
}
_SHARDING = {_aten.split, _aten.split_with_sizes, _aten.chunk}
_NEW = {_aten.new_zeros, _aten.new_empty, _aten.new_full, _aten.new_ones, _aten.new_empty_strided}
_LIKE = {
    _aten.zeros_like,
    _aten.empty_like,
    _aten.full_like,
    _aten.ones_like,
    _aten.rand_like,
    _aten.randn_like,
}


class Int8Weight(Tensor):
    """A matrix m × n in MXINT8 (`hf_galore.int8.format`).

    Args:
        codes: int8, m × n.
        exponents: uint8, m × ⌈n/32⌉.
        dtype: that it has to others.
        requires_grad: as of any tensor.

    Raises:
        TypeError: the dtype is another than bfloat16, float32 and float64, all of which have its values exactly.
    """

    codes: Tensor
    exponents: Tensor

    @staticmethod
    def __new__(
        cls,
        codes: Tensor,
        exponents: Tensor | None = None,
        dtype: torch.dtype = torch.bfloat16,
        *,
        requires_grad: bool = False,
    ) -> Int8Weight:
        if exponents is None:
            raise TypeError(
                "An int8 weight is made of codes and exponents, and of values by Int8Weight.from_float. accelerate's "
                "load_checkpoint_and_dispatch, cpu_offload and disk_offload, which make one of values alone, do not "
                "know it: load by from_pretrained or load_state_dict, without offloading."
            )
        if dtype not in DTYPES:
            raise TypeError(
                f"An int8 weight is a tensor of {', '.join(map(str, DTYPES))} to others, and {dtype} has not its "
                f"range. `weight.dequantized({dtype})` has its values in that. Of a model that was to be cast, what "
                "came before this weight may have been: model.to(torch.bfloat16) takes it back."
            )
        made = torch.Tensor._make_wrapper_subclass(
            cls, codes.shape, dtype=dtype, device=codes.device, requires_grad=requires_grad
        )
        made.codes, made.exponents = codes, exponents
        return made

    @classmethod
    def empty(
        cls, shape: tuple[int, int], dtype: torch.dtype = torch.bfloat16, device: torch.device | str | None = None
    ) -> Int8Weight:
        """One of zeros."""
        return cls(*empty_blocks(shape, device), dtype)

    @classmethod
    @torch.no_grad()
    def from_float(cls, values: Tensor, dtype: torch.dtype | None = None) -> Int8Weight:
        """A matrix in 8 bits, each element rounded to the nearest, a tile at a time.

        Args:
            values: m × n, floating-point.
            dtype: that of the result to others; that of the values by default.
        """
        made = cls.empty(cast("tuple[int, int]", tuple(values.shape)), dtype or values.dtype, values.device)
        made.assign_(values)
        return made

    # ---- its values

    @property
    def blocks(self) -> Int8Blocks:
        """Its codes and exponents."""
        return Int8Blocks(self.codes, self.exponents)

    def rows(self, part: slice, dtype: torch.dtype) -> Tensor:
        """The values of some rows, a new tensor."""
        return read_blocks(Int8Blocks(self.codes[part], self.exponents[part]), dtype)

    def write_rows(self, part: slice, values: Tensor, generator: torch.Generator | None = None) -> None:
        """Set some rows, rounded to the nearest, or at random; `values` of float32 are used up."""
        write_blocks_(Int8Blocks(self.codes[part], self.exponents[part]), values, generator)
        increment_version(self)

    def dequantized(self, dtype: torch.dtype | None = None) -> Tensor:
        """All values, in its dtype by default: a tensor of the whole shape, through which no gradient comes back."""
        return read_blocks(self.blocks, dtype or self.dtype)

    @torch.no_grad()
    def assign_(self, values: Tensor) -> Int8Weight:
        """Set all of it, rounded to the nearest."""
        if isinstance(values, Int8Weight):
            self.codes.copy_(values.codes)
            self.exponents.copy_(values.exponents)
            increment_version(self)
            return self
        precise = at_least_float32(values.dtype)
        values = values.expand(self.shape)
        for part in tiles(len(self), self.shape[-1]):
            self.write_rows(part, values[part].to(self.device, precise, copy=True))
        return self

    # ---- what torch asks

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Int8Weight({tuple(self.shape)}, {self.dtype}, {self.device}, requires_grad={self.requires_grad})"

    # No `__tensor_flatten__`: of tensors that have it `Module.to` exchanges all that torch knows of a parameter, the
    # hooks on it too, and a model is moved once more after a layerwise optimizer has been made.

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is Tensor.numpy:  # TRL's DPOTrainer takes a hash of a model so
            return FlatValues.of(args[0].dequantized()).numpy(*args[1:], **(kwargs or {})).reshape(args[0].shape)
        kwargs = kwargs or {}
        if func is F.linear:
            return linear(*args, **kwargs)
        if func == _SET_DATA:
            return _set_data(*args)
        if func is Tensor.share_memory_:  # torch would look for a storage
            return _share_memory_(*args)
        if func is Tensor.storage:  # safetensors asks for it
            raise TypeError(
                "An int8 weight has no storage of its own, which safetensors writes. Save a transformers model, all of "
                "it, by save_pretrained, any state dict by torch.save, or the values, which `weight.dequantized()` "
                "has. A layer of PEFT's modules_to_save stays a float if modules_to_not_convert names it."
            )
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _dispatch(func, args, kwargs or {})


def is_int8(tensor: Any) -> bool:
    """Whether a tensor, or a parameter, is kept in 8 bits."""
    return isinstance(tensor, Int8Weight)


def elements_of(tensor: Tensor) -> tuple[Tensor, ...]:
    """What of a tensor has elements: itself, or its codes and exponents."""
    return tuple(tensor.blocks) if isinstance(tensor, Int8Weight) else (tensor,)


torch.serialization.add_safe_globals([Int8Weight])


_SET_DATA = cast("Any", Tensor.data).__set__


def _share_memory_(weight: Int8Weight) -> Int8Weight:
    for part in weight.blocks:
        part.share_memory_()
    return weight


def _set_data(weight: Int8Weight, other: Tensor) -> None:
    """As `weight.data = other`, by which `Module.to` moves and casts parameters."""
    if not isinstance(other, Int8Weight):
        raise TypeError(
            f"The data of an int8 weight can be those of another, but were given a {type(other).__name__} of "
            f"{other.dtype}. `weight.copy_(values)` sets its values, rounded to 8 bits. What would be lost so "
            "(adapters that are merged, those that PEFT begins with a part of the weight) goes into model.dequantize()."
        )
    with torch._C.DisableTorchFunctionSubclass():
        _SET_DATA(weight, other)
    weight.codes, weight.exponents = other.codes, other.exponents


# ---- operations


def _dispatch(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    packet = func.overloadpacket
    first: Any = args[0] if args else None
    if packet in (_aten.detach, _aten.alias):
        return Int8Weight(first.codes, first.exponents, first.dtype)
    if packet is _aten.clone:
        return Int8Weight(first.codes.clone(), first.exponents.clone(), first.dtype)
    if packet is _aten._to_copy and isinstance(first, Int8Weight):
        return _to_copy(first, **kwargs)
    if packet is _aten.copy_:
        return _copy_(*args, **kwargs)
    if func is _aten.view.dtype:
        _refuse(func, args, kwargs)
    if packet in (_aten.view, _aten._unsafe_view, _aten.expand) and tuple(args[1]) == tuple(first.shape):
        return Int8Weight(first.codes, first.exponents, first.dtype)
    if packet is _aten.view and tuple(args[1]) in ((-1,), (first.numel(),)):
        return FlatValues.of(first.dequantized())
    if packet is _aten.empty_like and kwargs.get("dtype") in (None, first.dtype):
        return Int8Weight.empty(tuple(first.shape), first.dtype, kwargs.get("device") or first.device)
    if packet in _NEW:
        return func(torch.empty(0, dtype=first.dtype, device=first.device), *args[1:], **kwargs)
    if packet in _LIKE:
        like = torch.empty(1, dtype=first.dtype, device=first.device).expand(first.shape)
        return func(like, *args[1:], **{**kwargs, "memory_format": torch.contiguous_format})
    if func in _SETTERS and isinstance(first, Int8Weight):
        for part in tiles(len(first), first.shape[-1]):
            first.write_rows(part, func(first.codes[part].to(at_least_float32(first.dtype)), *args[1:], **kwargs))
        return first
    _refuse(func, args, kwargs)
    plain = tree_map_only(Int8Weight, Int8Weight.dequantized, (args, kwargs))
    return func(*plain[0], **plain[1])


def _to_copy(
    weight: Int8Weight, *, dtype: torch.dtype | None = None, device: Any = None, non_blocking: bool = False, **_: Any
) -> Tensor:
    dtype = dtype or weight.dtype
    if not (dtype.is_floating_point or dtype.is_complex):  # which nobody casts a model to
        return weight.dequantized().to(device=device, dtype=dtype)
    codes, exponents = (part.to(device=device, non_blocking=non_blocking, copy=True) for part in weight.blocks)
    return Int8Weight(codes, exponents, dtype)


def _copy_(into: Tensor, other: Tensor, non_blocking: bool = False) -> Tensor:
    if isinstance(into, Int8Weight):
        return into.assign_(other)
    assert isinstance(other, Int8Weight)
    if tuple(into.shape) != tuple(other.shape):
        return into.copy_(other.dequantized())
    for part in tiles(len(other), other.shape[-1]):
        into[part] = other.rows(part, other.dtype).to(into.device)
    return into


def _refuse(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse what would change a weight, or look like a view of one.

    With a `RuntimeError`: of a `TypeError` in an operator Python thinks that the result may be had by other means. For
    `weight -= update` it makes one and gives it the name of the weight, which stays as it is; of `weight @ x` it says
    that the operands are unsupported.
    """
    if func.namespace == "c10d":
        raise TypeError(
            f"{func} sends tensors that have elements, and an int8 weight has none: send its `codes` and `exponents`. "
            "DistributedDataParallel sends a model's weights by itself."
        )
    if func._schema.is_mutable:
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write and _has_int8(value):
                raise RuntimeError(
                    f"{func} would change an int8 weight in place, and what is smaller than a step of 8 bits would be "
                    "lost. hf_galore's optimizers train such weights, rounding at random (with a Trainer "
                    'optim="galore_adamw_8bit_layerwise" and its kin, in a loop hf_galore.make_optimizer), and no '
                    "others do; `weight.copy_(values)` sets one. An average of weights begins with "
                    "`weight.dequantized(torch.float32)`, a tensor that can be changed; adapters are merged after "
                    "model.dequantize()."
                )
        if _has_int8(kwargs.get("out")):
            raise RuntimeError(f"{func} cannot write to an int8 weight: `weight.copy_(values)` sets one.")
    elif func.overloadpacket in _SHARDING:
        raise TypeError(
            f"{func} would give views of an int8 weight, which has none. FSDP2 (fully_shard), DTensor and tensor "
            "parallelism shard weights so, and int8 weights have to be whole: train them on one card, or under "
            "DistributedDataParallel; or load the model without weight_bits=8."
        )
    elif any(argument.alias_info is not None for argument in func._schema.arguments):
        raise RuntimeError(
            f"{func} would give a view, and an int8 weight has none. `weight.dequantized()` has its values, through "
            "which it gets no gradient; `torch.nn.functional.linear` multiplies with it, and has one. A layer whose "
            "weight a model takes apart can stay as it is: name it in modules_to_not_convert."
        )


def _has_int8(value: Any) -> bool:
    return any(map(is_int8, value)) if isinstance(value, (list, tuple)) else is_int8(value)
