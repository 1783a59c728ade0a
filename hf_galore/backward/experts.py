"""The projected backward of experts: the low-rank gradient of a stack of weights straight from the factors.

A module of experts has the weights of all in one parameter of k × m × n, and multiplies with it in one of three ways:
all groups of tokens in one operation (`grouped_mm`), one expert after the other (`F.linear(x, weight[i])`, or
`x @ weight[i]`), or every expert with as many tokens (`bmm`). While the module's `forward` runs these products are
recognised, whatever library the module is from, and computed by functions that hand δ and X to a sink. Any other use
of the parameter is autograd's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, cast

import torch
import torch.autograd.forward_ad as fwAD
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..lowrank.grouped import GroupedGradient, grouped_mm
from ..lowrank.products import FactoredGradient
from .linear import asked_for


class StackGradientSink(Protocol):
    """Where the factors of a stack's gradient go."""

    def serves(self, weight: Tensor) -> bool:
        """Whether `gradient_of_stack` may be asked for this weight; called in the forward pass."""

    def gradient_of_stack(self, weight: Tensor, factors: FactoredGradient | GroupedGradient) -> Tensor | None:
        """What stands for the gradient of one use of a stack; `None` where the gradient itself has to."""


class _How(NamedTuple):
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


class _Grouped(torch.autograd.Function):
    """All groups of rows with their weights, as `grouped_mm`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, ends: Tensor, how: _How) -> Tensor:
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
        how: _How = ctx.how
        delta = delta.contiguous()
        grad_weight = None
        if ctx.needs_input_grad[1]:
            a, b = how.factors(delta, x)
            grad_weight = _gradient(ctx, ctx.weight, how.sink, GroupedGradient(a, b, ends))
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grouped_mm(delta, weight if how.columns_in else weight.mT, offs=ends)
        return grad_x, grad_weight, None, None


class _Batched(torch.autograd.Function):
    """As many rows for each weight, as `bmm`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, how: _How) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.weight = weight
        ctx.how = how
        return torch.bmm(x, weight.mT if how.columns_in else weight)

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        how: _How = ctx.how
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = _gradient(ctx, ctx.weight, how.sink, FactoredGradient(*how.factors(delta, x)))
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.bmm(delta, weight if how.columns_in else weight.mT)
        return grad_x, grad_weight, None


class _Uses:
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


class _Slices(torch.autograd.Function):
    """The weights of a stack one by one."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, uses: _Uses, sink: StackGradientSink) -> tuple[Tensor, ...]:
        ctx.weight = weight
        ctx.uses = uses
        ctx.sink = sink
        ctx.set_materialize_grads(False)
        return weight.unbind()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, None, None]:
        weight: Tensor = ctx.weight
        factors = ctx.uses.take(weight)
        # What other uses of single weights have brought: those of `_Slice` bring a zero that is in no memory.
        others = {i: g for i, g in enumerate(gradients) if g is not None and any(g.stride())}
        if factors is not None and not others:
            return _gradient(ctx, weight, ctx.sink, factors), None, None
        if asked_for(ctx, weight) is None or not (others or factors is not None):
            return None, None, None
        whole = weight.new_zeros(weight.shape) if factors is None else factors.whole().to(weight.dtype)
        added = [whole[i] + others[i] if i in others else whole[i] for i in range(len(weight))]
        return torch.stack(added), None, None


class _Slice(torch.autograd.Function):
    """The product of rows with one weight of a stack, as `F.linear` or `matmul`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, index: int, uses: _Uses, how: _How) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.index, ctx.uses, ctx.how = index, uses, how
        weight = weight.to(x.dtype)
        return F.linear(x, weight) if how.columns_in else x @ weight

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        x, weight = ctx.saved_tensors
        how: _How = ctx.how
        grad_weight = None
        if ctx.needs_input_grad[1] and _is_asked_for(ctx):
            a, b = how.factors(delta.reshape(-1, delta.shape[-1]), x.reshape(-1, x.shape[-1]))
            if torch.is_grad_enabled():
                grad_weight = (a.mT @ b).to(weight.dtype)
            else:
                ctx.uses.add(ctx.index, a, b)
                grad_weight = weight.new_zeros(()).expand(weight.shape)
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


class _Use(NamedTuple):
    """What a tensor is of a stack."""

    weight: Tensor
    number: int | None
    """That of one of its weights."""
    is_transposed: bool
    tensor: Tensor
    """Itself: as long as it is known by its id it has to be there."""


_TRANSPOSES: tuple[Any, ...] = (
    *(Tensor.mT.__get__, Tensor.T.__get__, Tensor.t, torch.t),  # type: ignore[attr-defined]
    *(Tensor.transpose, torch.transpose, Tensor.swapaxes, torch.swapaxes),
)
_MATMULS: tuple[Any, ...] = (Tensor.matmul, Tensor.__matmul__, torch.matmul, Tensor.mm, torch.mm)
_BATCHED: tuple[Any, ...] = (torch.bmm, Tensor.bmm, torch.matmul, Tensor.matmul, Tensor.__matmul__)
_GROUPED: tuple[Any, ...] = tuple(
    function for function in (grouped_mm, getattr(torch, "_grouped_mm", None)) if function is not None
)


