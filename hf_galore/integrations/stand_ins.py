"""What a plan puts in the place of functions of transformers, PEFT, TRL and bitsandbytes, while it runs.

A plan trains with tensors that have no numbers (`hf_galore.plan`). These libraries load and write weights, which are
not there, ask for numbers, and choose kernels by the device; here is what they find instead. All replacements act on
the whole process, other threads too, for as long as the plan runs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np
import torch
import transformers.masking_utils
import transformers.modeling_utils
import transformers.trainer_pt_utils
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel, TrainingArguments
from transformers.utils import is_peft_available

from . import trainer_parts
from .int8_config import METHOD
from .int8_model import quantize_weights_
from .older import loss_asks_for_triton, loss_kernels, loss_of_all_labels, masks_ask_themselves, told_of_padding
from .signatures import moved
from .trl_dpo import without_reference_numbers
from .trl_offloading import moved_offloading, offloading

# What is replaced, and what the replacements call, with the signatures that they were written for.
_MASKS: dict[str, str] = {
    "is_tracing": "(tensor=None)",
    "find_packed_sequence_indices": "(position_ids)",
    "fast_all": "(tensor)",
}
_EVALUATION: dict[str, str] = {"nested_numpify": "(tensors)"}
_LOSS: dict[str, str] = {"_use_triton": "(device)", "_addmm_fp32": "(acc, a, b)"}
_KERNELS = ("_forward_kernel", "_backward_kernel")


@contextlib.contextmanager
def without_numbers(
    *, packed_indices: Callable[[Tensor], Tensor | None], all_true: Callable[[Tensor], bool], gpu_loss: bool
) -> Iterator[None]:
    """Let transformers, PEFT, TRL and bitsandbytes train with tensors that have no numbers.

    Args:
        packed_indices: answers transformers' `find_packed_sequence_indices`, which reads where documents begin.
        all_true: answers transformers' `fast_all`, which reads whether there is padding.
        gpu_loss: whether TRL's loss takes its way for GPUs, with Triton kernels that fill what is there.
    """
    masks = told_of_padding(all_true) if masks_ask_themselves() else {"fast_all": all_true}
    with contextlib.ExitStack() as stack:
        for owner, name, replacement in (
            # Weights come from nowhere, and nothing is written.
            (PreTrainedModel, "from_pretrained", classmethod(_from_config)),
            (PreTrainedModel, "save_pretrained", _as_saved),
            (trainer_parts, "state_with_host_stacks", _state_on_card if gpu_loss else _nothing),
            *((owner, "save_pretrained", _nothing) for owner in _peft_models()),
            # transformers takes a fake for a sign of compilation, for which it makes other masks.
            (transformers.masking_utils, "is_tracing", lambda tensor=None: False),
            (transformers.masking_utils, "find_packed_sequence_indices", packed_indices),
            *((transformers.masking_utils, name, replacement) for name, replacement in masks.items()),
            *loss_of_all_labels(),
            *without_reference_numbers(),
            *offloading(),
            (transformers.trainer_pt_utils, "nested_numpify", _numpify),
            (TrainingArguments, "n_gpu", _at_most_one(TrainingArguments.n_gpu)),
        ):
            stack.enter_context(mock.patch.object(owner, name, replacement))
        if gpu_loss:
            _use_gpu_loss(stack)
        with contextlib.suppress(ImportError):
            from bitsandbytes.optim.optimizer import GlobalOptimManager

            # It remembers parameters by their addresses, for good.
            stack.enter_context(mock.patch.object(GlobalOptimManager, "_instance", None))
        yield


def _peft_models() -> list[Any]:
    """PEFT's model, where it is installed."""
    if not is_peft_available():
        return []
    from peft import PeftModel

    return [PeftModel]


def moved_stand_ins() -> list[str]:
    """What of these libraries is no longer where `without_numbers` looks for it, in words; empty where all is well."""
    import trl.trainer.utils
    from bitsandbytes.optim.optimizer import GlobalOptimManager

    masks = {name: signature for name, signature in _MASKS.items() if name != "fast_all" or not masks_ask_themselves()}
    found = moved(transformers.masking_utils, "transformers.masking_utils", masks)
    found += moved(transformers.trainer_pt_utils, "transformers.trainer_pt_utils", _EVALUATION)
    kernels = loss_kernels()
    if kernels is not None:
        loss = {name: signature for name, signature in _LOSS.items() if name != "_use_triton" or loss_asks_for_triton()}
        found += moved(kernels, "trl.kernels.chunked_logprob", loss)
    for owner, names in (
        (PreTrainedModel, ("from_pretrained", "save_pretrained", "_from_config")),
        *((owner, ("save_pretrained",)) for owner in _peft_models()),
        (TrainingArguments, ("n_gpu",)),
        *([(trl.trainer.utils, ("_use_triton",))] if loss_asks_for_triton() else []),
        *([(kernels, _KERNELS)] if kernels is not None else []),
        (GlobalOptimManager, ("_instance",)),
    ):
        found += [f"{owner.__name__}.{name} is gone" for name in names if not hasattr(owner, name)]
    return found + moved_offloading()


