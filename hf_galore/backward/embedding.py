"""The gradient of an embedding by rows: no matrix of the vocabulary's size where a few of its rows have a gradient.

For Llama-3-8B that matrix takes 1 GiB, and where the embedding is the output head too it came on top of the head's at
the end of the backward pass. Between refreshes the rows are projected by themselves; rows that come after a whole
gradient of the same weight in one backward pass are added to that, in place, once autograd has put it into `.grad`.

Served are `nn.Embedding`, and subclasses that run its `forward`.
"""

from __future__ import annotations

import weakref
from typing import Any, Protocol, cast

import torch
import torch.autograd.forward_ad as fwAD
import torch.nn.functional as F
from torch import Tensor, nn

from ..integrations.fully_shard import was
from ..lowrank.rows import EmbeddingGradient
from .linear import asked_for
from .patched import ModulePatch, Patched, patch_module, why_forward_is_not_of, why_not_derivable


class EmbeddingGradientSink(Protocol):
    """Where the gradient of an embedding goes."""

    def serves(self, weight: Tensor) -> bool:
        """Whether `gradient_of_embedding` may be asked for this weight; called in the forward pass."""

    def gradient_of_embedding(self, weight: Tensor, gradient: EmbeddingGradient) -> Tensor | None:
        """What autograd is to have of the gradient of one use of an embedding; `None` where that is nothing."""


class ProjectedEmbedding(Patched):
    """What a patched embedding's class has before its own."""

    @torch.compiler.disable  # type: ignore[untyped-decorator, unused-ignore]
    def forward(self, input: Tensor) -> Tensor:
        """As `nn.Embedding.forward`."""
        module = cast("nn.Embedding", self)
        ref: weakref.ref[EmbeddingGradientSink] | None = module.__dict__.get("_galore_sink")
        sink, weight = None if ref is None else ref(), module.weight
        # Functions that are transformed (torch.func, forward-mode gradients) need operations that torch knows.
        transformed = torch._C._functorch.peek_interpreter_stack() is not None or fwAD._current_level >= 0
        if sink is None or transformed or not torch.is_grad_enabled() or not weight.requires_grad:
            return nn.Embedding.forward(module, input)
        if _unserved_option(module) is not None or not sink.serves(weight):
            return nn.Embedding.forward(module, input)
        return cast("Tensor", _EmbeddingFunction.apply(weight, input, module.padding_idx, sink))


class _EmbeddingFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, tokens: Tensor, padding: int | None, sink: EmbeddingGradientSink) -> Tensor:
        ctx.save_for_backward(tokens)
        # A checkpointed part gives back a copy of what was saved, which the sink would not know.
        ctx.weight, ctx.padding, ctx.sink = weight, padding, sink
        return F.embedding(tokens, weight, padding)

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> tuple[Tensor | None, None, None, None]:
        (tokens,) = ctx.saved_tensors
        weight: Tensor = ctx.weight
        asked = asked_for(ctx, weight) if ctx.needs_input_grad[0] else None
        if asked is None:
            return None, None, None, None
        gradient = EmbeddingGradient(delta, tokens, len(weight), ctx.padding)
        # With create_graph=True the gradient itself is to be differentiated.
        if asked == "accumulated" and not torch.is_grad_enabled():
            return ctx.sink.gradient_of_embedding(weight, gradient), None, None, None
        return gradient.whole(), None, None, None


def _unserved_option(module: nn.Embedding) -> str | None:
    """An option of an embedding whose gradient is not that of its rows alone; `None` where it has none."""
    found = {
        "max_norm": module.max_norm is not None,  # changes the weight in the forward pass
        "scale_grad_by_freq": module.scale_grad_by_freq,
        "sparse": module.sparse,
    }
    return next((name for name, given in found.items() if given), None)


def why_not_by_rows(module: nn.Embedding) -> str | None:
    """Why `patch_embedding` cannot serve a module, in words; `None` where it can."""
    cls: Any = was(type(module))
    if cls.forward is not nn.Embedding.forward:
        return f"its class {cls.__name__} has a forward of its own"
    option = _unserved_option(module)
    if option is not None:
        return f"it has {option}"
    return why_forward_is_not_of(cls, module) or why_not_derivable(cls, ProjectedEmbedding, nn.Embedding)


def patch_embedding(module: nn.Embedding, sink: weakref.ref[Any]) -> ModulePatch:
    """Send the gradient of an embedding's weight to `sink`, which is referred to weakly.

    Raises:
        ValueError: the module cannot be patched; see `why_not_by_rows`.
    """
    return patch_module(module, ProjectedEmbedding, sink, why_not_by_rows(module))
