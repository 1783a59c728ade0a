"""Muon on low-rank gradients: their momentum, with its singular values made alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..lowrank.nonfinite import Skip
from ..lowrank.orthonormal import gram, precise_product
from ..lowrank.projection import for_each, norm_of_each
from ..lowrank.ranks import Ranks
from ..lowrank.rotation import Rotation, rotate
from .rule import Group, Moment, Moments, Rule, check_not_negative, full_precision

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""a, b and c of x ← ax + bx³ + cx⁵, which five times over takes what is between 0.002 and 1 to between 0.7 and 1.2."""
STEPS = 5
LINES_DECAY = 0.95
"""β₂ of the mean squares of rows or columns, NorMuon's."""
OF_ADAM = 0.2
"""The root mean square of an element of Adam's direction, as Moonlight has measured it."""
_LEAST_LINE = 1 / 16
_LEAST_NORM = 1e-15
# Of momentum: squares of what is much smaller are nothing in float32, and a matrix divided by a norm of nothing is NaN
# after the steps. What is below fades, as far as it is.


class Over:
    """What orthogonalising takes of all rows of a matrix, where one process has them."""

    def gram(self, matrix: Tensor) -> Tensor:
        """MᵀM."""
        return gram(matrix)

    def norm(self, matrix: Tensor) -> Tensor:
        """The Frobenius norm, or k of a stack."""
        return norm_of_each(matrix)

    def turned(self, matrix: Tensor) -> bool:
        """Whether the rows are the smaller side, whose Gram matrix is the smaller one."""
        return matrix.shape[-2] < matrix.shape[-1]

    def longer(self, matrix: Tensor) -> int:
        """The longer side."""
        return max(matrix.shape[-2:])


class OverRows(Over):
    """The same, where each process has some of the rows, which are the longer side.

    Args:
        ranks: the processes.
        rows: that they have together.
    """

    def __init__(self, ranks: Ranks, rows: int) -> None:
        self._ranks = ranks
        self._rows = rows

    def gram(self, matrix: Tensor) -> Tensor:
        """MᵀM of the rows of all processes."""
        return self._ranks.sum(gram(matrix))

    def norm(self, matrix: Tensor) -> Tensor:
        """The norm of the rows of all processes."""
        return self._ranks.norms([norm_of_each(matrix)])[0]

    def turned(self, matrix: Tensor) -> bool:
        """No: of the rows only a part is here."""
        return False

    def longer(self, matrix: Tensor) -> int:
        """All rows."""
        return max(self._rows, matrix.shape[-1])


class Muon(Rule):
    """N = 0.2 √l · orth((1 − μ)R + μM), with M ← μM + (1 − μ)R before and l the longer side of R.

    One moment, and no second one: half of Adam's bytes. orth(X) is X with its singular values made alike. With the
    factor an element of N is about as large as one of Adam's, so that learning rate and `scale` mean the same. For
    targets only: what is not projected goes by the optimizer's own rule. μ is the group's `momentum`, since Adam's β₁,
    which the others go by, is another number (0.9 where this has 0.95).

    A matrix whose gradient is zero does not move, as one without a gradient does not: an expert of a stack without
    tokens would go on at full length in the direction of its last ones, since orth(M) does not fade as M does.

    Directions that no gradient has had do not come up in N: the steps multiply a singular value by 484 at most, so that
    rounding, 1e-7 of the largest, is 1e-4 of N's, and zero stays zero.

    Sources: Muon (Jordan et al., 2024, https://kellerjordan.github.io/posts/muon/): momentum, Nesterov's look ahead,
    coefficients and steps; Moonlight (Liu et al., 2025, arXiv:2502.16982), section 2.2: the factor. On low-rank
    gradients: SUMO (Refael et al., 2025, arXiv:2505.24749), which takes orth(M) from an exact SVD, has no look ahead,
    and carries M over a refresh (`moments=rotate`). Newton-Schulz leaves singular values of 0.7 to 1.2: after 200 steps
    of a Llama of width 128 (rank 32, condition numbers of 13 to 146) the median distance of N from that of an exact
    SVD was 0.195 of its norm, and their cosine 0.985.
    """

    option = "muon"
    only_targets = True
    defaults: ClassVar[Mapping[str, Any]] = {"lr": 1e-3, "momentum": 0.95, "weight_decay": 0.1}

    def __init__(self, over: Over | None = None) -> None:
        self._over = over or Over()

    def of_stack(self, shape: tuple[int, ...]) -> Muon:
        """The rule itself: all it does to a stack it does to each matrix."""
        return self

    def over_rows(self, ranks: Ranks, rows: int, *, transposed: bool) -> Muon:
        """The rule with the Gram matrices of all processes."""
        return Muon(OverRows(ranks, rows))

    def check(self, group: Group) -> None:
        """Check learning rate, momentum and weight decay."""
        check_not_negative(group, "lr", "momentum", "weight_decay")
        if not group["momentum"] < 1:
            raise ValueError(f"momentum has to be at least 0 and below 1, but is {group['momentum']!r}.")

    def moments(self, shape: tuple[int, ...], dtype: torch.dtype, group: Group) -> dict[str, Moment]:
        """`momentum_buffer`, as torch's Muon calls it."""
        return {"momentum_buffer": Moment(shape, full_precision(dtype))}

    def direction(
        self, gradient: Tensor, moments: Moments, group: Group, step: int, skip: Skip
    ) -> tuple[Tensor, float]:
        """N, and the learning rate."""
        direction = self.made_alike(self.ahead(gradient, moments, group, skip), self._over.norm(gradient))
        flag = skip.flag
        return direction if flag is None else direction.mul_(1 - flag.to(direction.dtype)), float(group["lr"])

    def ahead(self, gradient: Tensor, moments: Moments, group: Group, skip: Skip) -> Tensor:
        """(1 − μ)R + μM, whose singular values `direction` makes alike; updates M."""
        return look_ahead(gradient, moments["momentum_buffer"], group["momentum"], skip.flag)

    def made_alike(self, matrix: Tensor, norm: Tensor) -> Tensor:
        """0.2 √l · orth(X), and zero where the gradient is.

        Args:
            matrix: X, float32 or float64.
            norm: of the gradient, or k of a stack.
        """
        direction = orthogonalised(matrix, self._over).mul_(OF_ADAM * self._over.longer(matrix) ** 0.5)
        return direction.mul_(for_each(norm.ne(0).to(direction.dtype)))

    def rotate_(self, moments: Moments, group: Group, rotation: Rotation, step: int) -> None:
        """Carry the momentum, a mean of gradients, into the new basis."""
        moments["momentum_buffer"].copy_(rotate(moments["momentum_buffer"], rotation))


