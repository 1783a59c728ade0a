"""Orthogonalising at the sizes of a 7B model, also where products of float32 matrices may be computed in TF32."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from hf_galore.rules.muon import COEFFICIENTS, STEPS, Over, orthogonalised
from tests.support.card import DEVICE, sized

ROWS, COLUMNS = sized((1024, 11008), (48, 256))


def steps_on_the_matrix(matrix: Tensor) -> Tensor:
    """Newton-Schulz in float64, as it is published."""
    a, b, c = COEFFICIENTS
    x: Tensor = matrix.double() / matrix.double().norm()
    for _ in range(STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


@pytest.fixture(params=["highest", "high"], autouse=True)
def _precision(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(request.param)
    yield
    torch.set_float32_matmul_precision(before)


def test_it_is_newton_schulz_in_float64_and_brings_up_no_noise() -> None:
    generator = torch.Generator(DEVICE).manual_seed(0)
    left, right = (
        torch.linalg.qr(torch.randn(rows, ROWS, generator=generator, device=DEVICE))[0] for rows in (ROWS, COLUMNS)
    )
    known = ROWS // 4
    values = torch.cat([torch.logspace(0, -2, known), torch.full((ROWS - known,), 1e-8)]).to(DEVICE)
    matrix = (left * values) @ right.mT
    expected = steps_on_the_matrix(matrix)
    found = orthogonalised(matrix, Over()).double()
    assert (found - expected).norm() < 1e-3 * expected.norm()
    assert torch.linalg.matrix_norm(left[:, known:].double().mT @ found, 2) < 1e-3
