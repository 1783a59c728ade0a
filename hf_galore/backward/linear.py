"""The projected backward of a linear layer: the low-rank gradient straight from δ and X, with no gradient in between.

For Y = XWᵀ + b, with T rows of X (tokens), the weight's gradient is G = δᵀX. GaLore uses nothing of it but products
with narrow matrices, for which the factors do: `hf_galore.lowrank.products.FactoredGradient`.
"""

from __future__ import annotations

import types
import weakref
from typing import Any, Literal, NamedTuple, Protocol, cast

import torch
import torch.autograd.forward_ad as fwAD
import torch.nn.functional as F
from torch import Tensor, nn

from ..integrations.accelerate import forward_attribute
from ..integrations.fully_shard import as_unit, was


class LinearGradientSink(Protocol):
    """Where a patched layer's δ and X go."""

    def serves(self, weight: Tensor) -> bool:
        """Whether `gradient_of` may be asked for this weight; called in the forward pass."""

    def shard_of(self, module: nn.Module, weight: Tensor) -> Tensor | None:
        """What `gradient_of_gathered` may be asked for, where a layer's weight is gathered from shards."""

    def gradient_of_gathered(
        self, shard: Tensor, gathered: Tensor, output_gradient: Tensor, inputs: Tensor
    ) -> Tensor | None:
        """As `gradient_of`, where the weight is gathered from shards."""

    def gradient_of(self, weight: Tensor, output_gradient: Tensor, inputs: Tensor) -> Tensor | None:
        """What stands for the gradient from δ (T × m) and X (T × n) of one use of a layer; `None` where δᵀX has to."""


class ProjectedLinear(nn.Linear):
    """The class of a patched `nn.Linear`: the same layer, whose weight's gradient goes to a sink.

    Never constructed: `patch_linear` turns a layer into one and back. Copies and pickles of it are plain layers.
    """

    _galore_sink: weakref.ref[LinearGradientSink]

    @torch.compiler.disable  # type: ignore[untyped-decorator, unused-ignore]
    def forward(self, input: Tensor) -> Tensor:
        """As `nn.Linear.forward`."""
        # Of a layer that is plain again somebody may have kept this method, as accelerate's wrapper does.
        ref: weakref.ref[LinearGradientSink] | None = self.__dict__.get("_galore_sink")
        sink = None if ref is None else ref()
        weight: Tensor = self.weight
        bias: Tensor | None = self.bias  # type: ignore[assignment, unused-ignore]
        if sink is None or not torch.is_grad_enabled() or not weight.requires_grad:
            return F.linear(input, weight, bias)
        shard = None
        if not sink.serves(weight):
            shard = sink.shard_of(self, weight)
            if shard is None:
                return F.linear(input, weight, bias)
        # Functions that are transformed (torch.func, forward-mode gradients) need operations that torch knows.
        if torch._C._functorch.peek_interpreter_stack() is not None or fwAD._current_level >= 0:
            return F.linear(input, weight, bias)
        device_type = input.device.type
        if torch.is_autocast_enabled(device_type) and input.dtype != torch.float64 and weight.dtype != torch.float64:
            # What autocast does to F.linear, which it cannot see inside a custom function.
            dtype = torch.get_autocast_dtype(device_type)
            input = input.to(dtype)
            bias = None if bias is None else bias.to(dtype)
        elif input.dtype != weight.dtype:
            return F.linear(input, weight, bias)  # raises, as it does unpatched
        return cast("Tensor", _ProjectedLinearFunction.apply(input, weight, bias, sink, _Hidden(shard)))

    def __reduce_ex__(self, protocol: Any) -> Any:
        state = {key: value for key, value in self.__dict__.items() if key != "_galore_sink"}
        return _new_linear, (), state


def _new_linear() -> nn.Linear:
    return nn.Linear.__new__(nn.Linear)


class _Hidden(NamedTuple):
    """A tensor that is no input to autograd: it would be sent a gradient of nothing, and its hooks be called."""

    tensor: Tensor | None


