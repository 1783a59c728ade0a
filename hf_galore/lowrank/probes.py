"""Norm probes: a few random columns beside a basis, so that a low-rank gradient knows the norm of the whole one.

Let G be projected by Q, R = GQ. Beside Q are c columns Z' = (I − QQᵀ)Z, where the elements of Z, n × c, are ±1/√c at
random. What is held of G is R' = G[Q Z'], and

    E‖R'‖² = ‖GQ‖² + ‖G(I − QQᵀ)‖² = ‖G‖²        for Q with orthonormal columns:

‖R'‖ is the norm of the gradient, but for chance. All else stays as it is: R' is linear in G, so it adds up over
micro-batches and processes and can be scaled and clipped, and its first r columns are R. A left side is treated alike,
with rows for columns; where both sides are projected R' is [P Z₁']ᵀG[Q Z₂'], of which the first r × r are R.

The variance is that of what is outside of the basis alone: its square is off by √(2 / (c·k)) of itself where k
directions have equal parts of it, and errors of matrices cancel in a norm over all.

Columns of a basis in 4 bits are too short by 0.8 % of a square, and not quite orthogonal. Where σ² are the eigenvalues
of QQᵀ, what is inside of its space counts mean(1 − σ² + σ⁴) times. Of the square that was measured 0.3 % too little at
small ranks, and up to 1.5 % too much where the rank is above half of the side: half as much of a norm.

Source: the estimate of a trace is Hutchinson's (1989); random signs have its least variance.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .projection import Bases, BasisShapes, Side


def probe_shapes(shapes: BasisShapes, count: int) -> BasisShapes:
    """The shapes of a target's probes: no more columns than half of what a basis leaves, so that R' is less than G.

    Args:
        shapes: of the bases.
        count: c, of each side.
    """

    def beside(shape: tuple[int, ...] | None) -> tuple[int, ...] | None:
        return None if shape is None else (*shape[:-1], min(count, max(1, (shape[-2] - shape[-1]) // 2)))

    return BasisShapes(beside(shapes.left), beside(shapes.right))


def probes_for(bases: Bases, count: int, seed: int) -> Bases:
    """The probes of each basis, n × c in its dtype; of a stack those of each. Reads nothing back from the device.

    Args:
        bases: as gradients are projected with them; zeros where there are none yet.
        count: c, of each side, as far as `probe_shapes` allows it.
        seed: from 0 to 2⁶³ − 1.
    """
    shapes = probe_shapes(BasisShapes(*(None if basis is None else tuple(basis.shape) for basis in bases)), count)
    sides = zip(bases, shapes, (seed, seed ^ 1), strict=True)
    return Bases(*(None if p is None or shape is None else _probes(p, shape[-1], one) for p, shape, one in sides))


def _probes(basis: Tensor, count: int, seed: int) -> Tensor:
    *stack, rows, _ = basis.shape
    generator = torch.Generator(basis.device).manual_seed(seed)
    signs = torch.randint(2, (*stack, rows, count), generator=generator, device=basis.device, dtype=basis.dtype)
    signs = signs.mul_(2).sub_(1)
    outside: Tensor = signs - basis @ (basis.mT @ signs)
    return outside.div_(max(count, 1) ** 0.5)


def without_probes(held: Tensor, side: Side, rank: int) -> Tensor:
    """R, contiguous, of what is held of a gradient; R itself as it is.

    Args:
        held: R', or R.
        side: that is projected.
        rank: r.
    """
    rows = held if side == "right" else held[..., :rank, :]
    return (rows if side == "left" else rows[..., :rank]).contiguous()


def held_shape(low_rank: Sequence[int], probes: BasisShapes) -> tuple[int, ...]:
    """The shape of R'.

    Args:
        low_rank: that of R, which may be that of a stack.
        probes: the shapes of the probes.
    """
    *stack, rows, columns = low_rank
    left, right = (0 if shape is None else shape[-1] for shape in probes)
    return (*stack, rows + left, columns + right)
