"""Some matrices of a stack: their part of the moments and bases that are kept for all."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from ..lowrank.projection import Bases
from .bases import State


def of_matrices(values: State, indices: Sequence[int], count: int) -> State:
    """The part that some matrices have in the moments of `count`: copies."""
    return {
        key: _apart(value, count)[list(indices)].flatten(0, _apart_dims(value, count)) for key, value in values.items()
    }


def put_of_matrices(values: State, part: State, indices: Sequence[int], count: int) -> None:
    """Put that part back, in place."""
    for key, value in values.items():
        whole = _apart(value, count)
        whole[list(indices)] = part[key].view(len(indices), *whole.shape[1:])


def _apart(value: Tensor, count: int) -> Tensor:
    """A view in which the first dimension is that of the stack: scales of 8-bit moments are in one row."""
    return value if value.shape[0] == count and value.ndim > 1 else value.view(count, -1)


def _apart_dims(value: Tensor, count: int) -> int:
    """The dimensions to put together again."""
    return 0 if value.shape[0] == count and value.ndim > 1 else 1


def bases_of_matrices(bases: Bases, indices: Sequence[int]) -> Bases:
    """The bases of some matrices; copies, unless it is all of them."""
    every = next(len(basis) for basis in bases if basis is not None) == len(indices)
    return bases if every else Bases(*(None if basis is None else basis[list(indices)] for basis in bases))


def by_age(
    direction: Callable[[Tensor, State, int], tuple[Tensor, float]],
    low_rank: Tensor,
    moments: State,
    ages: Sequence[int],
) -> tuple[Tensor, float]:
    """The direction of R, k matrices, whose moments have had different numbers of updates.

    Args:
        direction: gives the direction of some matrices, and the factor, from their R, their moments and that number.
        low_rank: R.
        moments: of all; updated in place.
        ages: of each matrix, the updates that its moments have had with this one.
    """
    found: Tensor | None = None
    factor = 0.0
    for age in sorted(set(ages)):
        same = [index for index, other in enumerate(ages) if other == age]
        part = of_matrices(moments, same, len(ages))
        some, factor = direction(low_rank[same], part, age)
        put_of_matrices(moments, part, same, len(ages))
        found = some.new_empty(low_rank.shape) if found is None else found
        found[same] = some
    assert found is not None
    return found, factor
