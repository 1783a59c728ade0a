"""The numbers that updates of targets are multiplied with: `scale`, and what a rule has made of each channel of R.

A channel is a column of a gradient whose left side is projected, and a row of one whose right side is: what R has of it
is a column or a row of R. Pure functions on tensors, which read nothing back from the device.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..option import OF_WHOLE_MATRICES, auto_factor
from .projection import Side, at_least_float32, for_each, low_rank_shape, norm_of_each, side_of

AUTO_OF_OTHERS, AUTO_OF_MUON, AUTO_OF_SCALING, AUTO_OF_WHOLE_MUON = 1 / 32, 1 / 16, 1 / 8, 1 / 8
"""`scale=auto` at a rank of the smaller side, half of what it is at a quarter of it: of what is projected back, by Adam
and most rules, and by Muon; and of what moves along the gradient itself. Of whole matrices that Muon orthogonalises it
is that at any rank."""
GROWTH = 1.01
"""γ, by which the norm of a limited term may grow from one step to the next (of Fira and of APOLLO)."""
_LEAST_PART = 1 / 16


def scale_of(group: Mapping[str, Any], shape: Sequence[int]) -> float:
    """The number that a target's update is multiplied with.

    Args:
        group: the parameter group, with `scale` and `rank`.
        shape: m × n, or k × m × n, that the weight is projected in.
    """
    scale, factor = group["scale"], auto_factor(group["scale"])
    return float(scale) if factor is None else factor * auto_scale(group, shape)


def auto_scale(group: Mapping[str, Any], shape: Sequence[int]) -> float:
    """The scale that goes with the rank r of a group, for matrices of `shape` m × n: c over the size of an element.

    That is c · √(min(m, n) / r) where the smaller side is projected, and c where all of the gradient is
    orthogonalised (`residual=muon` and `normuon`). With this scale the length of a step depends neither on the rank nor
    on the side. The constants c are those of the lowest loss in
    `tests.benchmarks.ranks`, from random weights; other tasks take a multiple.
    """
    if group.get("residual") in OF_WHOLE_MATRICES:
        return AUTO_OF_WHOLE_MUON
    scaled, rule = group.get("scaling", "none") != "none", group.get("rule")
    constant = AUTO_OF_SCALING if scaled else AUTO_OF_MUON if rule == "muon" else AUTO_OF_OTHERS
    return constant / element_size(group, shape)


def sign_part(group: Mapping[str, Any], shape: Sequence[int]) -> float:
    """What signs are multiplied with besides `scale`, so that `scale=auto` leaves them as large at any rank.

    They are 1 each, where an element of back(N) grows with the rank.
    """
    return 1.0 if auto_factor(group["scale"]) is None else element_size(group, shape)


def element_size(group: Mapping[str, Any], shape: Sequence[int]) -> float:
    """The root mean square of an element of an update back(N) of `shape` m × n: √(elements of R / mn).

    Those of a rule's direction N are about 1 at any rank.
    """
    matrix = tuple(shape[-2:])
    side = side_of(matrix, group.get("proj_type", "std"))
    size: float = (math.prod(low_rank_shape(matrix, side, group["rank"])) / math.prod(matrix)) ** 0.5
    return size


def channel_norms(matrix: Tensor, side: Side) -> Tensor:
    """‖G_j‖ of each channel j, of at least float32, in the shape that multiplies a gradient.

    For `full`, where channels have no part of R of their own, one number for the matrix.

    Args:
        matrix: of the shape of G, or of R.
        side: that is projected.
    """
    if side == "full":
        return for_each(norm_of_each(matrix))
    dim, dtype = -2 if side == "left" else -1, at_least_float32(matrix.dtype)
    norms: Tensor = torch.linalg.vector_norm(matrix, dim=dim, keepdim=True, dtype=dtype)
    return norms


def ratios(of_direction: Tensor, of_low_rank: Tensor, by_chance: Tensor, rounding: float = 0.0) -> Tensor:
    """‖N_j‖ / ‖R_j‖ of each channel; 0 where R has nothing of it.

    A channel that the bases nearly miss has an R_j of next to nothing, and a ratio without bounds: it is that of an
    R_j of a sixteenth of what it is by chance, at most.

    Args:
        of_direction: ‖N_j‖.
        of_low_rank: ‖R_j‖.
        by_chance: ‖R_j‖ as it would be in random bases.
        rounding: the part of `by_chance` that rounding alone may make.
    """
    bounded = torch.maximum(of_low_rank, by_chance * _LEAST_PART)
    return torch.where(of_low_rank > by_chance * rounding, of_direction / bounded, 0.0)


def growth_limit(norm: Tensor, before: Tensor) -> Tensor:
    """The factor of at most 1 that keeps a term's norm within γ times what it was; 1 where there was none before.

    Source: Fira (Chen et al., 2024, arXiv:2410.01623), equation 8; APOLLO (Zhu et al., 2024, arXiv:2412.05270),
    algorithm 1.

    Args:
        norm: of the term now; 0-dimensional, or k numbers of a stack.
        before: of the term that was used a step before, after its own limit; 0 where there was none.
    """
    limit = GROWTH * before
    return torch.where((before > 0) & (norm > limit), limit / norm, 1.0)
