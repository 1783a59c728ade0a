"""Lion: the sign of a mean of gradients, from one moment."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..lowrank.nonfinite import Skip
from ..lowrank.rotation import Rotation, rotate
from .rule import Group, Moment, Moments, Rule, check_betas, check_not_negative, full_precision


class Lion(Rule):
    """N = sign(β₁m + (1 − β₁)G), and then m ← β₂m + (1 − β₂)G.

    Its steps are larger than Adam's at the same learning rate: the authors take a third to a tenth of that, and a decay
    as many times larger. A Trainer sets β₁ and β₂ by `adam_beta1` and `adam_beta2`, as for transformers' own Lion.

    Source: Symbolic Discovery of Optimization Algorithms (Chen et al., 2023, arXiv:2302.06675), algorithm 2.
    """

    option = "lion"
    defaults: ClassVar[Mapping[str, Any]] = {"lr": 1e-4, "betas": (0.9, 0.99), "weight_decay": 0.0}

    def check(self, group: Group) -> None:
        """Check learning rate, β₁, β₂ and weight decay."""
        check_not_negative(group, "lr", "weight_decay")
        check_betas(group)

    def moments(self, shape: tuple[int, ...], dtype: torch.dtype, group: Group) -> dict[str, Moment]:
        """`exp_avg`."""
        return {"exp_avg": Moment(shape, full_precision(dtype))}

    def direction(
        self, gradient: Tensor, moments: Moments, group: Group, step: int, skip: Skip
    ) -> tuple[Tensor, float]:
        """N, and the learning rate."""
        return lion_direction(gradient, moments["exp_avg"], group["betas"], skip.flag), float(group["lr"])

    def rotate_(self, moments: Moments, group: Group, rotation: Rotation, step: int) -> None:
        """Carry the moment, a mean of gradients, into the new basis."""
        moments["exp_avg"].copy_(rotate(moments["exp_avg"], rotation))


def lion_direction(gradient: Tensor, exp_avg: Tensor, betas: tuple[float, float], skip: Tensor | None) -> Tensor:
    """N of Lion, in the moment's dtype.

    Args:
        gradient: G or R, any floating-point dtype.
        exp_avg: m, at least float32; updated in place.
        betas: β₁ and β₂.
        skip: 0-dimensional float32; at 1 the moment stays and N is zero. `None` for never.
    """
    gradient = gradient.to(exp_avg.dtype)
    if skip is None:
        direction = exp_avg.lerp(gradient, 1 - betas[0]).sign_()
        exp_avg.lerp_(gradient, 1 - betas[1])
        return direction
    keep = 1 - skip.to(exp_avg.dtype)
    gradient = gradient.masked_fill(skip.bool(), 0.0)
    direction = exp_avg.lerp(gradient, 1 - betas[0]).sign_().mul_(keep)
    exp_avg.lerp_(gradient, keep * (1 - betas[1]))
    return direction
