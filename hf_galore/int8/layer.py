"""What a linear layer does with a weight in 8 bits, as autograd sees it, any number of times over."""

from __future__ import annotations

from typing import Any, Protocol, cast

import torch
from torch import Tensor

from .format import Int8Blocks
from .products import int8_linear, rows_of, times_weight


class _Blocked(Protocol):
    """An `Int8Weight`."""

    @property
    def blocks(self) -> Int8Blocks: ...
    @property
    def dtype(self) -> torch.dtype: ...


def linear(x: Tensor, weight: Any, bias: Tensor | None = None) -> Tensor:
    """As `torch.nn.functional.linear`, with an `Int8Weight`.

    Raises:
        TypeError: the int8 weight is not the one of the layer.
        RuntimeError: x has another dtype than the weight, and there is no autocast.
    """
    if not hasattr(weight, "blocks"):
        raise TypeError("An int8 weight is what a linear layer multiplies with, and not what it gets.")
    device_type = x.device.type
    if torch.is_autocast_enabled(device_type) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device_type)
        x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
    elif x.dtype != weight.dtype:
        raise RuntimeError(
            f"A linear layer of {weight.dtype}, whose weight is kept in 8 bits, got an input of {x.dtype}. Give it one "
            "of its own dtype, or run it under autocast."
        )
    return product(x, weight, bias)


def product(x: Tensor, weight: _Blocked, bias: Tensor | None = None) -> Tensor:
    """XWᵀ + b, all of one dtype."""
    if torch.is_grad_enabled():
        return cast("Tensor", _Linear.apply(x, weight, bias))
    return int8_linear(x, weight.blocks, bias)


def input_gradient(delta: Tensor, weight: _Blocked) -> Tensor:
    """δW."""
    if torch.is_grad_enabled():  # with create_graph=True
        return cast("Tensor", _TimesWeight.apply(delta, weight))
    return times_weight(delta, weight.blocks)


def weight_gradient(delta: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """δᵀX as a whole: what other optimizers and full-rank weights need."""
    return (rows_of(delta, delta.shape[-1]).mT @ rows_of(x, x.shape[-1])).to(dtype)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weight: _Blocked, bias: Tensor | None) -> Tensor:
        return int8_linear(x, weight.blocks, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        grad_weight = weight_gradient(delta, x, weight.dtype) if needs_weight else None
        grad_bias = rows_of(delta, delta.shape[-1]).sum(dim=0) if needs_bias else None
        return input_gradient(delta, weight) if needs_x else None, grad_weight, grad_bias


class _TimesWeight(torch.autograd.Function):
    @staticmethod
    def forward(delta: Tensor, weight: _Blocked) -> Tensor:
        return times_weight(delta, weight.blocks)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        delta, weight = ctx.saved_tensors
        needs_delta, needs_weight = ctx.needs_input_grad
        grad_weight = weight_gradient(delta, gradient, weight.dtype) if needs_weight else None
        return product(gradient, weight) if needs_delta else None, grad_weight
