"""Adafactor as `transformers.Adafactor` computes it, with the learning rate set from outside."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..lowrank.nonfinite import Skip
from ..lowrank.projection import for_each, norm_of, norm_of_each
from ..lowrank.ranks import Ranks
from ..lowrank.rotation import Rotation, rotate, rotate_factored
from .rule import Group, Moment, Moments, Rule, check_not_negative, full_precision


class Means:
    """The means of a gradient that Adafactor takes."""

    def of_columns(self, squared: Tensor) -> Tensor:
        """The mean of each column of squares (..., m, n)."""
        return squared.mean(dim=-2)

    def of_all(self, row: Tensor, column: Tensor) -> Tensor:
        """The mean of all squares, from the means of their rows (..., m), with a last dimension of 1."""
        return row.mean(dim=-1, keepdim=True)

    def root_of_squares(self, direction: Tensor) -> Tensor:
        """The root mean square of all elements, 0-dimensional."""
        return norm_of(direction) / math.sqrt(direction.numel())


class MeansOfStack(Means):
    """The same for a stack of gradients, of each by itself."""

    def root_of_squares(self, direction: Tensor) -> Tensor:
        """The root mean square of each, k × 1 × 1."""
        return for_each(norm_of_each(direction)) / math.sqrt(math.prod(direction.shape[-2:]))


class MeansOverRows(Means):
    """The same, where each process has some of the rows.

    Args:
        ranks: the processes.
        rows: that they have together.
        transposed: whether rows are what one process would have as columns.
    """

    def __init__(self, ranks: Ranks, rows: int, *, transposed: bool) -> None:
        self._ranks = ranks
        self._rows = rows
        self._transposed = transposed

    def of_columns(self, squared: Tensor) -> Tensor:
        """The mean of each column over all processes; of more dimensions none but the first is divided."""
        if squared.ndim > 2:
            return super().of_columns(squared)
        return self._ranks.sum(squared.sum(dim=0)).div_(self._rows)

    def of_all(self, row: Tensor, column: Tensor) -> Tensor:
        """The mean over all processes. Where one factor was carried into another basis, it is that of this factor."""
        if row.ndim > 1:
            return super().of_all(row, column)
        if self._transposed:
            return super().of_all(column, row)
        return self._ranks.sum(row.sum().view(1)).div_(self._rows)

    def root_of_squares(self, direction: Tensor) -> Tensor:
        """The root mean square over all processes."""
        elements = self._rows * math.prod(direction.shape[1:])
        return self._ranks.norms([norm_of(direction)])[0] / math.sqrt(elements)


class Adafactor(Rule):
    """A second moment in two factors, means of its rows and of its columns; with `beta1`, a first moment of updates.

    Args:
        means: how means are taken.

    Source: Adafactor (Shazeer and Stern, 2018, arXiv:1804.04235), algorithm 4.
    """

    option = "adafactor"
    defaults: ClassVar[Mapping[str, Any]] = {
        "lr": 1e-3,
        "eps": 1e-30,
        "clip_threshold": 1.0,
        "decay_rate": -0.8,
        "beta1": None,
        "weight_decay": 0.0,
    }

    def __init__(self, means: Means | None = None) -> None:
        self._means = means or Means()

    def of_stack(self, shape: tuple[int, ...]) -> Adafactor:
        """The rule with means of each gradient."""
        return Adafactor(MeansOfStack())

    def over_rows(self, ranks: Ranks, rows: int, *, transposed: bool) -> Adafactor:
        """The rule with means over all processes."""
        return Adafactor(MeansOverRows(ranks, rows, transposed=transposed))

    def check(self, group: Group) -> None:
        """Check all options."""
        check_not_negative(group, "lr", "eps", "weight_decay")
        if not group["clip_threshold"] > 0:
            raise ValueError(f"clip_threshold has to be above 0, but is {group['clip_threshold']!r}.")
        if not group["decay_rate"] < 0:
            raise ValueError(f"decay_rate has to be below 0, but is {group['decay_rate']!r}.")
        if group["beta1"] is not None and not 0.0 <= group["beta1"] < 1.0:
            raise ValueError(f"beta1 has to be None, or at least 0 and below 1, but is {group['beta1']!r}.")

    def moments(self, shape: tuple[int, ...], dtype: torch.dtype, group: Group) -> dict[str, Moment]:
        """Row and column means of the second moment, or all of it for a vector; `exp_avg` with `beta1`."""
        dtype = full_precision(dtype)
        found: dict[str, Moment] = {}
        if len(shape) >= 2:
            found["exp_avg_sq_row"] = Moment(shape[:-1], dtype)
            found["exp_avg_sq_col"] = Moment(shape[:-2] + shape[-1:], dtype, by_rows=len(shape) > 2)
        else:
            found["exp_avg_sq"] = Moment(shape, dtype)
        if group["beta1"] is not None:
            found["exp_avg"] = Moment(shape, dtype)
        return found

    def direction(
        self, gradient: Tensor, moments: Moments, group: Group, step: int, skip: Skip
    ) -> tuple[Tensor, float]:
        """The clipped update and the learning rate; with `beta1` the mean of updates, which the rate is already in."""
        direction = adafactor_direction(
            gradient,
            exp_avg_sq=moments.get("exp_avg_sq"),
            exp_avg_sq_row=moments.get("exp_avg_sq_row"),
            exp_avg_sq_col=moments.get("exp_avg_sq_col"),
            step=step,
            decay_rate=group["decay_rate"],
            eps=group["eps"],
            clip_threshold=group["clip_threshold"],
            skip=skip.flag,
            means=self._means,
        )
        lr = float(group["lr"])
        if group["beta1"] is None:
            return direction, lr
        exp_avg = moments["exp_avg"]
        if skip.flag is None:
            return exp_avg.lerp_(direction.mul_(lr), 1 - group["beta1"]), 1.0
        keep = 1 - skip.flag.to(direction.dtype)
        exp_avg.lerp_(direction.mul_(lr), keep * (1 - group["beta1"]))
        return exp_avg * keep, 1.0

    def rotate_(self, moments: Moments, group: Group, rotation: Rotation, step: int) -> None:
        """Carry each factor by its own side, and the first moment by both."""
        row, column = moments["exp_avg_sq_row"], moments["exp_avg_sq_col"]
        for moment, value in zip((row, column), rotate_factored(row, column, rotation), strict=True):
            moment.copy_(value)
        if group["beta1"] is not None:
            moments["exp_avg"].copy_(rotate(moments["exp_avg"], rotation))


def adafactor_direction(
    gradient: Tensor,
    *,
    exp_avg_sq: Tensor | None,
    exp_avg_sq_row: Tensor | None,
    exp_avg_sq_col: Tensor | None,
    step: int,
    decay_rate: float,
    eps: float,
    clip_threshold: float,
    skip: Tensor | None,
    means: Means,
) -> Tensor:
    """The clipped update U of Adafactor, before the learning rate.

    Args:
        gradient: G or R.
        exp_avg_sq: second moment of a vector or scalar, updated in place; `None` where it is factored.
        exp_avg_sq_row: for a gradient (..., m, n), the second moment's row means (..., m); updated in place.
        exp_avg_sq_col: the column means (..., n).
        step: t ≥ 1.
        decay_rate: exponent of β₂ₜ = 1 − t^decay_rate.
        eps: added to the squared gradient.
        clip_threshold: the largest root mean square of U.
        skip: 0-dimensional float32; at 1 the moments stay and U is zero. `None` for never.
        means: how means are taken.
    """
    moment = exp_avg_sq if exp_avg_sq is not None else exp_avg_sq_row
    assert moment is not None
    gradient = gradient.to(moment.dtype)
    weight: Tensor | float = step**decay_rate  # 1 − β₂ₜ, or 0
    if skip is not None:
        gradient = gradient.masked_fill(skip.bool(), 0.0)
        weight = weight * (1 - skip.to(moment.dtype))
    squared = gradient.square().add_(eps)
    if exp_avg_sq is not None:
        exp_avg_sq.lerp_(squared, weight)
        direction = exp_avg_sq.rsqrt().mul_(gradient)
    else:
        assert exp_avg_sq_row is not None
        assert exp_avg_sq_col is not None
        exp_avg_sq_row.lerp_(squared.mean(dim=-1), weight)
        exp_avg_sq_col.lerp_(means.of_columns(squared), weight)
        row = (exp_avg_sq_row / means.of_all(exp_avg_sq_row, exp_avg_sq_col)).rsqrt_().unsqueeze(-1)
        column = exp_avg_sq_col.rsqrt().unsqueeze(-2)
        direction = (row * column).mul_(gradient)
    rms = means.root_of_squares(direction)
    direction.div_((rms / clip_threshold).clamp_(min=1.0))
    # Moments that are still zero make 0 · ∞ of a gradient that is skipped.
    return direction if skip is None else direction.masked_fill_(skip.bool(), 0.0)
