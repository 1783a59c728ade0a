"""Sharded targets whose updates need the gradient itself, of which each process has a part.

Besides what a target exchanges (`hf_galore.optim.sharded`),

=====================================  ====================================================
R where the channels are divided       nothing: a process has all of its channels
R where each has a part of all         R is gathered as directions are, and the norms of the
channels, and where both sides are     channels of G are summed
projected
the limit of a term's growth           one number
=====================================  ====================================================
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..lowrank.products import Gradient
from ..lowrank.projection import Bases, BasisShapes, Side
from ..lowrank.scales import channel_norms
from .bases import NewBasis
from .residual import ResidualTarget, TargetOfGradient
from .scaled import ScaledTarget
from .sharded import ShardedTarget
from .sharded_state import ShardedBasisLayout


class ShardedOfGradient(ShardedTarget, TargetOfGradient):
    """What sharded targets have in common whose updates need the gradient itself."""

    def _step(self, gradient: Tensor, norm: Tensor | None) -> None:
        TargetOfGradient._step(self, gradient, norm)

    def _here(self, low_rank: Tensor) -> Tensor:
        if self.side == "full":
            return self.ranks.gather(low_rank, self.rank)
        if not self._is_local:
            low_rank = self.ranks.gather(low_rank, self._rows)
        return low_rank.mT if self._is_transposed() else low_rank

    def _whole_norms(self, norms: Tensor, side: Side) -> Tensor:
        is_whole = self._is_local and side != "full"
        return norms if is_whole else self.ranks.norms([norms])[0]

    def _low_rank_norms(self, matrix: Tensor, side: Side) -> Tensor:
        norms = channel_norms(matrix, side)
        # One number for the matrix, of rows that are divided.
        return self.ranks.norms([norms])[0] if self._is_local and side == "full" else norms


class ShardedResidualTarget(ShardedOfGradient, ResidualTarget):
    """A sharded matrix that its residual moves too."""


class ShardedScaledTarget(ShardedOfGradient, ScaledTarget):
    """A sharded matrix that moves along its scaled gradient."""

    def _derive(self) -> None:
        super()._derive()
        self.layout = ShardedBasisLayout(BasisShapes(None, None), 16, self.ranks, self._shard.dim)

    def bases(self) -> Bases:
        """The present projections whole, in the weight's dtype."""
        return ScaledTarget.bases(self)

    def _projections_here(self, refreshes: Sequence[int]) -> Bases:
        return self.layout.here(self._projections(refreshes))

    @torch.no_grad()
    def new_basis(self, gradient: Gradient, *, held: bool = False) -> NewBasis:
        """The low-rank gradient in the next projections, of what this process has of the gradient."""
        return ScaledTarget.new_basis(self, gradient, held=held)
