"""Saving a model with int8 weights as an ordinary checkpoint, of which one file at a time is in the host's memory.

transformers takes the tensors of a file out of the state dict, lets each be contiguous, and writes them: at that moment
those here become floats. Before it they say how large they will be, by which transformers divides them into files.
"""

from __future__ import annotations

import json
import os
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..int8 import DTYPES, Int8Weight, is_int8
from ..log import and_others

CODES, EXPONENTS = ".weight_codes", ".weight_exponents"
"""What an int8 checkpoint adds to the name of a layer."""
SHARD = "2GB"
"""The largest file that `save_pretrained` writes, unless it is told another size."""


class Unwritten(Tensor):
    """An int8 weight that becomes a float, in the host's memory, when it is about to be written to a file.

    Whatever else is done with it is done with its values.
    """

    weight: Int8Weight
    codes: Tensor
    """Those of the weight: what is tied is seen by where its parts are."""
    rest: Tensor
    """Without elements (on the meta device): as many bytes as the values have more than the codes."""

    @staticmethod
    def __new__(cls, weight: Int8Weight) -> Unwritten:
        made = torch.Tensor._make_wrapper_subclass(cls, weight.shape, dtype=weight.dtype, device=weight.device)
        made.weight, made.codes = weight, weight.codes
        made.rest = torch.empty(weight.numel() * (weight.dtype.itemsize - 1), dtype=torch.int8, device="meta")
        return made

    def values(self) -> Tensor:
        """The values, in the host's memory."""
        codes, exponents = (part.cpu() for part in self.weight.blocks)
        return Int8Weight(codes, exponents, self.weight.dtype).dequantized()

    def contiguous(self, memory_format: torch.memory_format = torch.contiguous_format) -> Tensor:
        """The values, in the host's memory."""
        return self.values()

    def untyped_storage(self) -> torch.UntypedStorage:
        """That of the codes."""
        return self.weight.codes.untyped_storage()

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Unwritten({self.weight!r})"

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["codes", "rest"], None

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, Tensor], context: Any, size: Any, stride: Any) -> Tensor:
        raise NotImplementedError("It has parts to be counted by, of which it cannot be made.")

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return Unwritten(args[0].weight)
        plain_args, plain_kwargs = tree_map_only(Unwritten, Unwritten.values, (args, kwargs or {}))
        return func(*plain_args, **plain_kwargs)


def unwritten(state: dict[str, Any], save: str) -> dict[str, Any]:
    """A state dict as it is to be written.

    Args:
        state: of the model.
        save: `"float"`, where int8 weights become floats as they are written, or `"int8"`, where each is two tensors.
    """
    written: dict[str, Any] = {}
    for name, value in state.items():
        if not isinstance(value, Int8Weight):
            written[name] = value
        elif save == "float":
            written[name] = Unwritten(value)
        else:
            layer = name.removesuffix(".weight")
            written[layer + CODES], written[layer + EXPONENTS] = value.blocks
    return written


def take_int8_(model: nn.Module) -> None:
    """Let `load_state_dict` of layers with int8 weights take codes and exponents, as a checkpoint has them saved so.

    And let `load_state_dict(assign=True)` of floats take their values, and not put the floats in the weights' place.
    """
    for layer in model.modules():
        if isinstance(layer._parameters.get("weight"), Int8Weight) and not _hooks_of(layer):
            layer.register_load_state_dict_pre_hook(_take_weight)


def leave_int8_(layer: nn.Module) -> None:
    """Undo `take_int8_` of a layer."""
    for key in _hooks_of(layer):
        del layer._load_state_dict_pre_hooks[key]


def _hooks_of(layer: nn.Module) -> list[int]:
    hooks = layer._load_state_dict_pre_hooks.items()
    return [key for key, hook in hooks if getattr(hook, "hook", None) is _take_weight]


