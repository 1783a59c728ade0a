"""The operations on a low-rank gradient: what is linear in G acts on R, and the 2-norm is that of G where it is known.

`OPERATIONS` has a function for each operation of ATen that there is, and `CHECKS` one for each function of torch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from ..lowrank import nonfinite
from .held import Held8bit, linear_part, zeros_like
from .stand_in import LowRankTensor, StandIn, UncommittedRefresh, in_backward

_aten = torch.ops.aten

# ---- what is linear

Implementation = Callable[..., Any]
OPERATIONS: dict[Any, Implementation] = {}
F = TypeVar("F", bound=Implementation)


def _implements(*operations: Any) -> Callable[[F], F]:
    def register(function: F) -> F:
        OPERATIONS.update((operation, function) for operation in operations)
        return function

    return register


def _is_factor(value: Any) -> bool:
    """Whether it multiplies all elements alike."""
    return not isinstance(value, Tensor) or (value.ndim == 0 and not isinstance(value, LowRankTensor))


@_implements(_aten.detach, _aten.alias)
def _same(func: Any, gradient: LowRankTensor) -> LowRankTensor:
    made = gradient.with_low_rank(gradient.kept, gradient.norm_of_whole)
    made.content = gradient.content
    return made


@_implements(_aten.clone)
def _clone(func: Any, gradient: LowRankTensor, **_: Any) -> LowRankTensor:
    made = gradient.with_low_rank(gradient.kept, None)
    made.replace(gradient)
    return made


@_implements(_aten._to_copy)
def _to_copy(func: Any, gradient: LowRankTensor, *, dtype: Any = None, device: Any = None, **_: Any) -> LowRankTensor:
    low_rank = gradient.kept.to(device=device, dtype=dtype, copy=True)
    norm = gradient.norm_of_whole
    return gradient.with_low_rank(low_rank, None if norm is None else norm.to(low_rank.device))


@_implements(_aten.new_empty_strided, _aten.zeros_like, _aten.empty_like)
def _zeros(func: Any, gradient: LowRankTensor, *args: Any, **_: Any) -> Any:
    if func.overloadpacket is _aten.new_empty_strided and tuple(args[0]) != tuple(gradient.shape):
        return NotImplemented
    made = gradient.with_low_rank(zeros_like(gradient.kept), None)
    made.uncommitted = made.addend = None
    made.is_zero, made.is_lost = True, False
    return made


@_implements(_aten.copy_)
def _copy_(func: Any, gradient: Any, other: Any, *_: Any) -> Any:
    if not isinstance(gradient, LowRankTensor):
        return NotImplemented
    if isinstance(other, LowRankTensor):
        if other.content is not gradient.content:
            gradient.replace(other)
    else:
        gradient.kept.copy_(gradient.basis.project(other))
        gradient.norm_of_whole = gradient.uncommitted = gradient.addend = None
        gradient.is_zero = gradient.is_lost = False
    return gradient


@_implements(_aten.zero_)
def _zero_(func: Any, gradient: LowRankTensor) -> LowRankTensor:
    gradient.kept.zero_()
    gradient.norm_of_whole = gradient.uncommitted = gradient.addend = None
    gradient.is_zero, gradient.is_lost = True, False
    return gradient


@_implements(_aten.mul, _aten.div, _aten.mul_, _aten.div_)
def _scale(func: Any, gradient: Any, factor: Any, **_: Any) -> Any:
    if func.overloadpacket is _aten.mul and isinstance(factor, LowRankTensor):
        gradient, factor = factor, gradient
    if not isinstance(gradient, LowRankTensor) or not _is_factor(factor):
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
    made = gradient
    if not in_place:
        kept = gradient.kept
        made = gradient.with_low_rank(kept.clone() if isinstance(kept, Held8bit) else operation(kept, factor), None)
    if in_place or isinstance(made.kept, Held8bit):
        multiplied = linear_part(made.kept)
        operation(multiplied, factor, out=multiplied)
    made.norm_of_whole, made.addend, made.uncommitted = norm, addend, uncommitted
    return made


@_implements(_aten.neg)
def _negative(func: Any, gradient: LowRankTensor) -> Any:
    return gradient * -1


@_implements(_aten.add, _aten.sub)
def _add(func: Any, a: Any, b: Any, *, alpha: Any = 1) -> Any:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor) or a.shape != b.shape:
        return NotImplemented
    alpha = -alpha if func.overloadpacket is _aten.sub else alpha
    known_zero = [isinstance(value, LowRankTensor) and value.is_zero and value.addend is None for value in (a, b)]
    if not isinstance(a, LowRankTensor) and not in_backward():
        return NotImplemented  # autograd adds up gradients in any order; else this is something plus a gradient
    lost = next((value for value in (a, b) if isinstance(value, LowRankTensor) and value.is_lost), None)
    if lost is not None:
        return lost.clone()
    if known_zero[1]:
        return a.clone()
    if known_zero[0]:
        return b.clone() if alpha == 1 else b * alpha
    if any(isinstance(value, LowRankTensor) and value.uncommitted is not None for value in (a, b)):
        # A basis is due, and neither is all of the gradient that it has to come from.
        first, second = _whole(a), _whole(b)
        return NotImplemented if first is None or second is None else first.add(second, alpha=alpha)
    low_rank, other = _low_rank_of(a, b), _low_rank_of(b, a)
    gradient = cast("LowRankTensor", a if isinstance(a, LowRankTensor) else b)
    return gradient.with_low_rank(low_rank.add(other, alpha=alpha), None)


def _whole_of(gradient: LowRankTensor) -> Tensor:
    whole = _whole(gradient)
    if whole is None:
        raise RuntimeError(
            f"{gradient.basis.name}.grad has a gradient that waits for its refresh, to which a low-rank one cannot be "
            "added. Call optimizer.step() before, or make the optimizer with projected_backward=False."
        )
    return whole


def _whole(value: Tensor) -> Tensor | None:
    """The gradient itself, m × n, where it is at hand."""
    if not isinstance(value, LowRankTensor):
        return value
    return None if value.uncommitted is None else value.uncommitted.gradient()


@_implements(_aten.add_, _aten.sub_)
def _add_(func: Any, gradient: Any, other: Any, *, alpha: Any = 1) -> Any:
    if not isinstance(gradient, LowRankTensor) or not isinstance(other, Tensor) or gradient.shape != other.shape:
        return NotImplemented
    alpha = -alpha if func.overloadpacket is _aten.sub_ else alpha
    if gradient.is_lost or (isinstance(other, LowRankTensor) and other.is_zero and other.addend is None):
        return gradient
    if gradient.is_zero:
        other = other if alpha == 1 else other * alpha
        if gradient.addend is not None:
            other = gradient.addend + (other if not isinstance(other, LowRankTensor) else _whole_of(other))
        if isinstance(other, LowRankTensor):
            gradient.replace(other)
        else:
            gradient.addend = other.clone()
        return gradient
    gradient.kept.add_(_low_rank_of(other, gradient), alpha=alpha)
    gradient.norm_of_whole = None  # that of the first part, no longer of the whole
    return gradient


def _low_rank_of(value: Tensor, beside: Tensor) -> Tensor:
    """The R of a value in the basis of what it is added to, if not of its own."""
    if not isinstance(value, LowRankTensor):
        return cast("LowRankTensor", beside).basis.project(value)
    if isinstance(beside, LowRankTensor) and beside.basis is not value.basis:
        raise RuntimeError(
            f"Two low-rank gradients of {value.basis.name} are of different bases: there was a refresh, or a pass was "
            "dropped, between them. Call optimizer.zero_grad() before each step's first backward pass; to keep "
            "gradients over several steps make the optimizer with layerwise=False and projected_backward=False."
        )
    return value.low_rank


# ---- norms


def is_2_norm(gradient: Tensor, ord: Any = 2, dim: Any = None, keepdim: bool = False) -> bool:
    """Whether a norm is that of the whole gradient as a vector."""
    return ord == 2 and (dim is None or len(dim) in (0, gradient.ndim)) and not keepdim


@_implements(_aten.linalg_vector_norm)
def _norm(
    func: Any, gradient: LowRankTensor, ord: Any = 2, dim: Any = None, keepdim: bool = False, *, dtype: Any = None
) -> Any:
    if not is_2_norm(gradient, ord, dim, keepdim):
        return NotImplemented
    norm = gradient.frobenius_norm()
    return norm.to(dtype or gradient.dtype)


@_implements(_aten._foreach_norm)
def _foreach_norm(func: Any, gradients: Sequence[Tensor], ord: Any = 2, dtype: Any = None) -> Any:
    found: dict[int, Tensor] = {}
    together: dict[int, Tensor] = {}  # what there is to read, by its place in the list
    for index, gradient in enumerate(gradients):
        kept = gradient.kept if isinstance(gradient, LowRankTensor) else gradient
        known = isinstance(gradient, LowRankTensor) and gradient.norm_of_whole is not None
        if known or ord != 2 or not isinstance(kept, Tensor) or isinstance(kept, StandIn):
            found[index] = torch.linalg.vector_norm(gradient, ord, dtype=dtype)
        else:
            together[index] = kept
    if together:
        found.update(zip(together, torch._foreach_norm(list(together.values()), ord, dtype), strict=True))
    return [found[index] for index in range(len(gradients))]


@_implements(_aten.isnan)
def _isnan(func: Any, gradient: LowRankTensor) -> Tensor:
    # For autograd's anomaly mode, too.
    return linear_part(gradient.kept).isnan().any().expand(gradient.shape)


def _any_infinite(factor: Tensor) -> Tensor:
    return factor.isinf().any()


def _all_finite(factor: Tensor) -> Tensor:
    return factor.isfinite().all()


CHECKS: dict[Any, Callable[[Tensor], Tensor]] = {
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


for _method in ("add_", "sub_", "zero_"):
    OPERATIONS[getattr(_aten, f"_foreach_{_method}")] = functools.partial(_one_by_one, _method)


def _scale_all(method: str, func: Any, gradients: Sequence[Tensor], factor: Any) -> None:
    """Multiply or divide by one factor, in few kernels for all of them."""
    if isinstance(factor, (list, tuple)) or not _is_factor(factor):
        return _one_by_one(method, func, gradients, factor)
    together: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for gradient in gradients:
        if isinstance(gradient, LowRankTensor):
            norm, addend, uncommitted = gradient.norm_of_whole, gradient.addend, gradient.uncommitted
            if norm is not None or addend is not None or uncommitted is not None:
                getattr(gradient, method)(factor)
                continue
            gradient = linear_part(gradient.kept)
        elif isinstance(gradient, StandIn):
            getattr(gradient, method)(factor)
            continue
        together.setdefault((gradient.device, gradient.dtype), []).append(gradient)
    for (_, dtype), tensors in together.items():
        # A GPU would round the factor to their dtype in any case, and take them one by one where it has another.
        rounded = isinstance(factor, Tensor) and not nonfinite.host_knows(tensors[0])
        getattr(torch, f"_foreach_{method}")(tensors, factor.to(dtype) if rounded else factor)
    return None


for _method in ("mul_", "div_"):
    OPERATIONS[getattr(_aten, f"_foreach_{_method}")] = functools.partial(_scale_all, _method)


@_implements(_aten._amp_foreach_non_finite_check_and_unscale_)
def _unscale_(func: Any, gradients: Sequence[Tensor], found_inf: Tensor, inverse_scale: Tensor) -> None:
    plain = []
    for gradient in gradients:
        if isinstance(gradient, LowRankTensor):
            plain += gradient.linear_parts()
            if gradient.norm_of_whole is not None:
                gradient.norm_of_whole = gradient.norm_of_whole * inverse_scale
        else:
            plain.append(gradient)
    torch._amp_foreach_non_finite_check_and_unscale_(plain, found_inf, inverse_scale)
