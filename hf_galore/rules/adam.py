"""Adam with moments of at least float32."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from ..integrations import bitsandbytes as kernels
from ..kernels import adam as own
from ..lowrank.blockwise import AdamStep
from ..lowrank.nonfinite import Skip
from ..lowrank.rotation import Rotation, rotate_adam
from .rule import Group, Moment, Moments, Rule, check_betas, check_not_negative, full_precision


class Adam(Rule):
    """N = m̂ / (√v̂ + ε), with m ← β₁m + (1 − β₁)G and v ← β₂v + (1 − β₂)G².

    Source: Adam (Kingma and Ba, 2015, arXiv:1412.6980), algorithm 1; AdamW (arXiv:1711.05101), algorithm 2.
    """

    option = "adam"
    defaults: ClassVar[Mapping[str, Any]] = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2}

    def check(self, group: Group) -> None:
        """Check learning rate, β₁, β₂, ε and weight decay."""
        check_not_negative(group, "lr", "eps", "weight_decay")
        check_betas(group)

    def moments(self, shape: tuple[int, ...], dtype: torch.dtype, group: Group) -> dict[str, Moment]:
        """`exp_avg` and `exp_avg_sq`."""
        return {key: Moment(shape, full_precision(dtype)) for key in ("exp_avg", "exp_avg_sq")}

    def direction(
        self, gradient: Tensor, moments: Moments, group: Group, step: int, skip: Skip
    ) -> tuple[Tensor, float]:
        """N, and the learning rate."""
        now, exp_avg, exp_avg_sq = direction_step(group, step), moments["exp_avg"], moments["exp_avg_sq"]
        if skip.known is None and kernels.fused("adam_32bit_direction", gradient, exp_avg.dtype):
            precise = gradient.to(exp_avg.dtype)
            return own.adam_32bit_direction(precise, exp_avg, exp_avg_sq, now, skip.norm), float(group["lr"])
        return adam_direction(gradient, exp_avg, exp_avg_sq, now, skip.flag), float(group["lr"])

    def update_(self, weight: Tensor, gradient: Tensor, moments: Moments, group: Group, step: int, skip: Skip) -> bool:
        """Update a weight of any dtype by our kernel, or one of the moments' dtype by torch's fused kernel."""
        now, exp_avg, exp_avg_sq = weight_step(group, step), moments["exp_avg"], moments["exp_avg_sq"]
        if skip.known is None and exp_avg.dtype == torch.float32 and kernels.fused("adam_32bit_", weight, weight.dtype):
            own.adam_32bit_(weight, gradient, exp_avg, exp_avg_sq, now, skip.norm)
        elif weight.dtype == exp_avg.dtype:
            adam_(weight, gradient.to(weight.dtype).contiguous(), exp_avg, exp_avg_sq, now, skip.flag)
        else:
            return False
        return True

    def rotate_(self, moments: Moments, group: Group, rotation: Rotation, step: int) -> None:
        """Carry both moments into the new basis."""
        exp_avg, exp_avg_sq = moments["exp_avg"], moments["exp_avg_sq"]
        rotated = rotate_adam(exp_avg, exp_avg_sq, rotation, step=step, betas=group["betas"])
        for moment, value in zip((exp_avg, exp_avg_sq), rotated, strict=True):
            moment.copy_(value)


def weight_step(group: Group, step: int) -> AdamStep:
    """Step number `step` of a weight, with the group's learning rate and decay."""
    return AdamStep(step, group["betas"], group["eps"], float(group["lr"]), group["weight_decay"])


def direction_step(group: Group, step: int) -> AdamStep:
    """The step that turns a zero into N: kernels only know how to move a weight, and 0 − (−1)·N is N."""
    return AdamStep(step, group["betas"], group["eps"], lr=-1.0, weight_decay=0.0)


def adam_(
    weight: Tensor, gradient: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, now: AdamStep, skip: Tensor | None
) -> None:
    """W ← (1 − ηλ)W − ηN in place, N = m̂ / (√v̂ + ε): the kernel of torch's own fused AdamW, on one tensor.

    Args:
        weight: contiguous, as are the others, which have its dtype and shape.
        gradient: G.
        exp_avg: first moment m, updated in place.
        exp_avg_sq: second moment v, likewise.
        now: the step's number and options.
        skip: 0-dimensional float32; at 1 nothing is changed. `None` for never.
    """
    # The kernel itself: what torch.optim.adamw does before it (sorting lists by device and dtype, counting steps on the
    # device) takes the host longer than a small matrix takes the processor.
    torch._fused_adamw_(
        [weight],
        [gradient],
        [exp_avg],
        [exp_avg_sq],
        [],
        [torch.full((), now.step, dtype=torch.float32, device=weight.device)],
        lr=now.lr,
        beta1=now.betas[0],
        beta2=now.betas[1],
        weight_decay=now.weight_decay,
        eps=now.eps,
        amsgrad=False,
        maximize=False,
        grad_scale=None,
        found_inf=skip,
    )
    increment_version([weight, exp_avg, exp_avg_sq])  # this kernel alone of torch's leaves that out


def adam_direction(gradient: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, now: AdamStep, skip: Tensor | None) -> Tensor:
    """N = m̂ / (√v̂ + ε), in the moments' dtype; zero where `skip` is 1.

    Args:
        gradient: G or R, any floating-point dtype.
        exp_avg: first moment, float32 (float64 for float64 weights), contiguous; updated in place.
        exp_avg_sq: second moment, likewise.
        now: from `direction_step`.
        skip: as in `adam_`.
    """
    direction = torch.zeros_like(exp_avg)
    adam_(direction, gradient.to(exp_avg.dtype).contiguous(), exp_avg, exp_avg_sq, now, skip)
    return direction
