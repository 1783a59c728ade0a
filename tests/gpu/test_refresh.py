"""Refreshes at the sizes of a 7B model: what a basis captures, that it is orthonormal, and what is no gradient."""

from __future__ import annotations

import functools
import logging
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_galore.config import RefreshMethod
from hf_galore.lowrank.products import FactoredGradient
from hf_galore.lowrank.projection import Bases, project, side_of
from hf_galore.lowrank.refresh import figures_of, new_bases
from hf_galore.optim import GaLoreAdamW
from tests.support.card import DEVICE, sized

RANK = sized(1024, 24)
SHAPES: tuple[tuple[int, int], ...] = sized(((4096, 4096), (11008, 4096), (4096, 11008)), ((96, 96), (256, 96)))
# Singular values i^power, and how much of an SVD's energy a basis has to capture: of a spectrum as gradients have it,
# and of one that is flatter.
SPECTRA = {-1.0: 0.99, -0.5: 0.96}


@functools.cache
def gradient_of(shape: tuple[int, int], power: float) -> tuple[Tensor, float]:
    """A matrix with known singular values, float32, and the energy that its leading singular vectors capture."""
    small = min(shape)
    generator = torch.Generator(DEVICE).manual_seed(0)
    left, right = (
        torch.linalg.qr(torch.randn(side, small, generator=generator, device=DEVICE, dtype=torch.float32))[0]
        for side in shape
    )
    sigma = torch.arange(1, small + 1, device=DEVICE, dtype=torch.float32).pow(power)
    energy = (sigma[:RANK].square().sum() / sigma.square().sum()).item()
    return (left * sigma) @ right.mT, energy


@pytest.fixture(scope="module", autouse=True)
def _forget() -> Any:
    yield
    gradient_of.cache_clear()


def orthonormal_error(bases: Bases) -> float:
    return max(
        (basis.mT @ basis - torch.eye(basis.shape[1], device=DEVICE)).abs().max().item()
        for basis in bases
        if basis is not None
    )


def assert_captures(bases: Bases, gradient: Tensor, energy: float) -> None:
    captured = project(gradient, bases).double().square().sum() / gradient.double().square().sum()
    assert energy <= captured.item() <= 1
    assert orthonormal_error(bases) <= 1e-5


@pytest.mark.parametrize("method", ["subspace", "randomized"])
@pytest.mark.parametrize("power", SPECTRA)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_refresh_captures_what_an_svd_does(shape: tuple[int, int], power: float, method: RefreshMethod) -> None:
    gradient, exact = gradient_of(shape, power)
    side = side_of(shape, "std")
    noise = torch.randn_like(gradient)
    drifted = gradient + noise * (0.1 * gradient.norm() / noise.norm())
    del noise
    old = new_bases(drifted, side, RANK, method, None)
    assert_captures(new_bases(gradient, side, RANK, method, old), gradient, SPECTRA[power] * exact)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_first_refresh_of_a_bfloat16_gradient(shape: tuple[int, int]) -> None:
    gradient, exact = gradient_of(shape, -1.0)
    rounded = gradient.bfloat16()
    bases = new_bases(rounded, side_of(shape, "std"), RANK, "subspace", None)
    assert all(basis.dtype == torch.float32 for basis in bases if basis is not None)
    assert_captures(bases, gradient, 0.99 * exact)


def test_factors_give_the_bases_of_their_product() -> None:
    shape, rows = SHAPES[1], sized(4096, 96)
    side = side_of(shape, "std")
    generator = torch.Generator(DEVICE).manual_seed(1)
    weights = torch.arange(1, rows + 1, device=DEVICE).pow(-0.5).unsqueeze(1)
    delta, inputs = (torch.randn(rows, n, generator=generator, device=DEVICE) for n in shape)
    factors = FactoredGradient(delta * weights, inputs)
    product = factors.output_gradient.mT @ inputs
    found, expected = (new_bases(gradient, side, RANK, "subspace", None) for gradient in (factors, product))
    shares = [
        project(product, bases).square().sum().item() / product.square().sum().item() for bases in (found, expected)
    ]
    assert shares[0] == pytest.approx(shares[1], rel=1e-3)
    assert orthonormal_error(found) <= 1e-5
    norm, energy, overlap = figures_of(factors, project(factors, found), found, None).tolist()
    assert norm == pytest.approx(product.norm().item(), rel=0.1)  # estimated from 16 probes
    assert energy == pytest.approx(shares[0], rel=0.2)
    assert overlap == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_no_factorisation_fails_on_what_is_not_finite(bad: float) -> None:
    shape = SHAPES[0]
    gradient = gradient_of(shape, -0.5)[0].clone()
    old = new_bases(gradient, "right", RANK, "subspace", None)
    gradient[1, 2] = bad
    methods: tuple[RefreshMethod, ...] = ("subspace", "randomized")
    for method in methods:
        bases = new_bases(gradient, "right", RANK, method, old)
        assert bases.right is not None
        assert bases.right.shape == (shape[1], RANK)


def target(shape: tuple[int, int]) -> tuple[nn.Parameter, GaLoreAdamW]:
    generator = torch.Generator(DEVICE).manual_seed(2)
    weight = nn.Parameter(torch.randn(shape, generator=generator, device=DEVICE).bfloat16())
    return weight, GaLoreAdamW([{"params": [weight], "rank": RANK}], lr=1e-2, weight_decay=0.0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_refresh_waits_for_a_finite_gradient(bad: float, caplog: pytest.LogCaptureFixture) -> None:
    shape = SHAPES[-1]
    weight, optimizer = target(shape)
    before = weight.detach().clone()
    good = gradient_of(shape, -0.5)[0].bfloat16()
    weight.grad = good.clone()
    weight.grad[0, 0] = bad
    optimizer.step()
    assert torch.equal(weight, before)
    assert optimizer.refresh_figures()["refreshes"] == 0
    with caplog.at_level(logging.WARNING):
        optimizer.warn_of_skipped()
    assert "NaN or infinite" in caplog.text
    weight.grad = good
    optimizer.step()
    figures = optimizer.refresh_figures()
    assert figures["refreshes"] == 1
    assert figures["captured_energy_min"] > 0.3
    assert not torch.equal(weight, before)


def test_a_gradient_of_zeros_makes_no_basis() -> None:
    weight, optimizer = target(SHAPES[-1])
    before = weight.detach().clone()
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    assert torch.equal(weight, before)
    assert optimizer.refresh_figures()["refreshes"] == 0
