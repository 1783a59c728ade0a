"""The projected backward of a linear layer: the low-rank gradient straight from δ and X, with no gradient in between.

For Y = XWᵀ + b, with T rows of X (tokens), the weight's gradient is G = δᵀX. GaLore uses nothing of it but products
with narrow matrices, for which the factors do: `hf_galore.lowrank.products.FactoredGradient`.

Served are `nn.Linear` and transformers' `Conv1D` (GPT-2), whose weight is transposed (Y = XW + b, G = Xᵀδ), and their
subclasses that run their `forward`: whatever else such a class does, its arithmetic is theirs.
"""

from __future__ import annotations

import sys
import types
import weakref
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Protocol, cast

import torch
import torch.autograd.forward_ad as fwAD
import torch.nn.functional as F
from torch import Tensor, nn

from ..int8 import Int8Weight, input_gradient, product
from ..integrations.accelerate import forward_attribute
from ..integrations.fully_shard import as_unit, was
from .patched import Patched, patched_class, why_not_derivable


class LinearGradientSink(Protocol):
    """Where the factors of a patched layer's gradient go.

    They are called after those of an `nn.Linear`, G = δᵀX. Those of a `Conv1D`, G = Xᵀδ, come the other way round.
    """

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


class ProjectedLinear(Patched):
    """What a patched layer's class has before the layer's own: the weight's gradient goes to a sink.

    `patch_linear` gives a layer such a class, and its own back. Copies and pickles of the layer are of its own.
    """

    @torch.compiler.disable  # type: ignore[untyped-decorator, unused-ignore]
    def forward(self, input: Tensor) -> Tensor:
        """As `nn.Linear.forward`."""
        return _forward(cast("nn.Module", self), input, _linear, is_transposed=False)


class ProjectedConv1D(ProjectedLinear):
    """The same of transformers' `Conv1D`."""

    @torch.compiler.disable  # type: ignore[untyped-decorator, unused-ignore]
    def forward(self, x: Tensor) -> Tensor:
        """As `Conv1D.forward`."""
        return _forward(cast("nn.Module", self), x, _conv1d, is_transposed=True)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight, bias)


