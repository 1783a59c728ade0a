"""The gradient of the output head under TRL's fused loss, in pieces of the vocabulary.

TRL computes loss and logits together, tile by tile, but its backward pass gathers the head's gradient in a float32
matrix of the head's size: at the moment when the activations of the whole model are alive, 0.5 GiB for Llama-2-7B and
2 GiB for Llama-3-8B, and half of that again for the cast. Here it takes the vocabulary in parts: only a part's gradient
is ever float32, and where the head is a target with a basis, its gradient is projected part by part and never exists.
"""

from __future__ import annotations

import sys
import types
from typing import Any

import torch
from torch import Tensor

from ..backward.hooks import BackwardHooks, hooks_on
from ..backward.linear import asked_for
from ..lowrank.projection import Bases, project

# Rows of the head at a time: the tile of logits for TRL's 4,096 tokens takes 32 MiB in bfloat16, the part of the
# gradient 64 MiB in float32 at a hidden size of 4,096. (TRL's own 32,768 rows: 256 MiB.)
VOCABULARY_PART = 4096

# TRL's module that looks the loss function up at each call, and its name there.
_MODULE, _NAME = "trl.trainer.utils", "_ChunkedLogProbFunction"


def use_fused_head() -> None:
    """Let TRL's fused loss come here; of no effect where TRL has not been imported, or is another than expected.

    Heads that no GaLore hooks serve go on to TRL's own function.
    """
    module = sys.modules.get(_MODULE)
    original = getattr(module, _NAME, None)
    if module is None or original is None or isinstance(original, _Dispatch):
        return
    setattr(module, _NAME, _Dispatch(original))


def restore_fused_head() -> None:
    """Give TRL its own function back."""
    module = sys.modules.get(_MODULE)
    current = getattr(module, _NAME, None)
    if module is not None and isinstance(current, _Dispatch):
        setattr(module, _NAME, current.original)


class _Dispatch:
    """Stands where TRL looks for an autograd function and calls its `apply`."""

    def __init__(self, original: Any) -> None:
        self.original = original

    def apply(self, hidden: Tensor, weight: Tensor, *rest: Any) -> Any:
        hooks = hooks_on(weight)
        if hooks is None or not torch.is_grad_enabled():
            return self.original.apply(hidden, weight, *rest)
        return _FusedHead.apply(self.original, hooks, hidden, weight, *rest)


class _FusedHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        original: Any,
        hooks: BackwardHooks,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        *rest: Any,
    ) -> Any:
        ctx.original, ctx.hooks, ctx.weight = original, hooks, weight
        return original.forward(
            ctx, hidden, weight, bias, targets, temperature, min(chunk_size, VOCABULARY_PART), *rest
        )

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        hidden, weight, bias, targets, *statistics = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[2:5]
        asked = asked_for(ctx, ctx.weight) if needs_weight else None
        needs_weight = asked is not None
        bases: Bases | None = ctx.hooks.bases_for_rows(ctx.weight) if asked == "accumulated" else None
        grad_hidden = torch.zeros_like(hidden, dtype=torch.float32) if needs_hidden else None
        grad_bias = torch.empty_like(bias) if bias is not None and needs_bias else None
        grad_weight = torch.empty_like(weight) if needs_weight and bases is None else None
        low_rank = None if bases is None or bases.right is None else weight.new_empty(len(weight), bases.right.shape[1])
        # In float32, for TRL would round each part's share of its gradient; the products are in the dtype it chose.
        inputs = hidden.float()
        for start in range(0, len(weight), VOCABULARY_PART):
            rows = slice(start, start + VOCABULARY_PART)
            part = types.SimpleNamespace(
                saved_tensors=(
                    inputs,
                    weight[rows],
                    None if bias is None else bias[rows],
                    targets - start,
                    *statistics,
                ),
                needs_input_grad=(needs_hidden, needs_weight, grad_bias is not None),
                compute_dtype=ctx.compute_dtype,
                chunk_size=VOCABULARY_PART,
                kernel_args=ctx.kernel_args,
            )
            of_hidden, of_weight, of_bias, *_ = ctx.original.backward(part, *gradients)
            if grad_hidden is not None:
                grad_hidden.add_(of_hidden)
            if grad_weight is not None:
                grad_weight[rows] = of_weight
            elif low_rank is not None and bases is not None:
                low_rank[rows] = project(of_weight, bases)
            if grad_bias is not None:
                grad_bias[rows] = of_bias
            del of_hidden, of_weight, of_bias
        if low_rank is not None:
            grad_weight = ctx.hooks.of_rows(ctx.weight, low_rank)
        grad_hidden = None if grad_hidden is None else grad_hidden.to(hidden.dtype)
        return None, None, grad_hidden, grad_weight, grad_bias, *(None,) * (len(ctx.needs_input_grad) - 5)