def _take_weight(layer: nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any], *_: Any) -> None:
    """Put an int8 weight in place of what a state dict has of a layer, where that fits.

    What does not fit stays: `load_state_dict` names it. A checkpoint's files may have the two parts in different ones.

    Raises:
        ValueError: floats take the place of the weight, of a dtype that an int8 weight cannot have.
    """
    weight: Any = layer._parameters.get("weight")
    if not isinstance(weight, Int8Weight):
        return
    name, assign = f"{prefix}weight", bool(metadata.get("assign_to_params_buffers"))
    ends = (end.removeprefix(".") for end in (CODES, EXPONENTS))
    parts = {f"{prefix}{end}": own for end, own in zip(ends, weight.blocks, strict=True)}
    given = {key: state.pop(key) for key, own in parts.items() if key in state and state[key].shape == own.shape}
    if len(given) == len(parts) and assign:
        codes, exponents = given.values()
        state[name] = Int8Weight(codes, exponents, weight.dtype)
    elif given:
        for key, part in given.items():
            parts[key].copy_(part)
        state[name] = weight.detach()
    values = state.get(name)
    if not assign or not isinstance(values, Tensor) or isinstance(values, Int8Weight) or values.shape != weight.shape:
        return
    if values.dtype not in DTYPES:
        raise ValueError(
            f"{name} is kept in 8 bits, and load_state_dict(assign=True) would make it one of {values.dtype}, which "
            "it cannot be. Leave assign out, or give values in bfloat16."
        )
    state[name] = Int8Weight.from_float(values.detach())


def check_taken(model: nn.Module, checkpoint: str) -> None:
    """Check that a model had a place for all weights of a checkpoint that has some in 8 bits.

    The Trainer resumes from one with `strict=False`, and would go on with the weights that the model began with.

    Args:
        model: which the Trainer has loaded it into.
        checkpoint: its folder.

    Raises:
        ValueError: layers that the checkpoint has in 8 bits are floats in the model.
    """
    layers = {name.removesuffix(CODES) for name in _names_in(checkpoint) if name.endswith(CODES)}
    named = dict(model.named_modules()) if layers else {}
    lost = sorted(name for name in layers if not is_int8(getattr(named.get(name), "weight", None)))
    if lost:
        raise ValueError(
            f"{checkpoint} has its weights in 8 bits (save='int8'), and {lost[0]}{and_others(len(lost) - 1)} of this "
            "model has floats, into which they were not loaded. Load the model with "
            "quantization_config=Int8Config(...) as that run did. To go on in 16 bits, load the checkpoint by "
            'from_pretrained, set model.hf_quantizer.quantization_config.save = "float", and save it there again.'
        )


def _names_in(checkpoint: str) -> Iterable[str]:
    """The names of the tensors that a model's files have; none where there are no such files."""
    index, single = (os.path.join(checkpoint, name) for name in (SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME))
    if os.path.isfile(index):
        with open(index, encoding="utf-8") as file:
            names: dict[str, str] = json.load(file)["weight_map"]
        return names
    if not os.path.isfile(single):
        return ()
    with safe_open(single, "pt") as tensors:
        return list(tensors.keys())


class _BoundedSaving:
    """A model's `save_pretrained`, with files of another size by default.

    It does not keep the model alive, of which it is an attribute: `del model` frees it without waiting for Python's
    garbage collector. Copied or pickled with the model it is the copy's.
    """

    def __init__(self, model: Any) -> None:
        self._model = weakref.ref(model)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model = self._model()
        if model is None:
            raise RuntimeError("The model whose save_pretrained this was is gone.")
        return type(model).save_pretrained(model, *args, **{"max_shard_size": SHARD, **kwargs})

    def __reduce__(self) -> Any:
        return _BoundedSaving, (self._model(),)


def bounded_shards(model: Any) -> None:
    """Let `save_pretrained` write files of 2 GB by default, and not of 50: one at a time is in the host's memory."""
    model.save_pretrained = _BoundedSaving(model)


def unbounded_shards(model: Any) -> None:
    """Undo `bounded_shards`."""
    vars(model).pop("save_pretrained", None)
