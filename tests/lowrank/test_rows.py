"""Rows of an embedding's gradient: to the bit those of torch's matrix, in shapes that no number decides."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from hf_galore.lowrank.rows import EmbeddingGradient

HEIGHT, WIDTH = 50, 16


def gradient(tokens: int, dtype: torch.dtype, *, height: int = HEIGHT, padding: int | None = None) -> EmbeddingGradient:
    generator = torch.Generator().manual_seed(tokens)
    ids = torch.randint(height, (2, tokens), generator=generator)
    return EmbeddingGradient(torch.randn(2, tokens, WIDTH, generator=generator).to(dtype), ids, height, padding)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 6, 400])
@pytest.mark.parametrize("padding", [None, 0, HEIGHT - 1])
def test_rows_are_those_of_the_matrix(dtype: torch.dtype, tokens: int, padding: int | None) -> None:
    """A token that is there many times is a sum of many rows, which rounding makes another in another order."""
    given = gradient(tokens, dtype, padding=padding)
    rows = given.rows()
    assert rows.values.shape == (min(2 * tokens, HEIGHT), WIDTH)
    assert torch.equal(rows.matrix(HEIGHT), given.whole())
    beside = torch.randn(HEIGHT, WIDTH).to(dtype)
    assert torch.equal(rows.add_to_(beside.clone()), beside + given.whole())


def test_the_matrix_is_that_of_an_embedding() -> None:
    given = gradient(40, torch.float32, padding=3)
    weight = torch.zeros(HEIGHT, WIDTH, requires_grad=True)
    torch.nn.functional.embedding(given.tokens, weight, 3).backward(given.output_gradient)
    assert weight.grad is not None
    assert torch.equal(given.whole(), weight.grad)
    assert not given.rows().matrix(HEIGHT)[3].any()


def test_a_padding_row_that_is_not_finite_has_no_gradient() -> None:
    given = gradient(6, torch.float32, padding=3)
    given.tokens[0, 0] = 3
    given.output_gradient[0, 0] = torch.nan
    assert torch.equal(given.rows().matrix(HEIGHT), given.whole())


def test_tokens_of_32_bits() -> None:
    given = gradient(40, torch.float32)
    narrow = given._replace(tokens=given.tokens.int())
    assert torch.equal(narrow.rows().matrix(HEIGHT), given.whole())


def test_rows_of_zeros_have_numbers_of_their_own() -> None:
    """A GPU that adds thousands of them to one row does so one after the other."""
    given = gradient(20, torch.float32)
    given.tokens.fill_(7)
    rows = given.rows()
    assert rows.values[1:].count_nonzero() == 0
    assert torch.bincount(rows.numbers).max() <= 2


def test_nobody_waits_for_their_number() -> None:
    """With tensors that have no numbers each shape is known."""
    with FakeTensorMode() as fakes:
        given = gradient(6, torch.float32)
        delta, tokens = (fakes.from_tensor(each) for each in (given.output_gradient, given.tokens))
        fake = EmbeddingGradient(delta, tokens, HEIGHT, padding=3).rows()
    assert fake.values.shape == (12, WIDTH)
