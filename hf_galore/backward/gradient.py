"""The low-rank gradient of a target, in the target's `.grad`: where training loops look for gradients.

Hooks into the backward pass leave R = PᵀG, GQ or PᵀGQ there instead of G, as a tensor of the weight's shape that holds
nothing but R. What is linear in G acts on R: adding, scaling, unscaling, and so clipping and dropping. What needs G
itself is refused with words for the way out, because a gradient that is silently something else trains something else.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar, cast

import torch
from torch import Tensor

from ..lowrank.projection import norm_of

_aten = torch.ops.aten


def in_backward() -> bool:
    """Whether autograd is running a backward pass on this thread."""
    return torch._C._current_graph_task_id() != -1


class BasisVersion:
    """One basis of one target, until its next refresh: low-rank gradients add up only within it.

    Args:
        name: of the parameter.
        project: gives the low-rank gradient of a gradient.
    """

    __slots__ = ("name", "project")

    def __init__(self, name: str, project: Callable[[Tensor], Tensor]) -> None:
        self.name = name
        self.project = project


class UncommittedRefresh:
    """A refresh that was computed from one of a weight's gradients, to be used if it turns out to be the only one.

    Args:
        made: what the optimizer makes of it, if so.
        gradient: gives the gradient that it was computed from, m × n.
    """

    __slots__ = ("gradient", "made")

    def __init__(self, made: Any, gradient: Callable[[], Tensor]) -> None:
        self.made = made
        self.gradient = gradient


class StandIn(Tensor):
    """A tensor with a parameter's shape, dtype and device, and without its elements."""

    @staticmethod
    def __new__(
        cls, like: Tensor, *args: Any, dtype: torch.dtype | None = None, device: Any = None, **kwargs: Any
    ) -> Any:
        return Tensor._make_wrapper_subclass(
            cls, like.shape, strides=like.stride(), dtype=dtype or like.dtype, device=device or like.device
        )

    def stored(self) -> list[Tensor]:
        """The tensors that are in memory."""
        raise NotImplementedError

    # What tools that add up the memory of gradients ask for.

    def numel(self) -> int:
        """The elements that are in memory."""
        return sum(tensor.numel() for tensor in self.stored())

    nelement = numel

    @property
    def nbytes(self) -> int:  # type: ignore[override]
        """The bytes that are in memory."""
        return sum(tensor.nbytes for tensor in self.stored())

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        held = ", ".join(f"{tuple(tensor.shape)}" for tensor in self.stored()) or "nothing"
        return f"{type(self).__name__}(shape={tuple(self.shape)}, dtype={self.dtype}, holding {held})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(f"A {type(self).__name__} cannot be pickled. Call optimizer.zero_grad() before.")

    def __deepcopy__(self, memo: Any) -> Any:
        return self.detach().clone()


@dataclasses.dataclass(slots=True)
class _Content:
    """What a low-rank gradient and its aliases (`.data`, `.detach()`) have in common."""

    low_rank: Tensor
    basis: BasisVersion
    norm_of_whole: Tensor | None = None
    is_zero: bool = False
    is_lost: bool = False
    uncommitted: UncommittedRefresh | None = None
    addend: Tensor | None = None


def _shared(name: str, doc: str) -> Any:
    """A property of a low-rank gradient that its aliases share."""

    def read(self: LowRankGradient) -> Any:
        return getattr(self.content, name)

    def write(self: LowRankGradient, value: Any) -> None:
        setattr(self.content, name, value)

    return property(read, write, doc=doc)


