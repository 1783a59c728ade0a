"""Training with fake tensors, which have a shape, a type and a device, but no numbers: a 7B model needs no memory.

`fake_training()` is the place for all that has to be answered or put aside for that: reads of numbers that are not
there, weights and checkpoints that are not to be loaded or written, and choices that libraries make by the device.
What is replaced acts on the whole process, other threads too; what belongs to transformers, TRL, PEFT and bitsandbytes
is in `hf_galore.integrations.stand_ins`.
"""

from __future__ import annotations

import contextlib
import functools
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, cast
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_map_only

from ..int8 import Int8Weight, products, update, weight
from ..int8.products import tiles
from ..integrations.stand_ins import without_numbers
from ..integrations.triton_launches import without_launches
from ..kernels import where as kernel_choice
from ..lowrank import float8, nonfinite, quantize, refresh, rounding
from ..lowrank.rounding import parts
from ..rules import adam_8bit
from .shape_cache import ShapeCache
from .tracking import WRAPPERS

Target = Literal["cuda", "cpu"]

_aten = torch.ops.aten


class Fakes:
    """What `fake_training()` gives: a way from real batches to fake ones, and answers to what is asked of fakes."""

    def __init__(self, mode: FakeTensorMode) -> None:
        self._mode = mode
        self._cache = ShapeCache(mode)
        self._documents = False
        self._padded = False

    def batch(self, batch: Any) -> Any:
        """A batch with fakes for its tensors; the answers to questions about the real one are kept."""
        if isinstance(batch, Mapping):
            positions, mask = batch.get("position_ids"), batch.get("attention_mask")
            with _disable_current_modes():
                self._documents = positions is not None and bool((positions == 0).sum() > len(positions))
                self._padded = mask is not None and not bool(mask.all())
        return tree_map_only(Tensor, self._mode.from_tensor, batch)

    def call(self, func: Any, args: Any, kwargs: Any) -> Any:
        """What an operation gives. Numbers that are not there are those of a full batch and finite gradients."""
        if func is _aten._local_scalar_dense.default:
            # By far the most frequent question: no need to let it fail first, nor to ask torch for what is at hand.
            constant = args[0].constant
            return _answer(func, args) if constant is None else _number(constant)
        if func is _aten._grouped_mm.default:
            return _grouped_product(*args, **kwargs)
        try:
            return self._cache.call(func, args, kwargs)
        except DataDependentOutputException:
            return _answer(func, args)
        except DynamicOutputShapeException:
            return _all_of(func, args)

    def packed_indices(self, position_ids: Tensor) -> Tensor | None:
        """Stands in for transformers' `find_packed_sequence_indices`, which reads where documents begin."""
        return position_ids.new_empty(position_ids.shape) if self._documents else None

    def all_true(self, mask: Tensor) -> bool:
        """Stands in for transformers' `fast_all`, which reads whether there is padding."""
        return not self._padded