class _Watch(TorchFunctionMode):
    """Recognises products with stacks while a module's `forward` runs.

    Args:
        stacks: by their ids.
        sink: where the factors go.
    """

    def __init__(self, stacks: Mapping[int, Tensor], sink: StackGradientSink) -> None:
        super().__init__()
        self._sink = sink
        self._known = {key: _Use(weight, None, False, weight) for key, weight in stacks.items()}
        self._slices: dict[int, tuple[tuple[Tensor, ...], _Uses]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.is_grad_enabled():
            if func is F.linear:
                made = self._linear(*args, **kwargs)
            elif func is Tensor.__getitem__:
                made = self._item(*args)
            elif func in _TRANSPOSES:
                return self._transposed(func, args, kwargs)
            elif func in _GROUPED:
                made = self._grouped(*args, **kwargs)
            else:
                made = self._product(func, args) if not kwargs else None
            if made is not None:
                return made
        return func(*args, **kwargs)

    def _use(self, tensor: Any) -> _Use | None:
        return self._known.get(id(tensor))

    def _remember(self, tensor: Tensor, use: _Use) -> Tensor:
        self._known[id(tensor)] = use._replace(tensor=tensor)
        return tensor

    def _transposed(self, func: Any, args: Any, kwargs: Any) -> Any:
        """A transpose of a stack, or of a weight of one: of the last two dimensions, as products need it."""
        made = func(*args, **kwargs)
        use = self._use(args[0])
        if use is not None and made.shape == use.tensor.mT.shape and made.stride() == use.tensor.mT.stride():
            self._remember(made, use._replace(is_transposed=not use.is_transposed))
        return made

    def _item(self, tensor: Any, index: Any) -> Tensor | None:
        use = self._use(tensor)
        if use is None or use.number is not None or use.is_transposed or isinstance(index, (bool, slice, tuple, list)):
            return None
        if isinstance(index, Tensor) and (index.ndim != 0 or index.dtype == torch.bool):
            return None
        if index is None or index is Ellipsis:
            return None
        number = int(index)
        if not -len(use.weight) <= number < len(use.weight):
            return None  # torch says so
        if id(use.weight) not in self._slices:
            uses = _Uses()
            self._slices[id(use.weight)] = cast("Any", _Slices.apply(use.weight, uses, self._sink)), uses
        number %= len(use.weight)
        return self._remember(self._slices[id(use.weight)][0][number], use._replace(number=number))

    def _linear(self, input: Tensor, weight: Any = None, bias: Tensor | None = None) -> Tensor | None:
        return self._of_slice(input, weight, columns_in=True, bias=bias)

    def _product(self, func: Any, args: Any) -> Tensor | None:
        if len(args) != 2:
            return None
        if func in _MATMULS:
            made = self._of_slice(*args, columns_in=False)
            if made is not None:
                return made
        if func in _BATCHED:
            x, use = args[0], self._use(args[1])
            is_served = use is not None and use.number is None and isinstance(x, Tensor) and x.ndim == 3
            if use is not None and is_served and len(x) == len(use.weight) and x.dtype == use.weight.dtype:
                if torch.is_autocast_enabled(x.device.type):
                    return None
                return cast("Tensor", _Batched.apply(x, use.weight, _How(self._sink, use.is_transposed)))
        return None

    def _of_slice(self, x: Any, weight: Any, *, columns_in: bool, bias: Tensor | None = None) -> Tensor | None:
        use = self._use(weight)
        if use is None or use.number is None or not isinstance(x, Tensor) or x.ndim < 2:
            return None
        device_type = x.device.type
        if torch.is_autocast_enabled(device_type) and torch.float64 not in (x.dtype, weight.dtype):
            # What autocast does to these operations, which it cannot see inside a custom function.
            x = x.to(torch.get_autocast_dtype(device_type))
            bias = None if bias is None else bias.to(x.dtype)
        elif x.dtype != weight.dtype:
            return None
        slices, uses = self._slices[id(use.weight)]
        how = _How(self._sink, columns_in != use.is_transposed)
        made = cast("Tensor", _Slice.apply(x, slices[use.number], use.number, uses, how))
        return made if bias is None else made + bias

    def _grouped(self, x: Any, weight: Any, *rest: Any, offs: Tensor | None = None, **others: Any) -> Tensor | None:
        use = self._use(weight)
        if use is None or use.number is not None or offs is None or rest or any(v is not None for v in others.values()):
            return None
        if x.ndim != 2 or x.dtype != use.weight.dtype or grouped_mm is None:
            return None
        return cast("Tensor", _Grouped.apply(x, use.weight, offs, _How(self._sink, use.is_transposed)))


def run_watched(
    forward: Callable[..., Any], module: nn.Module, sink: StackGradientSink | None, args: Any, kwargs: Any
) -> Any:
    """The output of a module's own `forward`, with the products of its stacks recognised.

    Args:
        forward: the module's.
        module: that has the stacks.
        sink: where the factors go; `None` where nobody asks for them any more.
        args: of `forward`.
        kwargs: likewise.
    """
    stacks = {}
    if sink is not None and torch.is_grad_enabled():
        own = (param for param in module.parameters(recurse=False) if param.ndim == 3 and param.requires_grad)
        stacks = {id(param): param for param in own if sink.serves(param)}
    # Functions that are transformed (torch.func, forward-mode gradients) need operations that torch knows.
    if not stacks or torch._C._functorch.peek_interpreter_stack() is not None or fwAD._current_level >= 0:
        return forward(*args, **kwargs)
    assert sink is not None
    with _Watch(stacks, sink):
        return forward(*args, **kwargs)