class _ProjectedLinearFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, sink: LinearGradientSink, shard: _Hidden
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.shard = shard.tensor
        # A checkpointed part gives back a copy of what was saved, which the sink would not know.
        ctx.weight = weight
        ctx.sink = sink
        ctx.has_bias = bias is not None
        return F.linear(x, weight.to(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        rows = delta.reshape(-1, delta.shape[-1])
        grad_bias = rows.sum(dim=0) if ctx.has_bias and needs_bias else None
        grad_weight = None
        asked = asked_for(ctx, ctx.weight) if needs_weight else None
        if asked is not None:
            inputs = x.reshape(-1, x.shape[-1])
            # First of all: a refresh takes the most memory, and the input's gradient is as large as the input. With
            # create_graph=True the gradient itself is to be differentiated.
            if asked == "accumulated" and not torch.is_grad_enabled():
                if ctx.shard is None:
                    grad_weight = ctx.sink.gradient_of(ctx.weight, rows, inputs)
                else:
                    grad_weight = ctx.sink.gradient_of_gathered(ctx.shard, ctx.weight, rows, inputs)
            if grad_weight is None:
                grad_weight = (rows.mT @ inputs).to(weight.dtype)
        grad_x = delta @ weight.to(delta.dtype) if needs_x else None
        return grad_x, grad_weight, grad_bias, None, None


def asked_for(node: Any, weight: Tensor) -> Literal["accumulated", "returned"] | None:
    """What becomes of the gradient that a node of the present backward pass gives for `weight`.

    `backward()` accumulates it in `.grad`; `torch.autograd.grad` for the weight returns it; `torch.autograd.grad`, or
    `backward(inputs=...)`, for others has no use for it: `None`.

    Args:
        node: the autograd node, which a function's `ctx` is.
        weight: a leaf among the node's inputs.
    """
    leaf = next((edge for edge, _ in node.next_functions if getattr(edge, "variable", None) is weight), None)
    if leaf is None:  # not a leaf, so not ours to replace
        return "returned"
    try:
        return "accumulated" if torch._C._will_engine_execute_node(leaf) else None
    except RuntimeError:  # torch cannot say it of leaves whose gradients are returned
        return "returned"


def why_not_patchable(module: nn.Module) -> str | None:
    """Why `patch_linear` cannot serve a module, in words; `None` where it can."""
    if was(type(module)) is not nn.Linear:
        return f"it is of class {type(module).__name__}, and not a plain nn.Linear"
    attribute = forward_attribute(module)
    if attribute is not None and not _is_linears(module.__dict__[attribute], module):
        return "its forward has been replaced"
    return None


def _is_linears(forward: Any, module: nn.Module) -> bool:
    """Whether this is `nn.Linear.forward`, patched or not, of that module."""
    function = getattr(forward, "__func__", None)
    return getattr(forward, "__self__", None) is module and function in (nn.Linear.forward, ProjectedLinear.forward)


def _rebind(module: nn.Linear, cls: type[nn.Linear]) -> None:
    """Let a module of which somebody has bound `forward` run that of its present class."""
    for attribute in ("forward", "_old_forward"):
        if _is_linears(module.__dict__.get(attribute), module):
            setattr(module, attribute, types.MethodType(cls.forward, module))


class LinearPatch:
    """A patched layer, to be put back with `remove()`; see `patch_linear`."""

    def __init__(self, module: nn.Linear, cls: type[nn.Linear]) -> None:
        self._module = weakref.ref(module)
        self._cls = cls  # that it had

    def remove(self) -> None:
        """Make the layer a plain `nn.Linear` again."""
        module = self._module()
        if module is not None and was(type(module)) is ProjectedLinear:
            del module.__dict__["_galore_sink"]
            module.__class__ = self._cls
            _rebind(module, self._cls)


def patch_linear(module: nn.Module, sink: weakref.ref[Any]) -> LinearPatch:
    """Send the gradient of a layer's weight to `sink`, which is referred to weakly.

    Raises:
        ValueError: the module is no plain `nn.Linear`; see `why_not_patchable`.
    """
    reason = why_not_patchable(module)
    if reason is not None:
        raise ValueError(f"The projected backward cannot serve this module: {reason}.")
    # The class and not an attribute `forward`: a copy of the module would run the original's weight.
    cls = type(module)
    module.__class__ = as_unit(ProjectedLinear, cls)
    patched = cast("ProjectedLinear", module)
    patched._galore_sink = sink
    _rebind(patched, ProjectedLinear)
    return LinearPatch(patched, cast("type[nn.Linear]", cls))