@contextlib.contextmanager
def fake_training(target: Target) -> Iterator[Fakes]:
    """Tensors made within are fake, and a Trainer can train with them.

    Args:
        target: the device whose kernels are stood in for. `cuda` takes the ways that attention and the loss take on a
            GPU, wherever the fakes are.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fakes = Fakes(mode)
    with contextlib.ExitStack() as stack:
        enter = stack.enter_context
        enter(without_numbers(packed_indices=fakes.packed_indices, all_true=fakes.all_true, gpu_loss=target == "cuda"))
        for module, name, replacement in (
            (torch, "save", _nothing),
            (nn.Module, "_apply", _apply),
            (nn.functional, "scaled_dot_product_attention", functools.partial(_attention, on_card=target == "cuda")),
            # Gradients are finite, which the host of a CPU knows, and that of a GPU does not.
            (nonfinite, "_look", lambda norm: None if target == "cuda" else False),
            (nonfinite, "host_knows", lambda tensor: target == "cpu"),
            (refresh, "usual", lambda device: "products" if target == "cuda" else "reflections"),
            # Weights in 8 bits have no numbers that they would have to be rounded from.
            (Int8Weight, "from_float", classmethod(_without_values)),
            *((module, "tiles", _outer(tiles)) for module in (products, update, weight)),
            *((module, "parts", _outer(parts)) for module in (rounding, float8)),
            # A card's kernels are ours, but for systems that Triton is not made for.
            (kernel_choice, "_look", lambda tensor: target == "cuda" and sys.platform != "win32"),
        ):
            enter(mock.patch.object(module, name, replacement))
        enter(without_launches())
        forget_tables()  # no fake one may stay there, and no real one be used
        stack.callback(forget_tables)
        enter(mode)
        enter(_Answers(fakes))
        yield fakes


def forget_tables() -> None:
    """Forget the tables of codes, which are kept for the process: whoever uses them next makes them anew."""
    for table in (quantize._equal_steps, adam_8bit.codebooks):
        table.cache_clear()


class _Answers(TorchDispatchMode):
    def __init__(self, fakes: Fakes) -> None:
        super().__init__()
        self._fakes = fakes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, WRAPPERS) for kind in types):
            return NotImplemented  # theirs to answer, with operations on what they hold
        return self._fakes.call(func, args, kwargs or {})


def _number(constant: Tensor) -> Any:
    """The number that a fake is known to be."""
    with torch._C._DisableTorchDispatch():
        return constant.item()


def _answer(func: Any, args: Any) -> Any:
    if func is not _aten._local_scalar_dense.default or args[0].dtype == torch.bool:
        return True  # is_nonzero, equal
    return 1.0 if args[0].dtype.is_floating_point else 1


def _all_of(func: Any, args: Any) -> Tensor:
    """What a mask selects where it is true throughout."""
    if func is _aten.index.Tensor:
        values, indices = args
        masks = [(dimension, index) for dimension, index in enumerate(indices) if index is not None]
        if len(masks) == 1 and masks[0][1].dtype == torch.bool:
            dimension, mask = masks[0]
            shape = (*values.shape[:dimension], mask.numel(), *values.shape[dimension + mask.ndim :])
            return cast("Tensor", values.new_empty(shape))
    elif func is _aten.masked_select.default:
        return cast("Tensor", args[0].new_empty(args[0].numel()))
    elif func is _aten.nonzero.default:
        return cast("Tensor", args[0].new_empty((args[0].numel(), args[0].ndim), dtype=torch.int64))
    raise NotImplementedError(f"The shape of what {func} gives depends on numbers that a plan does not have.")


def _grouped_product(
    first: Tensor,
    second: Tensor,
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """What `grouped_mm` gives, whose own rule for fakes knows bfloat16 only. Kernels take float32 and float16 too.

    Source: torch, `ATen/native/GroupedMMUtils.h` (`create_grouped_gemm_output_tensor`: rows of whole 16 bytes).
    """
    rows, columns = first.shape[-2], second.shape[-1]
    if first.ndim == second.ndim == 2:
        assert offs is not None
        groups = [offs.shape[0]]
    else:
        groups = [first.shape[0]] if first.ndim == second.ndim == 3 else []
    kind = dtype or first.dtype
    granule = max(1, 16 // kind.itemsize)
    width = math.ceil(columns / granule) * granule
    strides = ([rows * width] if groups else []) + [width, 1]
    return first.new_empty_strided([*groups, rows, columns], strides, dtype=kind)


# ---- models


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Instead of writing a file."""


def _apply(self: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """Instead of `nn.Module._apply`, which moves and casts by swapping parameters in place: fakes cannot be."""
    made: dict[nn.Parameter, nn.Parameter] = {}  # a weight that two modules share stays shared
    for module in self.modules() if recurse else (self,):
        for name, param in module._parameters.items():
            if param is not None:
                if param not in made:
                    new = fn(param.detach())
                    same = (new.device, new.dtype) == (param.device, param.dtype)
                    made[param] = param if same else nn.Parameter(new, param.requires_grad)
                module._parameters[name] = made[param]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = fn(buffer)
    return self


# ---- a part at a time


def _outer(parts_of: Callable[..., Iterator[slice]]) -> Callable[..., Iterator[slice]]:
    """Instead of the function: those in between come and go as the second does, and are most of all operations."""

    def outer(*args: int) -> Iterator[slice]:
        every = list(parts_of(*args))
        yield from every if len(every) <= 3 else (*every[:2], every[-1])

    return outer


# ---- weights in 8 bits


def _without_values(cls: type[Int8Weight], values: Tensor, dtype: torch.dtype | None = None) -> Int8Weight:
    """Instead of `Int8Weight.from_float`: one of that shape."""
    m, n = values.shape
    return cls.empty((m, n), dtype or values.dtype, values.device)


# ---- kernels


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    on_card: bool,
) -> Tensor:
    """Instead of `scaled_dot_product_attention`, which cannot ask a fake and would not take a fused kernel.

    Fused kernels on CPUs and GPUs allocate the same: the output, and a float32 number for each row of it. (With dropout
    a CPU has none, and takes more than this says.) Of values of another width than keys, as DeepSeek's are, a CPU has
    none either, and forms the scores.
    """
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = (tensor.to(dtype) for tensor in (query, key, value))
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        bias = torch.zeros_like(attn_mask, dtype=query.dtype)
        attn_mask = bias.masked_fill_(attn_mask.logical_not(), -math.inf)
    if value.shape[-1] != query.shape[-1]:
        if not on_card or enable_gqa:
            return cast(
                "Tensor",
                _aten._scaled_dot_product_attention_math(
                    query, key, value, attn_mask, dropout_p, is_causal, None, scale=scale, enable_gqa=enable_gqa
                )[0],
            )
        return cast(
            "Tensor",
            _aten._scaled_dot_product_efficient_attention(
                query, key, value, attn_mask, True, dropout_p, is_causal, scale=scale
            )[0],
        )
    # Fewer heads of keys and values than of queries (enable_gqa) are nothing that it makes copies for.
    output: Tensor = _aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
    )[0]
    return output