class LowRankGradient(StandIn):
    """The gradient of a target of m × n, of which only R is there.

    Args:
        like: the parameter.
        low_rank: R.
        basis: the basis that R is in.
        norm: ‖G‖_F, 0-dimensional, where G was at hand; else the norm of R stands for it.
        is_zero: whether G is known to be zero.
        is_lost: whether G is known not to be finite: nothing that is added changes that.
        uncommitted: the refresh that R comes from, where it is not yet the optimizer's.
    """

    content: _Content
    low_rank: Tensor = _shared("low_rank", "R.")
    basis: BasisVersion = _shared("basis", "The basis that R is in.")
    norm_of_whole: Tensor | None = _shared("norm_of_whole", "‖G‖_F, where it is known.")
    is_zero: bool = _shared("is_zero", "Whether G is known to be zero.")
    is_lost: bool = _shared("is_lost", "Whether G is known not to be finite.")
    uncommitted: UncommittedRefresh | None = _shared("uncommitted", "The refresh that R comes from, if not yet used.")
    addend: Tensor | None = _shared(
        "addend", "A gradient that has arrived on top of a zero one, m × n: the basis is to be made from it."
    )

    def __init__(
        self,
        like: Tensor,
        low_rank: Tensor,
        basis: BasisVersion,
        *,
        norm: Tensor | None = None,
        is_zero: bool = False,
        is_lost: bool = False,
        uncommitted: UncommittedRefresh | None = None,
        dtype: torch.dtype | None = None,
        device: Any = None,
    ) -> None:
        self.content = _Content(low_rank, basis, norm, is_zero, is_lost, uncommitted)

    @property
    def data(self) -> LowRankGradient:
        """An alias, as of any tensor. Setting it gives the gradient other numbers."""
        return cast("LowRankGradient", self.detach())

    @data.setter
    def data(self, value: Tensor) -> None:
        self.copy_(value)

    def stored(self) -> list[Tensor]:
        """R, and what has arrived on top of a zero one."""
        return [self.low_rank] if self.addend is None else [self.low_rank, self.addend]

    def frobenius_norm(self) -> Tensor:
        """‖G‖_F where it is known, else ‖R‖_F; 0-dimensional."""
        return norm_of(self.low_rank) if self.norm_of_whole is None else self.norm_of_whole

    def replace(self, other: LowRankGradient) -> None:
        """Take over the numbers of another one of the same weight."""
        for field in dataclasses.fields(_Content):
            value = getattr(other.content, field.name)
            setattr(self.content, field.name, value.clone() if isinstance(value, Tensor) else value)

    def with_low_rank(self, low_rank: Tensor, norm: Tensor | None) -> LowRankGradient:
        """One with another R in the same basis."""
        made = LowRankGradient(
            self, low_rank, self.basis, norm=norm, is_zero=self.is_zero, dtype=low_rank.dtype, device=low_rank.device
        )
        made.is_lost, made.uncommitted, made.addend = self.is_lost, self.uncommitted, self.addend
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Made of several operations each, one of which is not linear.
        check = _CHECKS.get(func)
        if check is not None and isinstance(args[0], LowRankGradient):
            return check(args[0].low_rank).expand(args[0].shape)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if UsedGradient in types:
            return NotImplemented
        implementation = _LOW_RANK.get(func.overloadpacket)
        result = NotImplemented if implementation is None else implementation(func, *args, **(kwargs or {}))
        if result is NotImplemented:
            _refuse(func, args)
        return result


class UsedGradient(StandIn):
    """What is left in `.grad` of a weight that was updated during the backward pass: nothing, and words.

    Args:
        like: the parameter.
        name: of the parameter.
    """

    parameter: str
    norm_of_whole: Tensor | None
    """The norm of the gradient that was used."""
    was_zeroed: bool
    """Whether somebody has set it to zero since, as `zero_grad(set_to_none=False)` does: another gradient may come."""
    addend: Tensor | None
    """The gradient that has come then."""

    def __init__(self, like: Tensor, name: str) -> None:
        self.parameter = name
        self.start(None)

    def start(self, norm: Tensor | None) -> None:
        """Stand for another gradient, of this norm."""
        self.norm_of_whole, self.was_zeroed, self.addend = norm, False, None

    def stored(self) -> list[Tensor]:
        """What has arrived since it was zeroed."""
        return [] if self.addend is None else [self.addend]

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        operation = func.overloadpacket
        used = next(leaf for leaf in _leaves(args) if isinstance(leaf, UsedGradient))
        if operation in (_aten.detach, _aten.alias):
            return args[0]
        if operation is _aten.zero_:
            used.was_zeroed = True
            return used
        if operation in (_aten._foreach_zero_, _aten._foreach_norm):
            return _LOW_RANK[operation](func, *args, **(kwargs or {}))
        if operation is _aten.linalg_vector_norm and used.norm_of_whole is not None and _is_2_norm(used, *args[1:]):
            return used.norm_of_whole
        if operation is _aten.add_ and args[0] is used and isinstance(args[1], Tensor):
            if used.was_zeroed:
                used.addend = args[1].clone() if used.addend is None else used.addend + args[1]
                return used
            raise RuntimeError(
                f"A second gradient arrived for {used.parameter}, which this step's backward pass has already updated: "
                "backward ran twice before optimizer.step(), or a reentrant checkpoint and something else use the "
                "weight. Make the optimizer with hold_gradients=True (a Trainer does for max_grad_norm above 0), or "
                "call backward once a step."
            )
        raise RuntimeError(
            f"{used.parameter}.grad is gone: a layerwise optimizer has updated the weight with it during the backward "
            f"pass, so {operation.__name__} comes too late. To clip, unscale, change or look at gradients make the "
            "optimizer with hold_gradients=True (with a Trainer: max_grad_norm above 0), which keeps them for step(), "
            "and clip by optimizer.clip_grad_norm_."
        )