def lines_of(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a number for each row of m × n, or of a stack; for each column where these are more."""
    *stack, m, n = shape
    return (*stack, m, 1) if m >= n else (*stack, 1, n)


def make_lines_alike_(direction: Tensor, mean_squares: Tensor, moves: Tensor) -> None:
    """O ← O, each line divided by √v and all by one number, so that ‖O‖ stays; v ← β₂v + (1 − β₂)·mean(O²) before.

    A line is a row, or a column where these are more: those of the shorter side orthogonalising has made equally long.
    One of much less than the others, which may be the rounding of nothing, is none to make as long as they are: it
    counts as at least a sixteenth of the root mean square of all.

    Source: NorMuon (Li et al., 2025, arXiv:2510.05491), algorithm 1. The paper has rows only, and gives the matrix a
    norm; its authors' code (https://github.com/zichongli5/NorMuon) leaves the norm that Muon has given.

    Args:
        direction: O, m × n, or a stack of them, float32 or float64; in place.
        mean_squares: v, of the shape that `lines_of` says, and the same dtype; updated in place.
        moves: 1, or of each of a stack; 0 where the matrix does not move, and v stays.
    """
    before = norm_of_each(direction)
    along, across = (-2, -1) if mean_squares.shape[-1] == 1 else (-1, -2)
    mean_squares.lerp_(direction.square().mean(across, keepdim=True), for_each(moves * (1 - LINES_DECAY)))
    least = mean_squares.mean(along, keepdim=True).mul_(_LEAST_LINE**2)
    direction.div_(torch.maximum(mean_squares, least).sqrt_().clamp_min_(_LEAST_NORM))
    direction.mul_(for_each(before / norm_of_each(direction).clamp_min(_LEAST_NORM)))


def look_ahead(gradient: Tensor, buffer: Tensor, momentum: float, skip: Tensor | None) -> Tensor:
    """M ← μM + (1 − μ)R in place, and then (1 − μ)R + μM, in the buffer's dtype.

    Args:
        gradient: R, any floating-point dtype.
        buffer: M, at least float32; updated in place.
        momentum: μ.
        skip: 0-dimensional float32; at 1 the buffer stays. `None` for never.
    """
    gradient = gradient.to(buffer.dtype)
    if skip is None:
        return gradient.lerp(buffer.lerp_(gradient, 1 - momentum), momentum)
    gradient = gradient.masked_fill(skip.bool(), 0.0)
    buffer.lerp_(gradient, (1 - skip.to(buffer.dtype)) * (1 - momentum))
    return gradient.lerp(buffer, momentum)


def orthogonalised(matrix: Tensor, over: Over) -> Tensor:
    """A matrix X, or each of a stack, with singular values above 0.002 of its norm made about 1, and a zero left zero.

    Each step multiplies X with a polynomial of XᵀX, so that all are taken on this matrix, r × r, and X is multiplied
    once, with what they are together. Against steps on X that is a half to a third of the time (256 × 1,024 and
    256 × 2,816, on a CPU) and up to 3e-4 of rounding, in the spectral norm, where theirs is 3e-6; and where rows are
    divided among processes nothing else of them is needed.

    Args:
        matrix: float32 or float64.
        over: what all rows have together.
    """
    turned = over.turned(matrix)
    x = matrix.mT if turned else matrix
    x = x / for_each(over.norm(x).clamp_min(_LEAST_NORM))
    x = precise_product(x, _steps(over.gram(x)))
    return x.mT if turned else x


def _steps(squared: Tensor) -> Tensor:
    """What X is multiplied with by all steps, from XᵀX: matrices that commute."""
    a, b, c = COEFFICIENTS
    together: Tensor | None = None
    for left in reversed(range(STEPS)):
        factor = precise_product(squared, squared).mul_(c).add_(squared, alpha=b)
        factor.diagonal(dim1=-2, dim2=-1).add_(a)
        together = factor if together is None else precise_product(together, factor)
        if left:
            squared = precise_product(factor, precise_product(squared, factor))
    assert together is not None
    return together
