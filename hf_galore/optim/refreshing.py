"""The computation of a target's refresh from its gradient: what it takes until the new bases are good ones.

Of a stack only those matrices are refreshed whose turn it is and whose gradient is not zero; all of these at once. One
that has never been refreshed has provisional bases, the same for all of them, so that nothing of a gradient is lost
that comes between.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..lowrank.methods import METHODS, random_bases
from ..lowrank.orthonormal import Factorisation
from ..lowrank.products import FactoredGradient, Gradient, GroupedGradient
from ..lowrank.projection import Bases, norm_of_each
from ..lowrank.refresh import bases_of_lower_rank, cheaper_from_factors, figures_of, may_fail, new_bases
from ..lowrank.schedule import NEVER
from .bases import BasisLayout, NewBasis, OfStack, State, never_refreshed, numbers_of
from .report import Stopwatch
from .skipped import uncount
from .stack import bases_of_matrices

if TYPE_CHECKING:
    from .target import Target


# The part of a stack's gradient that may be copied for bases that are computed again.
_COPIED_PART = 8


class _Figures(NamedTuple):
    """What the host knows of the refresh of one matrix."""

    norm: float
    energy: float
    overlap: float
    full: float = 1.0
    defect: float = 0.0

    @property
    def is_number(self) -> bool:
        """Whether there is a gradient to make a basis from."""
        return 0 < self.norm < math.inf


class _Refresh:
    """New bases for a gradient, or for each of a stack, which are computed anew where they are not good enough.

    Args:
        target: whose bases they are.
        layout: of the bases of all that are refreshed here.
        old: the bases before, if there were any.
        seed: of random bases.
    """

    def __init__(self, target: Target, layout: BasisLayout, old: Bases | None, seed: int) -> None:
        self._target = target
        self._layout = layout
        self._old = old
        self._seed = seed
        self.kept: State
        self.low_rank: Tensor | None
        self.figures: list[_Figures]
        self._bases: Bases

    def compute(self, gradient: Gradient) -> None:
        """Compute them. Waits for the device once, unless they have to be computed again."""
        method = METHODS[self._target.group["refresh"]]
        self._bases = self._computed(gradient, self._old)
        self._look(gradient, check=may_fail(self._target.group["refresh"], gradient.device))
        # Rare, both of them, so that they may wait once more; and neither takes more memory than the first time. What
        # is not orthonormal, or has a defect of NaN, is not measured either: all is computed anew.
        failed = [i for i, figures in enumerate(self.figures) if not figures.defect <= 1 and figures.is_number]
        self._replace(gradient, failed, lambda some, old, _: self._computed(some, old, "reflections"))
        low = [i for i, figures in enumerate(self.figures) if not figures.full and figures.is_number]
        if method.by_gradient:
            name, side, rank = self._target.group["refresh"], self._target.side, self._target.rank
            self._replace(gradient, low, lambda some, _, bases: bases_of_lower_rank(some, side, rank, name, bases))

    def _computed(self, gradient: Gradient, old: Bases | None, factorisation: Factorisation | None = None) -> Bases:
        target = self._target
        method = target.group["refresh"]
        return new_bases(gradient, target.side, target.rank, method, old, seed=self._seed, factorisation=factorisation)

    def _replace(
        self,
        gradient: Gradient,
        indices: Sequence[int],
        compute: Callable[[Gradient, Bases | None, Bases], Bases],
    ) -> None:
        """Compute some of the bases again, from their gradients, the old bases and the present ones."""
        if not indices:
            return
        self.low_rank = None
        if len(gradient.shape) == 2:
            self.kept = {}
            self._bases = compute(gradient, self._old, self._bases)
            self._look(gradient)
            return
        # Gradients that are there as they are have to be copied: a few of a stack at a time.
        size = max(1, len(self.figures) // _COPIED_PART) if isinstance(gradient, Tensor) else len(indices)
        for start in range(0, len(indices), size):
            self._replace_some(gradient, indices[start : start + size], compute)

    def _replace_some(
        self,
        gradient: Gradient,
        indices: Sequence[int],
        compute: Callable[[Gradient, Bases | None, Bases], Bases],
    ) -> None:
        """Compute those of some matrices of a stack again."""
        some = chosen(gradient, indices)
        old = None if self._old is None else bases_of_matrices(self._old, indices)
        part = _Refresh(self._target, self._layout.of(len(indices)), old, self._seed)
        part._bases = compute(some, old, bases_of_matrices(self._bases, indices))
        part._look(some)
        for key, value in part.kept.items():
            self.kept[key][list(indices)] = value
        for basis, new in zip(self._bases, part._bases, strict=True):
            if basis is not None and new is not None:
                basis[list(indices)] = new
        for index, figures in zip(indices, part.figures, strict=True):
            self.figures[index] = figures

    def _look(self, gradient: Gradient, check: bool = False) -> None:
        """Let the bases be as they are kept, and learn what there is to know of them."""
        target = self._target
        self.kept = self._layout.kept(self._bases, target.param.dtype)
        new = self._layout.read(self.kept, target.param.dtype)
        self.low_rank = target.projected_by(gradient, new)
        figures = figures_of(gradient, self.low_rank, new, self._old, self._bases, check)
        flat = figures.flatten()
        skipped = target.owner.journal.skipped
        uncounted = skipped.uncounted(target.param)
        asked = flat if uncounted is None else torch.cat([flat, uncounted.to(flat.dtype)])
        asked = asked if target.ranks is None else target.ranks.of_first(asked)
        # The one time that a refresh waits for the device.
        found = [value.item() for value in asked.cpu().unbind()]
        if uncounted is not None:
            uncount(target.state, skipped.settle(target.param, *found[-2:]))
        count = len(flat) // len(figures)
        rows = (found[start : start + count] for start in range(0, len(flat), count))
        self.figures = [_Figures(*column) for column in zip(*rows, strict=True)]


def refresh_of_matrix(target: Target, gradient: Gradient, seed: int) -> NewBasis:
    """A refresh of a target that is one matrix; changes nothing but the count of skipped updates."""
    watch = Stopwatch(target.param.device)
    old = None if never_refreshed(target.state) else target.bases()
    refresh = _Refresh(target, target.layout, old, seed)
    refresh.compute(gradient)
    norm, energy, overlap, *_ = refresh.figures[0]
    low_rank = refresh.low_rank
    assert low_rank is not None
    if norm == 0:
        low_rank.zero_()
    elif not math.isfinite(norm):
        low_rank.fill_(math.nan)  # an infinite element may meet a zero of the basis
    watch.stop()
    return NewBasis(refresh.kept, low_rank, norm, energy, overlap, watch)


def refresh_of_stack(target: Target, gradient: Gradient, seed: int) -> NewBasis:
    """A refresh of those matrices of a stack whose turn it is and whose gradient is not zero."""
    watch = Stopwatch(target.param.device)
    due = target.matrices_due()
    with_gradient = _with_gradient(gradient, due)
    state = target.with_placed_bases()
    steps = numbers_of(state["refreshed_at"])
    kept = {key: state[key] for key in target.basis_keys}
    if never_refreshed(state):
        kept = target.layout.kept(_provisional(target, gradient), target.param.dtype)
    low_rank = None
    norms: dict[int, float] = {}
    energies: dict[int, float] = {}
    overlaps: dict[int, float] = {}
    # Those that have a basis to start from, and those that have none.
    for some in ([i for i in with_gradient if steps[i] != NEVER], [i for i in with_gradient if steps[i] == NEVER]):
        if not some:
            continue
        is_all = len(some) == len(steps)
        old = None if steps[some[0]] == NEVER else bases_of_matrices(target.bases(), some)
        refresh = _Refresh(target, target.layout.of(len(some)), old, seed)
        part = gradient if is_all else chosen(gradient, some)
        refresh.compute(_built_if_cheaper(target, part))
        del part
        made = [i for i, figures in zip(some, refresh.figures, strict=True) if figures.norm != 0]
        rows = [row for row, figures in enumerate(refresh.figures) if figures.norm != 0]
        kept = {key: _with_rows(value, made, refresh.kept[key], rows) for key, value in kept.items()}
        norms.update(zip(some, (figures.norm for figures in refresh.figures), strict=True))
        energies.update(zip(some, (figures.energy for figures in refresh.figures), strict=True))
        overlaps.update((i, refresh.figures[row].overlap) for i, row in zip(made, rows, strict=True))
        low_rank = refresh.low_rank if is_all and len(made) == len(some) else None
    if low_rank is None:
        low_rank = target.projected_by(gradient, target.layout.read(kept, target.param.dtype))
    made = sorted(overlaps)
    norm = math.hypot(*_norms(gradient, low_rank, norms))
    if not math.isfinite(norm):
        low_rank.fill_(math.nan)
    total = math.fsum(norms[i] ** 2 for i in made)
    energy = math.fsum(energies[i] * norms[i] ** 2 for i in made) / total if total else 1.0
    overlap = math.fsum(overlaps.values()) / len(made) if made else 1.0
    watch.stop()
    of_stack = OfStack(tuple(made), tuple(overlaps[i] for i in made))
    return NewBasis(kept, low_rank, norm, energy, overlap, watch, of_stack)


def _with_gradient(gradient: Gradient, due: Sequence[int]) -> list[int]:
    """Those matrices whose gradient is not zero, or that have tokens at all. Waits for the device."""
    if isinstance(gradient, GroupedGradient):
        counts = gradient.counts()[list(due)]
        return [i for i, count in zip(due, _numbers(counts), strict=True) if count]
    if isinstance(gradient, Tensor):
        norms = norm_of_each(gradient)[list(due)]
        return [i for i, norm in zip(due, _numbers(norms), strict=True) if norm != 0]
    return list(due)


def _numbers(values: Tensor) -> list[float]:
    return [value.item() for value in values.cpu().unbind()]


def _norms(gradient: Gradient, low_rank: Tensor, known: dict[int, float]) -> list[float]:
    """‖G‖ of each matrix, as far as it is known; ‖R‖ of the others where G is in factors."""
    if len(known) == len(low_rank):
        return list(known.values())
    others = _numbers(norm_of_each(gradient if isinstance(gradient, Tensor) else low_rank))
    return [known.get(index, norm) for index, norm in enumerate(others)]


def _provisional(target: Target, gradient: Gradient) -> Bases:
    """Random bases, the same for each matrix of a stack."""
    count, *shape = gradient.shape
    like = torch.empty(shape, dtype=gradient.dtype, device=gradient.device)
    bases = random_bases(like, target.side, target.rank)
    return Bases(*(None if basis is None else basis.expand(count, *basis.shape) for basis in bases))


def _built_if_cheaper(target: Target, gradient: Gradient) -> Gradient:
    """The gradients themselves, where the refresh needs them or takes fewer multiply-adds from them."""
    if not isinstance(gradient, GroupedGradient):
        return gradient
    tokens = len(gradient.inputs) // max(1, len(gradient.ends))
    method = target.group["refresh"]
    if cheaper_from_factors(gradient.shape, target.rank, target.side, method, tokens):
        return gradient
    return gradient.whole()


def chosen(gradient: Gradient, indices: Sequence[int]) -> Gradient:
    """The gradients of some matrices of a stack."""
    if isinstance(gradient, GroupedGradient):
        return gradient.of(indices)
    if isinstance(gradient, FactoredGradient):
        return FactoredGradient(*(factor[list(indices)] for factor in gradient))
    assert isinstance(gradient, Tensor)
    return gradient[list(indices)]


def _with_rows(value: Tensor, indices: Sequence[int], new: Tensor, rows: Sequence[int]) -> Tensor:
    """A copy of a tensor with some of its rows replaced by some of another's."""
    if len(indices) == len(value):
        return new
    copy = value.clone()
    copy[list(indices)] = new[list(rows)]
    return copy