def _leaves(values: Sequence[Any]) -> list[Any]:
    return [leaf for value in values for leaf in (value if isinstance(value, (list, tuple)) else (value,))]


def _refuse(func: Any, args: Any) -> NoReturn:
    gradient = next(leaf for leaf in _leaves(args) if isinstance(leaf, LowRankGradient))
    raise RuntimeError(
        f"{gradient.basis.name}.grad is a low-rank gradient, {tuple(gradient.low_rank.shape)} in place of "
        f"{tuple(gradient.shape)}: {func.overloadpacket.__name__} needs the gradient itself, which was never built or "
        "is gone. It can be scaled, added to, zeroed, unscaled by a GradScaler, its 2-norm taken, clipped (by "
        "optimizer.clip_grad_norm_ or torch.nn.utils.clip_grad_norm_), or dropped. For all else make the optimizer "
        "with layerwise=False and projected_backward=False (with a Trainer: an optim without _layerwise)."
    )


# ---- what is linear

Implementation = Callable[..., Any]
_LOW_RANK: dict[Any, Implementation] = {}
F = TypeVar("F", bound=Implementation)


def _implements(*operations: Any) -> Callable[[F], F]:
    def register(function: F) -> F:
        _LOW_RANK.update((operation, function) for operation in operations)
        return function

    return register


def _is_factor(value: Any) -> bool:
    """Whether it multiplies all elements alike."""
    return not isinstance(value, Tensor) or (value.ndim == 0 and type(value) is not LowRankGradient)


@_implements(_aten.detach, _aten.alias)
def _same(func: Any, gradient: LowRankGradient) -> LowRankGradient:
    made = gradient.with_low_rank(gradient.low_rank, gradient.norm_of_whole)
    made.content = gradient.content
    return made


@_implements(_aten.clone)
def _clone(func: Any, gradient: LowRankGradient, **_: Any) -> LowRankGradient:
    made = gradient.with_low_rank(gradient.low_rank, None)
    made.replace(gradient)
    return made


@_implements(_aten._to_copy)
def _to_copy(
    func: Any, gradient: LowRankGradient, *, dtype: Any = None, device: Any = None, **_: Any
) -> LowRankGradient:
    low_rank = gradient.low_rank.to(device=device, dtype=dtype, copy=True)
    norm = gradient.norm_of_whole
    return gradient.with_low_rank(low_rank, None if norm is None else norm.to(low_rank.device))


@_implements(_aten.new_empty_strided, _aten.zeros_like, _aten.empty_like)
def _zeros(func: Any, gradient: LowRankGradient, *args: Any, **_: Any) -> Any:
    if func.overloadpacket is _aten.new_empty_strided and tuple(args[0]) != tuple(gradient.shape):
        return NotImplemented
    made = gradient.with_low_rank(torch.zeros_like(gradient.low_rank), None)
    made.uncommitted = made.addend = None
    made.is_zero, made.is_lost = True, False
    return made


@_implements(_aten.copy_)
def _copy_(func: Any, gradient: Any, other: Any, *_: Any) -> Any:
    if not isinstance(gradient, LowRankGradient):
        return NotImplemented
    if isinstance(other, LowRankGradient):
        if other.content is not gradient.content:
            gradient.replace(other)
    else:
        gradient.low_rank.copy_(gradient.basis.project(other))
        gradient.norm_of_whole = gradient.uncommitted = gradient.addend = None
        gradient.is_zero = gradient.is_lost = False
    return gradient


