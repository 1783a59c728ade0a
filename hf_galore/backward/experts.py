"""The products with experts whose backward hands δ and X to a sink: no gradient of a stack of weights is built.

A module of experts has the weights of all in one parameter of k × m × n, and multiplies with it in one of three ways:
all groups of tokens in one operation (`grouped_mm`), one expert after the other (`F.linear(x, weight[i])`, or
`x @ weight[i]`), or every expert with as many tokens (`bmm`). `hf_galore.backward.expert_watch` recognises them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..lowrank.grouped import GroupedGradient, grouped_mm
from ..lowrank.products import FactoredGradient
from .linear import asked_for
from .passes import Passes


class StackGradientSink(Protocol):
    """Where the factors of a stack's gradient go."""

    def serves(self, weight: Tensor) -> bool:
        """Whether `gradient_of_stack` may be asked for this weight; called in the forward pass."""

    def gradient_of_stack(self, weight: Tensor, factors: FactoredGradient | GroupedGradient) -> Tensor | None:
        """What stands for the gradient of one use of a stack; `None` where the gradient itself has to."""

    def not_recognised(self, module: nn.Module) -> None:
        """Note that a module uses stacks in no product that is recognised."""

    def passes_of(self, params: Iterable[Tensor]) -> list[Passes]:
        """The records of the backward passes that are to bring some parameters gradients."""


class How(NamedTuple):
    """How a stack is used: no inputs to autograd."""

    sink: StackGradientSink
    columns_in: bool
    """Whether inputs are multiplied by a weight's columns, Y = XWᵀ, as in `F.linear`; else by its rows, Y = XW."""

    def factors(self, delta: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """The two whose product, the first transposed, is the weight's gradient."""
        return (delta, x) if self.columns_in else (x, delta)


def _gradient(
    node: Any, weight: Tensor, sink: StackGradientSink, factors: FactoredGradient | GroupedGradient
) -> Tensor | None:
    """What a node of the backward pass returns as the gradient of a stack."""
    asked = asked_for(node, weight)
    if asked is None:
        return None
    # With create_graph=True the gradient itself is to be differentiated.
    found = None
    if asked == "accumulated" and not torch.is_grad_enabled():
        found = sink.gradient_of_stack(weight, factors)
    return factors.whole().to(weight.dtype) if found is None else found


class Grouped(torch.autograd.Function):
    """All groups of rows with their weights, as `grouped_mm`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, ends: Tensor, how: How) -> Tensor:
        assert grouped_mm is not None
        ctx.save_for_backward(x, weight, ends)
        # A checkpointed part gives back a copy of what was saved, which the sink would not know.
        ctx.weight = weight
        ctx.how = how
        return cast("Tensor", grouped_mm(x, weight.mT if how.columns_in else weight, offs=ends))

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        assert grouped_mm is not None
        x, weight, ends = ctx.saved_tensors
        how: How = ctx.how
        delta = delta.contiguous()
        grad_weight = None
        if ctx.needs_input_grad[1]:
            a, b = how.factors(delta, x)
            grad_weight = _gradient(ctx, ctx.weight, how.sink, GroupedGradient(a, b, ends))
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grouped_mm(delta, weight if how.columns_in else weight.mT, offs=ends)
        return grad_x, grad_weight, None, None


class Batched(torch.autograd.Function):
    """As many rows for each weight, as `bmm`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, how: How) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.weight = weight
        ctx.how = how
        weight = weight.to(x.dtype)
        return torch.bmm(x, weight.mT if how.columns_in else weight)

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        how: How = ctx.how
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = _gradient(ctx, ctx.weight, how.sink, FactoredGradient(*how.factors(delta, x)))
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.bmm(delta, (weight if how.columns_in else weight.mT).to(delta.dtype))
        return grad_x, grad_weight, None


class Uses:
    """The factors that the uses of single weights of a stack bring in one backward pass."""

    def __init__(self) -> None:
        self._found: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def add(self, index: int, a: Tensor, b: Tensor) -> None:
        """Note the factors of one use of a weight."""
        self._found.setdefault(index, []).append((a, b))

    def take(self, like: Tensor) -> GroupedGradient | None:
        """All of them, which are forgotten; `None` where there are none."""
        found, self._found = self._found, {}
        if not found:
            return None
        counts = [sum(len(a) for a, _ in found.get(index, ())) for index in range(len(like))]
        ends = torch.tensor(counts, device=like.device).cumsum(0).to(torch.int32)
        pairs = [pair for index in sorted(found) for pair in found[index]]
        return GroupedGradient(torch.cat([a for a, _ in pairs]), torch.cat([b for _, b in pairs]), ends)


class Slices(torch.autograd.Function):
    """The weights of a stack one by one."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, uses: Uses, sink: StackGradientSink) -> tuple[Tensor, ...]:
        ctx.weight = weight
        ctx.uses = uses
        ctx.sink = sink
        ctx.set_materialize_grads(False)
        return weight.unbind()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, None, None]:
        weight: Tensor = ctx.weight
        factors = ctx.uses.take(weight)
        # What other uses of single weights have brought: those of `Slice` bring nothing here.
        others = {i: g for i, g in enumerate(gradients) if g is not None}
        if factors is not None and not others:
            return _gradient(ctx, weight, ctx.sink, factors), None, None
        if asked_for(ctx, weight) is None or not (others or factors is not None):
            return None, None, None
        whole = weight.new_zeros(weight.shape) if factors is None else factors.whole().to(weight.dtype)
        added = [whole[i] + others[i] if i in others else whole[i] for i in range(len(weight))]
        return torch.stack(added), None, None


class Slice(torch.autograd.Function):
    """The product of rows with one weight of a stack, as `F.linear` or `matmul`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, index: int, uses: Uses, how: How) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.index, ctx.uses, ctx.how = index, uses, how
        weight = weight.to(x.dtype)
        return F.linear(x, weight) if how.columns_in else x @ weight

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        x, weight = ctx.saved_tensors
        how: How = ctx.how
        grad_weight = None
        if ctx.needs_input_grad[1] and _is_asked_for(ctx):
            a, b = how.factors(delta.reshape(-1, delta.shape[-1]), x.reshape(-1, x.shape[-1]))
            if torch.is_grad_enabled():
                grad_weight = (a.mT @ b).to(weight.dtype)
            else:
                ctx.uses.add(ctx.index, a, b)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = delta @ (weight if how.columns_in else weight.mT).to(delta.dtype)
        return grad_x, grad_weight, None, None, None


def _is_asked_for(node: Any) -> bool:
    """Whether the present backward pass goes on to the weights that a slice is of."""
    try:
        return bool(torch._C._will_engine_execute_node(node.next_functions[1][0]))
    except RuntimeError:  # torch cannot say it where gradients are returned
        return True
