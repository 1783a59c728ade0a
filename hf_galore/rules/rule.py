"""What an update rule is: the moments that it keeps for a parameter, and the direction that they give."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ..lowrank.nonfinite import Skip
from ..lowrank.ranks import Ranks
from ..lowrank.rotation import Rotation

Group = Mapping[str, Any]
Moments = Mapping[str, Tensor]


class Moment(NamedTuple):
    """One of the tensors that a rule keeps for a parameter; it starts as zeros."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    by_rows: bool = True
    """Whether its first dimension is the gradient's: where rows are divided among processes, each has its own."""


class Rule:
    """How gradients become the direction that a weight moves in: W ← (1 − ηλ)W − factor · N.

    To a rule a low-rank gradient and a whole one are alike. It has no state: moments are tensors in the optimizer's
    state, with the keys, shapes and dtypes that the rule says, and options are in the parameter group. `step` counts
    from 1 and includes the present one. Where an
    update is skipped nothing moves: the moments stay, and N is zero.

    A new rule is a subclass in a file of its own, a row of `hf_galore.rules.RULES`, and a value of the option `rule`.
    """

    option: ClassVar[str]
    """What the option `rule` calls it."""
    defaults: ClassVar[Mapping[str, Any]]
    """The options of a parameter group that the rule reads, with their defaults."""
    only_targets: ClassVar[bool] = False
    """Whether it makes directions of low-rank gradients alone: what is not projected goes by the optimizer's own."""

    def check(self, group: Group) -> None:
        """Check the rule's options of a parameter group.

        Raises:
            ValueError: one is out of range.
            ImportError: the rule needs a library that is not installed.
        """
        raise NotImplementedError

    def check_parameter(self, name: str, param: Tensor) -> None:
        """Check that the rule can train a parameter.

        Raises:
            ValueError: it cannot.
        """

    def for_shape(self, shape: tuple[int, ...], group: Group) -> Rule:
        """The rule for moments of a gradient of `shape`: this one, or another that suits small tensors better."""
        return self

    def of_stack(self, shape: tuple[int, ...]) -> Rule:
        """The rule for a stack of gradients of `shape`, each by itself: this one, if it goes by elements.

        What `for_shape` gives for one of them.
        """
        return self

    def over_rows(self, ranks: Ranks, rows: int, *, transposed: bool) -> Rule:
        """The rule for a gradient of which each process has some rows: this one, if it goes by elements.

        Args:
            ranks: the processes.
            rows: that they have together.
            transposed: whether it is the transpose of what one process would have.
        """
        return self

    def moments(self, shape: tuple[int, ...], dtype: torch.dtype, group: Group) -> dict[str, Moment]:
        """The moments of a parameter by their keys in the optimizer's state.

        Args:
            shape: of the gradient: the parameter's, or that of R for a target.
            dtype: of the parameter.
            group: the parameter's.
        """
        raise NotImplementedError

    def direction(
        self, gradient: Tensor, moments: Moments, group: Group, step: int, skip: Skip
    ) -> tuple[Tensor, float]:
        """The direction N of the gradient's shape, and the factor that it is subtracted with; updates the moments.

        Args:
            gradient: G or R, which is left as it is.
            moments: updated in place.
            group: the parameter's.
            step: t ≥ 1, the updates that the moments have had with this one.
            skip: whether the update is skipped; never known to be.
        """
        raise NotImplementedError

    def update_(self, weight: Tensor, gradient: Tensor, moments: Moments, group: Group, step: int, skip: Skip) -> bool:
        """Update a contiguous weight from its whole gradient by a kernel of the rule's own, rounding to the nearest.

        Returns:
            Whether it did; else the caller takes `direction`.
        """
        return False

    def rotate_(self, moments: Moments, group: Group, rotation: Rotation, step: int) -> None:
        """Carry the moments of a target, which have had `step` ≥ 1 updates, into its new basis, in place."""
        raise NotImplementedError

    def reset_(self, moments: Moments) -> None:
        """Start the moments anew, in place."""
        for moment in moments.values():
            moment.zero_()


def full_precision(dtype: torch.dtype) -> torch.dtype:
    """The dtype of moments: at least float32, for bfloat16 moments with β₂ = 0.999 would hardly decay."""
    return torch.promote_types(dtype, torch.float32)


def check_not_negative(group: Group, *keys: str) -> None:
    """Check that options are at least 0.

    Raises:
        ValueError: one is not, or is no number.
    """
    for key in keys:
        value = group[key]
        if not isinstance(value, (int, float, Tensor)):
            raise ValueError(f"{key} has to be a number, but is {value!r}.")  # noqa: TRY004
        if not value >= 0:
            raise ValueError(f"{key} has to be at least 0, but is {value!r}.")


def check_betas(group: Group) -> None:
    """Check β₁ and β₂.

    Raises:
        ValueError: they are not two numbers of at least 0 and below 1.
    """
    betas = group["betas"]
    if not isinstance(betas, Sequence) or len(betas) != 2 or not all(0.0 <= beta < 1.0 for beta in betas):
        raise ValueError(f"betas have to be two numbers of at least 0 and below 1, but are {betas!r}.")
