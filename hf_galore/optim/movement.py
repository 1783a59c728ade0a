"""What an update moves a target's weight by."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ..lowrank.projection import Bases


class WholeGradient(NamedTuple):
    """The gradient itself, G."""

    gradient: Tensor
    spare: bool
    """Whether it may be overwritten."""


class Movement(NamedTuple):
    """What an update moves a weight by."""

    direction: Tensor
    """N"""
    factor: float
    """What the rule multiplies it with."""
    low_rank: Tensor
    """R"""
    bases: Bases | None
    """`bases_here()`, where they are at hand."""
    whole: WholeGradient | None
    """G, where the target needs it."""
