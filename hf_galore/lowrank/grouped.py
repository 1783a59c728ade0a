"""The gradient of a stack of weights each of which has tokens of its own, as experts have: products group by group.

torch has one kernel for all groups (`torch.nn.functional.grouped_mm`), which a mixture of experts is computed with
itself; where it cannot be used, the groups are taken one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

grouped_mm: Callable[..., Any] | None = getattr(torch.nn.functional, "grouped_mm", None)
"""torch's kernel, where it has one (2.10 and later)."""


class GroupedGradient(NamedTuple):
    """The gradients G_e = δ_eᵀX_e of k weights of m × n, of which each has rows of its own in δ and X.

    A weight without rows has a gradient of zero. Rows behind the last group belong to none.
    """

    output_gradient: Tensor  # δ, T × m
    inputs: Tensor  # X, T × n
    ends: Tensor  # the row behind each group, k integers (int32) that never decrease

    @property
    def shape(self) -> tuple[int, int, int]:
        """k × m × n."""
        return len(self.ends), self.output_gradient.shape[1], self.inputs.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of both factors."""
        return self.output_gradient.dtype

    @property
    def device(self) -> torch.device:
        """The device of both factors."""
        return self.output_gradient.device

    def transposed(self) -> GroupedGradient:
        """Gᵀ, k × n × m, without copying anything."""
        return GroupedGradient(self.inputs, self.output_gradient, self.ends)

    def counts(self) -> Tensor:
        """The rows of each weight, k integers."""
        return torch.diff(self.ends, prepend=self.ends.new_zeros(1))

    def of(self, indices: Sequence[int]) -> GroupedGradient:
        """The gradients of some of the weights, in ascending order. Waits for the device."""
        starts, ends = _bounds(self.ends)
        rows = [torch.arange(starts[i], ends[i], device=self.device) for i in indices]
        chosen = torch.cat(rows) if rows else torch.arange(0, device=self.device)
        counts = self.counts()[list(indices)]
        return GroupedGradient(
            self.output_gradient[chosen], self.inputs[chosen], torch.cumsum(counts, 0, dtype=self.ends.dtype)
        )

    def whole(self) -> Tensor:
        """G, k × m × n."""
        return products_of_groups(self.output_gradient, self.inputs, self.ends)

    def times(self, matrices: Tensor) -> Tensor:
        """G_e M_e for k matrices of n × c, or for one that all share; k × m × c in the dtype of M."""
        dtype = matrices.dtype
        matrices = matrices.expand(len(self.ends), *matrices.shape[-2:])
        if self.dtype == dtype:
            return products_of_groups(self.output_gradient, rows_times(self.inputs, matrices, self.ends), self.ends)
        # One group at a time: copies of both factors in another dtype would take more than all else in a refresh.
        product = matrices.new_zeros(len(self.ends), self.output_gradient.shape[1], matrices.shape[2])
        for index, (start, end) in enumerate(zip(*_bounds(self.ends), strict=True)):
            if end > start:
                inner = self.inputs[start:end].to(dtype) @ matrices[index]
                torch.mm(self.output_gradient[start:end].to(dtype).mT, inner, out=product[index])
        return product

    def projected(self, left: Tensor | None, right: Tensor | None) -> Tensor:
        """P_eᵀG_e, G_eQ_e or P_eᵀG_eQ_e for bases of k × m × r and k × n × r, in the dtype of the factors."""
        a, b = self.output_gradient, self.inputs
        if left is not None:
            a = rows_times(a, left.to(a.dtype), self.ends)
        if right is not None:
            b = rows_times(b, right.to(b.dtype), self.ends)
        return products_of_groups(a, b, self.ends)


def rows_times(rows: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    """The rows of each group times its matrix, T × c.

    Args:
        rows: T × n.
        matrices: k × n × c, in the dtype of the rows.
        ends: the row behind each group. What rows behind the last give is undefined.
    """
    if _serves(rows, matrices):
        assert grouped_mm is not None
        return cast("Tensor", grouped_mm(rows, matrices, offs=ends))
    product = rows.new_zeros(len(rows), matrices.shape[2])
    for index, (start, end) in enumerate(zip(*_bounds(ends), strict=True)):
        if end > start:
            torch.mm(rows[start:end], matrices[index], out=product[start:end])
    return product


def products_of_groups(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    """A_eᵀB_e for the rows of each group, k × m × n; zeros for a group without rows.

    Args:
        a: T × m.
        b: T × n, of the same dtype.
        ends: the row behind each group.
    """
    if _serves(a.mT, b):
        assert grouped_mm is not None
        return cast("Tensor", grouped_mm(a.mT, b, offs=ends))
    product = a.new_zeros(len(ends), a.shape[1], b.shape[1])
    for index, (start, end) in enumerate(zip(*_bounds(ends), strict=True)):
        if end > start:
            torch.mm(a[start:end].mT, b[start:end], out=product[index])
    return product


def _bounds(ends: Tensor) -> tuple[list[int], list[int]]:
    """The first row of each group, and the row behind it; waits for the device."""
    behind = ends.tolist()
    return [0, *behind[:-1]], behind


def _serves(a: Tensor, b: Tensor) -> bool:
    """Whether torch's kernel takes these: rows of whole 16 bytes, on a GPU of bfloat16 and from capability 8.0."""
    if grouped_mm is None or len(a) == 0 or len(b) == 0:
        return False
    strides = [stride * tensor.element_size() for tensor in (a, b) for stride in tensor.stride() if stride != 1]
    if any(stride % 16 for stride in strides):
        return False
    if a.device.type == "cuda":
        return a.dtype == torch.bfloat16 and torch.cuda.get_device_capability(a.device) >= (8, 0)
    return a.device.type == "cpu" and a.dtype in (torch.float32, torch.bfloat16, torch.float16)
