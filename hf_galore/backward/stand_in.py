"""Tensors that stand in `.grad` for a gradient that is not there: what they hold, and what they say of themselves.

What may be done with them is in `hf_galore.backward.gradient`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from typing_extensions import Self

from ..lowrank.projection import Bases, norm_of
from .held import Held8bit, LowRank, held_in_8_bits, linear_part

HOLD = "hold_gradients=True (with a Trainer: max_grad_norm above 0)"
"""For messages: what keeps the gradients of a layerwise optimizer until its step."""


def in_backward() -> bool:
    """Whether autograd is running a backward pass on this thread."""
    return torch._C._current_graph_task_id() != -1


class BasisVersion:
    """One basis of one target, until its next refresh: low-rank gradients add up only within it.

    Args:
        name: of the parameter.
        project: gives the low-rank gradient of a gradient.
    """

    __slots__ = ("name", "probes", "project")

    def __init__(self, name: str, project: Callable[[Tensor], Tensor]) -> None:
        self.name = name
        self.project = project
        self.probes: Bases | None = None
        """The norm probes that go with it, once they have been made."""


class UncommittedRefresh:
    """A refresh that was computed from one of a weight's gradients, to be used if it turns out to be the only one.

    Args:
        made: what the optimizer makes of it, if so.
        gradient: gives the gradient that it was computed from, m × n.
    """

    __slots__ = ("gradient", "made")

    def __init__(self, made: Any, gradient: Callable[[], Tensor]) -> None:
        self.made = made
        self.gradient = gradient


class StandIn(Tensor):
    """A tensor with a parameter's shape, dtype and device, and without its elements."""

    @staticmethod
    def __new__(
        cls, like: Tensor, *args: Any, dtype: torch.dtype | None = None, device: Any = None, **kwargs: Any
    ) -> Any:
        return Tensor._make_wrapper_subclass(
            cls, like.shape, strides=like.stride(), dtype=dtype or like.dtype, device=device or like.device
        )

    def stored(self) -> list[Tensor]:
        """The tensors that are in memory."""
        raise NotImplementedError

    # What tools that add up the memory of gradients ask for.

    def numel(self) -> int:
        """The elements that are in memory."""
        return sum(tensor.numel() for tensor in self.stored())

    nelement = numel

    @property
    def nbytes(self) -> int:  # type: ignore[override]
        """The bytes that are in memory."""
        return sum(tensor.nbytes for tensor in self.stored())

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        held = ", ".join(f"{tuple(tensor.shape)}" for tensor in self.stored()) or "nothing"
        return f"{type(self).__name__}(shape={tuple(self.shape)}, dtype={self.dtype}, holding {held})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(f"A {type(self).__name__} cannot be pickled. Call optimizer.zero_grad() before.")

    def __deepcopy__(self, memo: Any) -> Any:
        return self.detach().clone()


@dataclasses.dataclass(slots=True)
class _Content:
    """What a low-rank gradient and its aliases (`.data`, `.detach()`) have in common."""

    kept: LowRank
    basis: BasisVersion
    norm_of_whole: Tensor | None = None
    is_zero: bool = False
    is_lost: bool = False
    uncommitted: UncommittedRefresh | None = None
    addend: Tensor | None = None


def _shared(name: str, doc: str) -> Any:
    """A property of a low-rank gradient that its aliases share."""

    def read(self: LowRankTensor) -> Any:
        return getattr(self.content, name)

    def write(self: LowRankTensor, value: Any) -> None:
        setattr(self.content, name, value)

    return property(read, write, doc=doc)


class LowRankTensor(StandIn):
    """What a low-rank gradient consists of; its operations are `hf_galore.backward.gradient.LowRankGradient`'s.

    Args:
        like: the parameter.
        low_rank: R, which may be held in 8 bits. With norm probes it is R' (`hf_galore.lowrank.probes`), of which R is
            a part: here and below "R" is what is held.
        basis: the basis that R is in.
        norm: ‖G‖_F, 0-dimensional, where G was at hand; else the norm of what is held stands for it.
        is_zero: whether G is known to be zero.
        is_lost: whether G is known not to be finite: nothing that is added changes that.
        uncommitted: the refresh that R comes from, where it is not yet the optimizer's.
    """

    content: _Content
    kept: LowRank = _shared("kept", "R, as it is held.")
    basis: BasisVersion = _shared("basis", "The basis that R is in.")
    norm_of_whole: Tensor | None = _shared("norm_of_whole", "‖G‖_F, where it is known.")
    is_zero: bool = _shared("is_zero", "Whether G is known to be zero.")
    is_lost: bool = _shared("is_lost", "Whether G is known not to be finite.")
    uncommitted: UncommittedRefresh | None = _shared("uncommitted", "The refresh that R comes from, if not yet used.")
    addend: Tensor | None = _shared(
        "addend", "A gradient that has arrived on top of a zero one, m × n: the basis is to be made from it."
    )

    def __init__(
        self,
        like: Tensor,
        low_rank: LowRank,
        basis: BasisVersion,
        *,
        norm: Tensor | None = None,
        is_zero: bool = False,
        is_lost: bool = False,
        uncommitted: UncommittedRefresh | None = None,
        dtype: torch.dtype | None = None,
        device: Any = None,
    ) -> None:
        self.content = _Content(low_rank, basis, norm, is_zero, is_lost, uncommitted)

    @property
    def data(self) -> Self:
        """An alias, as of any tensor. Setting it gives the gradient other numbers."""
        return cast("Self", self.detach())

    @data.setter
    def data(self, value: Tensor) -> None:
        self.copy_(value)

    @property
    def low_rank(self) -> Tensor:
        """R; a copy, computed anew at each call, where it is held in 8 bits."""
        kept = self.kept
        return kept.tensor() if isinstance(kept, Held8bit) else kept

    def hold_in_8_bits(self, seed: int) -> None:
        """Hold R in 8 bits from now on, unless it is small.

        Args:
            seed: of what sums are rounded with.
        """
        self.kept = held_in_8_bits(self.kept, seed)

    def held(self) -> list[Tensor]:
        """The tensors that hold R."""
        kept = self.kept
        return kept.stored() if isinstance(kept, Held8bit) else [kept]

    def stored(self) -> list[Tensor]:
        """What holds R, and what has arrived on top of a zero one."""
        return self.held() + self._addends()

    def linear_parts(self) -> list[Tensor]:
        """The tensors that are multiplied where G is; they are finite where all that is stored is."""
        return [linear_part(self.kept), *self._addends()]

    def _addends(self) -> list[Tensor]:
        return [] if self.addend is None else [self.addend]

    def frobenius_norm(self) -> Tensor:
        """‖G‖_F where it is known, else that of what is held, which with norm probes estimates it; 0-dimensional."""
        return norm_of(self.low_rank) if self.norm_of_whole is None else self.norm_of_whole

    def replace(self, other: LowRankTensor) -> None:
        """Take over the numbers of another one of the same weight."""
        for field in dataclasses.fields(_Content):
            value = getattr(other.content, field.name)
            setattr(self.content, field.name, value.clone() if isinstance(value, (Tensor, Held8bit)) else value)

    def with_low_rank(self, low_rank: LowRank, norm: Tensor | None) -> Self:
        """One with another R in the same basis."""
        made = type(self)(
            self, low_rank, self.basis, norm=norm, is_zero=self.is_zero, dtype=low_rank.dtype, device=low_rank.device
        )
        made.is_lost, made.uncommitted, made.addend = self.is_lost, self.uncommitted, self.addend
        return made