@_implements(_aten.zero_)
def _zero_(func: Any, gradient: LowRankGradient) -> LowRankGradient:
    gradient.low_rank.zero_()
    gradient.norm_of_whole = gradient.uncommitted = gradient.addend = None
    gradient.is_zero, gradient.is_lost = True, False
    return gradient


@_implements(_aten.mul, _aten.div, _aten.mul_, _aten.div_)
def _scale(func: Any, gradient: Any, factor: Any, **_: Any) -> Any:
    if func.overloadpacket is _aten.mul and isinstance(factor, LowRankGradient):
        gradient, factor = factor, gradient
    if not isinstance(gradient, LowRankGradient) or not _is_factor(factor):
        return NotImplemented
    in_place = func.overloadpacket in (_aten.mul_, _aten.div_)
    operation = torch.mul if func.overloadpacket in (_aten.mul, _aten.mul_) else torch.div
    norm, addend = gradient.norm_of_whole, gradient.addend
    if norm is not None:
        norm = operation(norm, factor).abs()
    if addend is not None:
        addend = operation(addend, factor)
    uncommitted = gradient.uncommitted
    if uncommitted is not None:  # the basis of a multiple is the same
        whole = uncommitted.gradient
        uncommitted = UncommittedRefresh(uncommitted.made, lambda: operation(whole(), factor))
    if in_place:
        operation(gradient.low_rank, factor, out=gradient.low_rank)
        made = gradient
    else:
        made = gradient.with_low_rank(operation(gradient.low_rank, factor), None)
    made.norm_of_whole, made.addend, made.uncommitted = norm, addend, uncommitted
    return made


@_implements(_aten.neg)
def _negative(func: Any, gradient: LowRankGradient) -> Any:
    return gradient * -1


@_implements(_aten.add, _aten.sub)
def _add(func: Any, a: Any, b: Any, *, alpha: Any = 1) -> Any:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor) or a.shape != b.shape:
        return NotImplemented
    alpha = -alpha if func.overloadpacket is _aten.sub else alpha
    known_zero = [isinstance(value, LowRankGradient) and value.is_zero and value.addend is None for value in (a, b)]
    if not isinstance(a, LowRankGradient) and not in_backward():
        return NotImplemented  # autograd adds up gradients in any order; else this is something plus a gradient
    lost = next((value for value in (a, b) if isinstance(value, LowRankGradient) and value.is_lost), None)
    if lost is not None:
        return lost.clone()
    if known_zero[1]:
        return a.clone()
    if known_zero[0]:
        return b.clone() if alpha == 1 else b * alpha
    if any(isinstance(value, LowRankGradient) and value.uncommitted is not None for value in (a, b)):
        # A basis is due, and neither is all of the gradient that it has to come from.
        first, second = _whole(a), _whole(b)
        return NotImplemented if first is None or second is None else first.add(second, alpha=alpha)
    low_rank, other = _low_rank_of(a, b), _low_rank_of(b, a)
    gradient = cast("LowRankGradient", a if isinstance(a, LowRankGradient) else b)
    return gradient.with_low_rank(low_rank.add(other, alpha=alpha), None)


def _whole_of(gradient: LowRankGradient) -> Tensor:
    whole = _whole(gradient)
    if whole is None:
        raise RuntimeError(
            f"{gradient.basis.name}.grad has a gradient that waits for its refresh, to which a low-rank one cannot be "
            "added. Call optimizer.step() before, or make the optimizer with projected_backward=False."
        )
    return whole


def _whole(value: Tensor) -> Tensor | None:
    """The gradient itself, m × n, where it is at hand."""
    if not isinstance(value, LowRankGradient):
        return value
    return None if value.uncommitted is None else value.uncommitted.gradient()


