"""What older releases of transformers and TRL have otherwise, where a plan stands in for it."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import transformers.masking_utils
from packaging.version import parse
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers.trainer import Trainer

from .signatures import moved

# Seen in transformers 5.5.4 and 5.10.4, which have no `fast_all`.
_ASK_THE_MASK: dict[str, str] = {
    "_ignore_causal_mask_sdpa": "(padding_mask, query_length, kv_length, kv_offset, local_attention_size=None)",
    "_ignore_bidirectional_mask_sdpa": "(padding_mask, kv_length, local_attention_size=None)",
}


def masks_ask_themselves() -> bool:
    """Whether transformers asks a mask's own method whether there is padding, and not its `fast_all`."""
    masking = transformers.masking_utils
    return not hasattr(masking, "fast_all") and not moved(masking, masking.__name__, _ASK_THE_MASK)


def told_of_padding(all_true: Callable[[Tensor], bool]) -> dict[str, Callable[..., bool]]:
    """Instead of the functions that ask a mask's own method: they learn of padding from `all_true`."""
    return {name: _told(getattr(transformers.masking_utils, name), all_true) for name in _ASK_THE_MASK}


def _told(function: Callable[..., bool], all_true: Callable[[Tensor], bool]) -> Callable[..., bool]:
    def told(padding_mask: Tensor | None, *args: Any, **kwargs: Any) -> bool:
        # Padding always needs a mask; without any, the functions decide as where there is no padding mask.
        return (padding_mask is None or all_true(padding_mask)) and function(None, *args, **kwargs)

    return told


def loss_kernels() -> Any | None:
    """TRL's module of Triton kernels for its fused loss; `None` before 1.15, where a GPU goes the way of a CPU."""
    if not trl_is_at_least("1.15"):
        return None
    import trl.kernels.chunked_logprob as kernels

    return kernels


def loss_of_all_labels() -> list[tuple[Any, str, Callable[..., Any]]]:
    """Instead of the loss that TRL has before 1.15: a module, a name there, and what counts all labels.

    TRL asks a batch how many are none of padding or a prompt: without an answer, a plan would go on as where all are.
    """
    if not _is_trl_here() or trl_is_at_least("1.15"):
        return []
    import trl.trainer.sft_trainer as owner

    name = "_chunked_cross_entropy_loss"
    loss = getattr(owner, name, None)
    if loss is None:  # as of TRL 0.24, which leaves the loss to the model
        return []

    @functools.wraps(loss)
    def with_all_labels(*args: Any, **kwargs: Any) -> Any:
        with _AllOfTheFirstMask():
            return loss(*args, **kwargs)

    return [(owner, name, with_all_labels)]


class _AllOfTheFirstMask(TorchFunctionMode):
    """Counts the first mask whose sum is asked for as true throughout."""

    def __init__(self) -> None:
        super().__init__()
        self._asked = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self._asked and func is Tensor.sum and args[0].dtype == torch.bool:
            self._asked = True
            # On the CPU, where a fake has a number; elsewhere it has none.
            return torch.tensor(args[0].numel())
        return func(*args, **(kwargs or {}))


def loss_asks_for_triton() -> bool:
    """Whether TRL asks `_use_triton` which way its fused loss goes. TRL 1.15 knows no other."""
    return trl_is_at_least("1.16")


def _is_trl_here() -> bool:
    return importlib.util.find_spec("trl") is not None


def trl_is_at_least(version: str) -> bool:
    """Whether TRL is installed, in that version or a later one."""
    if not _is_trl_here():
        return False
    import trl

    return parse(trl.__version__) >= parse(version)


def end(trainer: Trainer) -> None:
    """End what a Trainer holds outside itself, its trackers and process group; older ones have no such method."""
    if hasattr(trainer, "end"):
        trainer.end()
    else:
        trainer.accelerator.end_training()
