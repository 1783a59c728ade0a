"""The low-rank gradient of a target, in the target's `.grad`: where training loops look for gradients.

Hooks into the backward pass leave R = PᵀG, GQ or PᵀGQ there instead of G, as a tensor of the weight's shape that holds
nothing but R. What is linear in G acts on R: adding, scaling, unscaling, and so clipping and dropping. What needs G
itself is refused with words for the way out, because a gradient that is silently something else trains something else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from .held import linear_part
from .linear_operations import CHECKS, OPERATIONS, is_2_norm
from .stand_in import HOLD, BasisVersion, LowRankTensor, StandIn, UncommittedRefresh, in_backward

__all__ = [
    "HOLD",
    "BasisVersion",
    "LowRankGradient",
    "StandIn",
    "UncommittedRefresh",
    "UsedGradient",
    "in_backward",
]

_aten = torch.ops.aten


class LowRankGradient(LowRankTensor):
    """The gradient of a target of m × n, of which only R is there.

    Takes the arguments of `LowRankTensor`. Raises RuntimeError, with the way out, for operations that need G.
    """

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Made of several operations each, one of which is not linear.
        check = CHECKS.get(func)
        if check is not None and isinstance(args[0], LowRankGradient):
            return check(linear_part(args[0].kept)).expand(args[0].shape)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if UsedGradient in types:
            return NotImplemented
        implementation = OPERATIONS.get(func.overloadpacket)
        result = NotImplemented if implementation is None else implementation(func, *args, **(kwargs or {}))
        if result is NotImplemented:
            _refuse(func, args)
        return result


class UsedGradient(StandIn):
    """What stands in `.grad` of a weight that was updated during the backward pass: holds nothing, and says so.

    Args:
        like: the parameter.
        name: of the parameter.
        instead: what keeps gradients for the step, in words.
    """

    parameter: str
    instead: str
    norm_of_whole: Tensor | None
    """The norm of the gradient that was used."""
    was_zeroed: bool
    """Whether somebody has set it to zero since, as `zero_grad(set_to_none=False)` does: another gradient may come."""
    addend: Tensor | None
    """The gradient that has come then."""

    def __init__(self, like: Tensor, name: str, instead: str = HOLD) -> None:
        self.parameter, self.instead = name, instead
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
            return OPERATIONS[operation](func, *args, **(kwargs or {}))
        if operation is _aten.linalg_vector_norm and used.norm_of_whole is not None and is_2_norm(used, *args[1:]):
            return used.norm_of_whole
        if operation is _aten.add_ and args[0] is used and isinstance(args[1], Tensor):
            if used.was_zeroed:
                used.addend = args[1].clone() if used.addend is None else used.addend + args[1]
                return used
            raise RuntimeError(
                f"A second gradient arrived for {used.parameter}, which this step's backward pass has already updated: "
                "backward ran twice before optimizer.step(), or a reentrant checkpoint and something else use the "
                f"weight. Make the optimizer with {used.instead}, or call backward once a step."
            )
        raise RuntimeError(
            f"{used.parameter}.grad is gone: a layerwise optimizer has updated the weight with it during the backward "
            f"pass, so {operation.__name__} comes too late. To clip, unscale, change or look at gradients make the "
            f"optimizer with {used.instead}, which keeps them for step(), and clip by optimizer.clip_grad_norm_."
        )


def _leaves(values: Sequence[Any]) -> list[Any]:
    return [leaf for value in values for leaf in (value if isinstance(value, (list, tuple)) else (value,))]


def _refuse(func: Any, args: Any) -> NoReturn:
    gradient = next(leaf for leaf in _leaves(args) if isinstance(leaf, LowRankGradient))
    raise RuntimeError(
        f"{gradient.basis.name}.grad is a low-rank gradient, {tuple(gradient.held()[0].shape)} in place of "
        f"{tuple(gradient.shape)}: {func.overloadpacket.__name__} needs the gradient itself, which was never built or "
        "is gone. It can be scaled, added to, zeroed, unscaled by a GradScaler, its 2-norm taken, clipped (by "
        "optimizer.clip_grad_norm_ or torch.nn.utils.clip_grad_norm_), or dropped. For all else make the optimizer "
        "with layerwise=False and projected_backward=False (with a Trainer: an optim without _layerwise)."
    )
