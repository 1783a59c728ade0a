"""Targets that Muon moves along the whole gradient, of which only the part that their bases have has a momentum."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

from torch import Tensor

from ..lowrank.nonfinite import Skip
from ..lowrank.projection import add_projected_back_, at_least_float32, norm_of_each
from ..lowrank.residual import Term, residual_of
from ..rules.muon import Muon
from .bases import State
from .groups import Group
from .movement import Movement
from .residual import TargetOfGradient


class WholeMuonTarget(TargetOfGradient):
    """A target that moves along 0.2 √l · orth(back(D) + residual_scale · S), with l the longer side.

    D = (1 − μ)R + μM is what Muon orthogonalises of R alone, and S = G − back(R) what the bases do not have of G: it
    takes part with no momentum. With bases of the whole space this is Muon, and with no bases Muon without a momentum.

    Sources: Muon (Jordan et al., 2024, https://kellerjordan.github.io/posts/muon/). Of its relatives, GUM (Pan et al.,
    2025, arXiv:2510.17802) takes turns between the two parts, and MLorc (Shen et al., 2025, arXiv:2506.01897) has a
    low-rank momentum of whole gradients too, which it compresses at every step.
    """

    is_limited = False  # each of its steps has the same length

    def _direction(self, low_rank: Tensor, group: Group, step: int, skip: Skip) -> tuple[Tensor, float]:
        return self._ahead(low_rank, self.moments(), skip)

    def _direction_of_some(self, group: Group, skip: Skip) -> Callable[[Tensor, State, int], tuple[Tensor, float]]:
        return lambda low_rank, moments, age: self._ahead(low_rank, moments, skip)

    def _ahead(self, low_rank: Tensor, moments: State, skip: Skip) -> tuple[Tensor, float]:
        return self._muon.ahead(low_rank, moments, self.group, skip), float(self.group["lr"])

    @property
    def _muon(self) -> Muon:
        return cast("Muon", self.rule)

    def _move(self, by: Movement, step: int, skip: Skip) -> None:
        bases = self.bases_here() if by.bases is None else by.bases
        gradient, spare = self._whole_of(by, skip)
        norm = norm_of_each(gradient)
        low_rank = by.low_rank if skip.flag is None else by.low_rank.masked_fill(skip.flag.bool(), 0.0)
        together = residual_of(gradient, low_rank, bases, spare=spare).mul_(self.group["residual_scale"])
        add_projected_back_(together, by.direction, bases, 1.0)
        together.copy_(self._muon.made_alike(together.to(at_least_float32(together.dtype)), norm))
        self._add(Term(together, 1.0), self._alpha(by.factor), step, skip, spare=True)