def _conv1d(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    assert bias is not None
    return torch.addmm(bias, x.view(-1, x.size(-1)), weight).view(*x.size()[:-1], weight.size(-1))


def _forward(module: nn.Module, x: Tensor, plain: _Plain, *, is_transposed: bool) -> Tensor:
    """The output of a patched layer, or of one that is plain again.

    Args:
        module: the layer.
        x: its input.
        plain: what the layer computes.
        is_transposed: whether its weight is n × m.
    """
    # Of a layer that is plain again somebody may have kept its method, as accelerate's wrapper does.
    ref: weakref.ref[LinearGradientSink] | None = module.__dict__.get("_galore_sink")
    sink = None if ref is None else ref()
    weight = cast("Tensor", module.weight)
    bias = cast("Tensor | None", module.bias)
    if sink is None or not torch.is_grad_enabled() or not weight.requires_grad:
        return plain(x, weight, bias)
    shard = None
    if not sink.serves(weight):
        shard = sink.shard_of(module, weight)
        if shard is None:
            return plain(x, weight, bias)
    # Functions that are transformed (torch.func, forward-mode gradients) need operations that torch knows.
    if torch._C._functorch.peek_interpreter_stack() is not None or fwAD._current_level >= 0:
        return plain(x, weight, bias)
    device_type = x.device.type
    if torch.is_autocast_enabled(device_type) and x.dtype != torch.float64 and weight.dtype != torch.float64:
        # What autocast does to these operations, which it cannot see inside a custom function.
        dtype = torch.get_autocast_dtype(device_type)
        x = x.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    elif x.dtype != weight.dtype:
        return plain(x, weight, bias)  # raises, as it does unpatched
    how = _How(plain, is_transposed, sink, shard)
    return cast("Tensor", _ProjectedLinearFunction.apply(x, weight, bias, how))


_Plain = Callable[[Tensor, Tensor, "Tensor | None"], Tensor]


class _How(NamedTuple):
    """What is no input to autograd. The shard would be sent a gradient of nothing, and its hooks be called."""

    plain: _Plain
    is_transposed: bool
    sink: LinearGradientSink
    shard: Tensor | None

    def factors(self, rows: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """The two whose product, the first transposed, is the weight's gradient; from δ and X."""
        return (inputs, rows) if self.is_transposed else (rows, inputs)

    def gradient_of(self, weight: Tensor, factors: tuple[Tensor, Tensor]) -> Tensor | None:
        """What the sink has for the gradient."""
        if self.shard is None:
            return self.sink.gradient_of(weight, *factors)
        return self.sink.gradient_of_gathered(self.shard, weight, *factors)


class _ProjectedLinearFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, how: _How) -> Tensor:
        ctx.save_for_backward(x, weight)
        # A checkpointed part gives back a copy of what was saved, which the sink would not know.
        ctx.weight = weight
        ctx.how = how
        ctx.has_bias = bias is not None
        out = how.plain(x, weight.to(x.dtype), bias)
        # With a bias torch gives a view, which autograd would not let be changed in place (`nn.ReLU(inplace=True)`).
        return torch.ops.aten._unsafe_view(out, out.shape) if out._is_view() else out

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        how: _How = ctx.how
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        rows = delta.reshape(-1, delta.shape[-1])
        grad_bias = rows.sum(dim=0) if ctx.has_bias and needs_bias else None
        grad_weight = None
        asked = asked_for(ctx, ctx.weight) if needs_weight else None
        if asked is not None:
            factors = how.factors(rows, x.reshape(-1, x.shape[-1]))
            # First of all: a refresh takes the most memory, and the input's gradient is as large as the input. With
            # create_graph=True the gradient itself is to be differentiated.
            if asked == "accumulated" and not torch.is_grad_enabled():
                grad_weight = how.gradient_of(ctx.weight, factors)
            if grad_weight is None:
                grad_weight = (factors[0].mT @ factors[1]).to(weight.dtype)
        grad_x = None
        if needs_x and isinstance(weight, Int8Weight):
            grad_x = product(delta, weight) if how.is_transposed else input_gradient(delta, weight)
        elif needs_x and how.is_transposed:
            grad_x = (rows @ weight.to(rows.dtype).mT).view(x.shape)
        elif needs_x:
            grad_x = delta @ weight.to(delta.dtype)
        return grad_x, grad_weight, grad_bias, None


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


class _Kind(NamedTuple):
    """A class of layers that is served, and what its patched ones have before their own."""

    base: type[nn.Module]
    patch: type[ProjectedLinear]


def _kinds() -> list[_Kind]:
    kinds = [_Kind(nn.Linear, ProjectedLinear)]
    module = sys.modules.get("transformers.pytorch_utils")  # without which there is no such layer
    if module is not None:
        kinds.append(_Kind(module.Conv1D, ProjectedConv1D))
    return kinds


def _kind_of(cls: type[nn.Module]) -> _Kind | str:
    """The kind that layers of a class are, or why they are of none."""
    kind = next((kind for kind in _kinds() if issubclass(cls, kind.base)), None)
    if kind is None:
        return f"it is of class {cls.__name__}, and neither an nn.Linear nor a Conv1D"
    if cls.forward is not kind.base.forward:
        return f"its class {cls.__name__} has a forward of its own"
    return why_not_derivable(cls, kind.patch, kind.base) or kind


def why_not_patchable(module: nn.Module) -> str | None:
    """Why `patch_linear` cannot serve a module, in words; `None` where it can, or has."""
    cls: Any = was(type(module))
    kind = _kind_of(cls.original if issubclass(cls, ProjectedLinear) else cls)
    if isinstance(kind, str):
        return kind
    attribute = forward_attribute(module)
    if attribute is not None and not _is_plain(module.__dict__[attribute], module, kind):
        return "its forward has been replaced"
    return None


def _is_plain(forward: Any, module: nn.Module, kind: _Kind) -> bool:
    """Whether this is the `forward` of such layers, patched or not, of that module."""
    function = getattr(forward, "__func__", None)
    return getattr(forward, "__self__", None) is module and function in (kind.base.forward, kind.patch.forward)


def _rebind(module: nn.Module, cls: type, kind: _Kind) -> None:
    """Let a module of which somebody has bound `forward` run that of its present class."""
    for attribute in ("forward", "_old_forward"):
        if _is_plain(module.__dict__.get(attribute), module, kind):
            setattr(module, attribute, types.MethodType(cls.forward, module))  # type: ignore[attr-defined]


class LinearPatch:
    """A patched layer, to be put back with `remove()`; see `patch_linear`."""

    def __init__(self, module: nn.Module, cls: type[nn.Module], kind: _Kind) -> None:
        self._module = weakref.ref(module)
        self._cls = cls  # that it had
        self._patched = was(type(module))
        self._kind = kind

    def remove(self) -> None:
        """Give the layer its own class again."""
        module = self._module()
        if module is not None and was(type(module)) is self._patched:
            del module.__dict__["_galore_sink"]
            module.__class__ = self._cls
            _rebind(module, self._cls, self._kind)


def patch_linear(module: nn.Module, sink: weakref.ref[Any]) -> LinearPatch:
    """Send the gradient of a layer's weight to `sink`, which is referred to weakly.

    Raises:
        ValueError: the module is no layer that can be; see `why_not_patchable`.
    """
    reason = "it has been patched" if isinstance(module, ProjectedLinear) else why_not_patchable(module)
    if reason is not None:
        raise ValueError(f"The projected backward cannot serve this module: {reason}.")
    cls = type(module)
    kind = _kind_of(was(cls))
    assert not isinstance(kind, str)
    module.__class__ = as_unit(patched_class(was(cls), kind.patch), cls)
    module.__dict__["_galore_sink"] = sink
    _rebind(module, kind.patch, kind)
    return LinearPatch(module, cls, kind)
