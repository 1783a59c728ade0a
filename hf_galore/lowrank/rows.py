"""The gradient of an embedding, of which only the rows of the tokens of a batch are not zero: those, and their numbers.

Source: the sums are torch's own (`aten::embedding_dense_backward`), as are those of `nn.Embedding`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_dense = torch.ops.aten.embedding_dense_backward


class Rows(NamedTuple):
    """Rows of a matrix that is zero elsewhere. A number may be there twice, where a row of zeros has it too."""

    values: Tensor  # k × n
    numbers: Tensor  # k integers

    def add_to_(self, matrix: Tensor) -> Tensor:
        """Add them to a matrix of m × n in place."""
        return matrix.index_add_(0, self.numbers, self.values)

    def matrix(self, height: int) -> Tensor:
        """The matrix, of so many rows."""
        return self.add_to_(self.values.new_zeros(height, self.values.shape[1]))


class EmbeddingGradient(NamedTuple):
    """The gradient of an embedding's weight, m × n, as what it is made of."""

    output_gradient: Tensor  # δ, ... × n
    tokens: Tensor  # integers from 0 to m − 1, of the shape of δ but for n
    height: int  # m
    padding: int | None = None  # the token whose row has no gradient

    def whole(self) -> Tensor:
        """G itself; autograd may differentiate it."""
        padding = -1 if self.padding is None else self.padding
        whole: Tensor = _dense(self.output_gradient, self.tokens, self.height, padding, False)
        return whole

    def rows(self) -> Rows:
        """As many rows as there are tokens, or m if that is less; each is to the bit what it is in `whole`.

        Their number follows from shapes alone, so that nobody waits for the device: the tokens are sorted, those that
        are alike get one place, and places that are left over have zeros.
        """
        tokens = self.tokens.reshape(-1).long()
        delta = self.output_gradient.reshape(len(tokens), self.output_gradient.shape[-1])
        ascending, order = tokens.sort(stable=True)
        is_new = torch.zeros_like(tokens)
        is_new[1:] = ascending[1:] != ascending[:-1]
        places = is_new.cumsum(0)
        count = min(len(tokens), self.height)
        values = _dense(delta, torch.empty_like(tokens).scatter_(0, order, places), count, -1, False)
        # Rows of zeros each have a number of their own: a GPU adds to one row one after the other.
        numbers = torch.arange(count, device=tokens.device).scatter_(0, places, ascending)
        if self.padding is not None:
            values.masked_fill_((numbers == self.padding).unsqueeze(1), 0)
        return Rows(values, numbers)