@_implements(_aten.add_, _aten.sub_)
def _add_(func: Any, gradient: Any, other: Any, *, alpha: Any = 1) -> Any:
    if not isinstance(gradient, LowRankGradient) or not isinstance(other, Tensor) or gradient.shape != other.shape:
        return NotImplemented
    alpha = -alpha if func.overloadpacket is _aten.sub_ else alpha
    if gradient.is_lost or (isinstance(other, LowRankGradient) and other.is_zero and other.addend is None):
        return gradient
    if gradient.is_zero:
        other = other if alpha == 1 else other * alpha
        if gradient.addend is not None:
            other = gradient.addend + (other if not isinstance(other, LowRankGradient) else _whole_of(other))
        if isinstance(other, LowRankGradient):
            gradient.replace(other)
        else:
            gradient.addend = other.clone()
        return gradient
    gradient.low_rank.add_(_low_rank_of(other, gradient), alpha=alpha)
    gradient.norm_of_whole = None  # that of the first part, no longer of the whole
    return gradient


def _low_rank_of(value: Tensor, beside: Tensor) -> Tensor:
    """The R of a value in the basis of what it is added to, if not of its own."""
    if not isinstance(value, LowRankGradient):
        return cast("LowRankGradient", beside).basis.project(value)
    if isinstance(beside, LowRankGradient) and beside.basis is not value.basis:
        raise RuntimeError(
            f"Two low-rank gradients of {value.basis.name} are of different bases: there was a refresh, or a pass was "
            "dropped, between them. Call optimizer.zero_grad() before each step's first backward pass; to keep "
            "gradients over several steps make the optimizer with layerwise=False and projected_backward=False."
        )
    return value.low_rank


# ---- norms


def _is_2_norm(gradient: Tensor, ord: Any = 2, dim: Any = None, keepdim: bool = False) -> bool:
    """Whether a norm is that of the whole gradient as a vector."""
    return ord == 2 and (dim is None or len(dim) in (0, gradient.ndim)) and not keepdim


@_implements(_aten.linalg_vector_norm)
def _norm(
    func: Any, gradient: LowRankGradient, ord: Any = 2, dim: Any = None, keepdim: bool = False, *, dtype: Any = None
) -> Any:
    if not _is_2_norm(gradient, ord, dim, keepdim):
        return NotImplemented
    norm = gradient.frobenius_norm()
    return norm.to(dtype or gradient.dtype)


@_implements(_aten._foreach_norm)
def _foreach_norm(func: Any, gradients: Sequence[Tensor], ord: Any = 2, *, dtype: Any = None) -> Any:
    return [torch.linalg.vector_norm(gradient, ord, dtype=dtype) for gradient in gradients]


@_implements(_aten.isnan)
def _isnan(func: Any, gradient: LowRankGradient) -> Tensor:
    # For autograd's anomaly mode, too.
    return gradient.low_rank.isnan().any().expand(gradient.shape)


def _any_infinite(low_rank: Tensor) -> Tensor:
    return low_rank.isinf().any()


def _all_finite(low_rank: Tensor) -> Tensor:
    return low_rank.isfinite().all()


_CHECKS: dict[Any, Callable[[Tensor], Tensor]] = {
    torch.isinf: _any_infinite,
    Tensor.isinf: _any_infinite,
    torch.isfinite: _all_finite,
    Tensor.isfinite: _all_finite,
}


# ---- lists


def _one_by_one(method: str, func: Any, gradients: Sequence[Tensor], *operands: Any, **options: Any) -> None:
    for index, gradient in enumerate(gradients):
        # A list or a tuple has one operand for each.
        each = [operand[index] if isinstance(operand, (list, tuple)) else operand for operand in operands]
        getattr(gradient, method)(*each, **options)


for _method in ("mul_", "div_", "add_", "sub_", "zero_"):
    _LOW_RANK[getattr(_aten, f"_foreach_{_method}")] = functools.partial(_one_by_one, _method)


@_implements(_aten._amp_foreach_non_finite_check_and_unscale_)
def _unscale_(func: Any, gradients: Sequence[Tensor], found_inf: Tensor, inverse_scale: Tensor) -> None:
    plain = []
    for gradient in gradients:
        if isinstance(gradient, LowRankGradient):
            plain += gradient.stored()
            if gradient.norm_of_whole is not None:
                gradient.norm_of_whole = gradient.norm_of_whole * inverse_scale
        else:
            plain.append(gradient)
    torch._amp_foreach_non_finite_check_and_unscale_(plain, found_inf, inverse_scale)
