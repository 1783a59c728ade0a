"""The products with stacks of weights that a module's `forward` computes, recognised while it runs.

Whatever library the module is from. They are computed by the functions of `hf_galore.backward.experts`; any other use
of the parameter is autograd's.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import torch
import torch.autograd.forward_ad as fwAD
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..lowrank.grouped import grouped_mm
from .experts import Batched, Grouped, How, Slice, Slices, StackGradientSink, Uses
from .passes import reentrant_segment


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
        self._slices: dict[int, tuple[tuple[Tensor, ...], Uses]] = {}
        self._saving = _saved_tensors_hooks()
        self._served: set[int] = set()
        self._others: set[int] = set()

    @property
    def missed(self) -> bool:
        """Whether a stack was used that is in none of the products."""
        return not self._others <= self._served

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # A part of it may be in a checkpoint, which runs it again when nothing is watched: it has to save the same.
        if torch.is_grad_enabled() and _saved_tensors_hooks() == self._saving:
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
        elif not torch.is_grad_enabled():
            self._note_segment(args)
        made = func(*args, **kwargs)
        if isinstance(made, Tensor) and made.requires_grad:
            self._others.update(id(self._known[id(arg)].weight) for arg in args if id(arg) in self._known)
        return made

    def _note_segment(self, args: Any) -> None:
        """Note the stacks that a reentrant checkpoint uses: their gradient is that of several backward passes."""
        used = [self._known[id(arg)].weight for arg in args if id(arg) in self._known]
        node = reentrant_segment() if used else None
        if node is not None:
            for record in self._sink.passes_of(used):
                record.note_segment(node)

    def _noted(self, use: _Use) -> Tensor:
        """The stack, noted as one of a product."""
        self._served.add(id(use.weight))
        return use.weight

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
        if use is None or use.number is not None or use.is_transposed:
            return None
        number = _number(index)
        if number is None or not -len(use.weight) <= number < len(use.weight):
            return None  # torch says what is wrong
        if id(use.weight) not in self._slices:
            uses = Uses()
            self._slices[id(use.weight)] = cast("Any", Slices.apply(use.weight, uses, self._sink)), uses
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
            if use is None or use.number is not None or not isinstance(x, Tensor) or x.ndim != 3:
                return None
            x = _as_taken(x, use.weight)
            if x is not None and len(x) == len(use.weight):
                return cast("Tensor", Batched.apply(x, self._noted(use), How(self._sink, use.is_transposed)))
        return None

    def _of_slice(self, x: Any, weight: Any, *, columns_in: bool, bias: Tensor | None = None) -> Tensor | None:
        use = self._use(weight)
        if use is None or use.number is None or not isinstance(x, Tensor) or x.ndim < 2:
            return None
        taken = _as_taken(x, weight)
        if taken is None:
            return None
        bias = bias if bias is None or not torch.is_autocast_enabled(x.device.type) else bias.to(taken.dtype)
        slices, uses = self._slices[id(self._noted(use))]
        how = How(self._sink, columns_in != use.is_transposed)
        made = cast("Tensor", Slice.apply(taken, slices[use.number], use.number, uses, how))
        return made if bias is None else made + bias

    def _grouped(self, x: Any, weight: Any, *rest: Any, offs: Tensor | None = None, **others: Any) -> Tensor | None:
        use = self._use(weight)
        if use is None or use.number is not None or offs is None or rest or any(v is not None for v in others.values()):
            return None
        if x.ndim != 2 or x.dtype != use.weight.dtype or grouped_mm is None:
            return None
        return cast("Tensor", Grouped.apply(x, self._noted(use), offs, How(self._sink, use.is_transposed)))


def _as_taken(x: Tensor, weight: Tensor) -> Tensor | None:
    """An input in the dtype that a product takes here; `None` where it is another than the weight's."""
    device_type = x.device.type
    if torch.is_autocast_enabled(device_type) and torch.float64 not in (x.dtype, weight.dtype):
        # What autocast does to these operations, which it cannot see inside a custom function.
        return x.to(torch.get_autocast_dtype(device_type))
    return x if x.dtype == weight.dtype else None


def _number(index: Any) -> int | None:
    """The number of the weight that an index is for; `None` where it is an index of another kind."""
    is_mask = isinstance(index, bool) or (isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8))
    if is_mask or (isinstance(index, Tensor) and index.ndim != 0):
        return None
    try:
        return operator.index(index)
    except TypeError:
        return None


def _saved_tensors_hooks() -> Any:
    """What is done to tensors that are saved for the backward pass here, if anything is."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False)


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
    with _Watch(stacks, sink) as watch:
        made = forward(*args, **kwargs)
    if watch.missed:
        sink.not_recognised(module)
    return made