def _from_config(
    cls: Any,
    /,
    name: Any = None,
    *args: Any,
    config: Any = None,
    dtype: Any = None,
    attn_implementation: str | None = None,
    quantization_config: Any = None,
    **kwargs: Any,
) -> PreTrainedModel:
    """Instead of `PreTrainedModel.from_pretrained`: a model of that shape, with no weights behind it."""
    config = config or AutoConfig.from_pretrained(name)
    quantization = _options_of(quantization_config or getattr(config, "quantization_config", None))
    if quantization is not None and quantization.get("quant_method") != METHOD:
        raise ValueError(
            "A model with quantized weights (load_in_4bit, load_in_8bit) cannot be planned, unless they are in 8 bits "
            "and train (weight_bits: 8)."
        )
    if dtype is None or dtype == "auto":
        dtype = config.dtype or torch.float32
    if attn_implementation is not None and attn_implementation.startswith(("flash_attention", "kernels")):
        attn_implementation = "sdpa"  # which allocates the same
    model: PreTrainedModel = cls._from_config(
        config,
        dtype=getattr(torch, dtype) if isinstance(dtype, str) else dtype,
        **({} if attn_implementation is None else {"attn_implementation": attn_implementation}),
    )
    if quantization is not None:  # there is no moment when more than one of its weights is not in 8 bits
        quantize_weights_(model, quantization.get("modules_to_not_convert"))
    model.eval()
    return model


def _options_of(quantization_config: Any) -> dict[str, Any] | None:
    """A quantization config as a mapping, as a checkpoint's config.json has it; `None` where there is none."""
    if quantization_config is None or isinstance(quantization_config, dict):
        return quantization_config
    return {**vars(quantization_config), "quant_method": str(quantization_config.quant_method)}


def _as_saved(self: PreTrainedModel, *args: Any, state_dict: Any = None, **kwargs: Any) -> None:
    """Instead of `PreTrainedModel.save_pretrained`, which writes experts as they are on the Hub: each by itself.

    What transformers 5 keeps in one tensor is copied for that, where it is, all of it before anything is written.
    """
    convert: Any = getattr(transformers.modeling_utils, "revert_weight_conversion", None)
    if convert is not None and kwargs.get("save_original_format", True):
        convert(self, dict(self.state_dict() if state_dict is None else state_dict))


def _state_on_card(model: nn.Module) -> dict[str, Tensor]:
    """Instead of `state_with_host_stacks`: what is saved without a copy on the host, which takes none of the card."""
    stacks = {name for name, param in model.named_parameters() if param.ndim >= 3}
    return {name: value for name, value in model.state_dict().items() if name not in stacks}


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Instead of writing a file, or of a kernel that only fills what is there: neither allocates on the device."""


def _numpify(tensors: Any) -> Any:
    """Instead of `nested_numpify`: ones."""
    if isinstance(tensors, (list, tuple)):
        return type(tensors)(map(_numpify, tensors))
    return np.ones(tuple(tensors.shape), dtype=np.float32)


def _at_most_one(count: property) -> property:
    """Instead of the number of GPUs: a plan is of what one process has, and TRL refuses several for one."""
    return property(lambda self: min(1, count.__get__(self)))


class _Kernel:
    """Instead of a Triton kernel, which is called as `kernel[grid](...)`."""

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return _nothing


class _Triton:
    @staticmethod
    def cdiv(a: int, b: int) -> int:
        return -(-a // b)


def _use_gpu_loss(stack: contextlib.ExitStack) -> None:
    """Let TRL's loss take its way for GPUs: Triton kernels, which fill tiles in place, and products into float32."""
    kernels = loss_kernels()
    if kernels is None:
        return
    import trl.trainer.utils

    askers = (kernels, trl.trainer.utils) if loss_asks_for_triton() else ()
    for owner, name, replacement in (
        *((owner, "_use_triton", lambda device: True) for owner in askers),
        (kernels, "_addmm_fp32", _nothing),
        *((kernels, name, _Kernel()) for name in _KERNELS),
    ):
        stack.enter_context(mock.patch.object(owner, name, replacement))
    # Not there where torch comes without Triton.
    stack.enter_context(mock.patch.object(kernels, "triton", _Triton, create=True))
