"""Norm probes: what is projected with them has the norm of the gradient, but for chance."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_galore.config import ProjBits
from hf_galore.lowrank.probes import held_shape, probe_shapes, probes_for, without_probes
from hf_galore.lowrank.products import FactoredGradient
from hf_galore.lowrank.projection import (
    Bases,
    BasisShapes,
    Side,
    basis_shapes,
    low_rank_shape,
    norm_of_each,
    project,
    with_columns,
)
from hf_galore.lowrank.quantize import dequantize_basis, quantize_basis
from hf_galore.lowrank.seeds import probe_seed

SIDES: tuple[Side, ...] = ("left", "right", "full")


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def gradient(m: int, n: int, seed: int = 0) -> Tensor:
    """One whose singular values fall as the square root of their number, of norm 1."""
    left, right = (torch.linalg.qr(random(seed + i, side, side))[0] for i, side in enumerate((m, n)))
    rank = min(m, n)
    whole = left[:, :rank] * torch.arange(1, rank + 1) ** -0.5 @ right[:, :rank].mT
    unit: Tensor = whole / whole.norm()
    return unit


def bases_of(whole: Tensor, side: Side, rank: int, bits: ProjBits = 16) -> Bases:
    """The best ones, as they are kept."""
    left, _, right = torch.linalg.svd(whole, full_matrices=False)
    exact = Bases(left[..., :rank] if side != "right" else None, right.mT[..., :rank] if side != "left" else None)

    def kept(basis: Tensor | None) -> Tensor | None:
        if basis is None:
            return None
        basis = basis.contiguous()
        return dequantize_basis(quantize_basis(basis, bits, basis.dtype), basis.shape, bits, basis.dtype)

    return Bases(*map(kept, exact))


def held(whole: Any, bases: Bases, seed: int, count: int = 8) -> Tensor:
    return project(whole, with_columns(bases, probes_for(bases, count, seed)))


@pytest.mark.parametrize("side", SIDES)
def test_the_square_is_that_of_the_gradient_on_average(side: Side) -> None:
    """Of 300 seeds: within four standard errors, which are a thousandth; R alone has a third less."""
    whole = gradient(48, 40)
    bases = bases_of(whole, side, 8)
    squares = torch.stack([held(whole, bases, seed).square().sum() for seed in range(300)])
    assert project(whole, bases).square().sum() < 0.7
    error = squares.std() / math.sqrt(len(squares))
    assert error < 0.012
    assert abs(squares.mean() - 1) < 4 * error
    assert 0.01 < squares.std() < 0.2


def test_more_probes_are_nearer() -> None:
    whole = gradient(48, 64)
    bases = bases_of(whole, "left", 8)
    few, more = (
        torch.stack([held(whole, bases, seed, count).norm() for seed in range(200)]).std() for count in (2, 16)
    )
    assert 0.25 < more / few < 0.5  # √8 of them would be 0.35


@pytest.mark.parametrize("rank", [16, 64, 128])
def test_bases_in_4_bits(rank: int) -> None:
    """Their columns are too short by 0.8 % of a square. Of 16 gradients in bases of their own, and 8 seeds each."""
    squares, low_ranks, exact = [], [], []
    for index in range(16):
        whole = gradient(256, 256, seed=2 * index)
        bases = bases_of(whole, "right", rank, 4)
        squares += [held(whole, bases, 8 * index + seed).square().sum() for seed in range(8)]
        low_ranks.append(project(whole, bases).square().sum())
        exact.append(project(whole, bases_of(whole, "right", rank)).square().sum())
    assert torch.stack(low_ranks).mean() < torch.stack(exact).mean() - 0.003
    assert abs(torch.stack(squares).mean() - 1) < 0.006  # of a square: 0.3 % of a norm


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_r_is_among_it(side: Side, dtype: torch.dtype) -> None:
    whole = gradient(20, 30).to(dtype)
    bases = bases_of(whole, side, 4)
    shapes = basis_shapes(whole.shape, side, 4)
    found = held(whole, bases, seed=3)
    assert found.shape == held_shape(low_rank_shape(whole.shape, side, 4), probe_shapes(shapes, 8))
    assert found.dtype == dtype
    low_rank = project(whole, bases)
    torch.testing.assert_close(without_probes(found, side, 4), low_rank)
    assert without_probes(found, side, 4).is_contiguous()
    assert torch.equal(without_probes(low_rank, side, 4), low_rank)  # R itself stays as it is
    factors = FactoredGradient(torch.eye(20, dtype=dtype), whole)
    torch.testing.assert_close(held(factors, bases, seed=3), found)


@pytest.mark.parametrize("side", SIDES)
def test_each_of_a_stack_has_its_own(side: Side) -> None:
    whole = torch.stack([gradient(24, 20, seed) for seed in range(6)]) * torch.arange(6)[:, None, None]
    bases = bases_of(whole, side, 4)
    probes = probes_for(bases, 8, 5)
    found = held(whole, bases, 5)
    for index in range(6):
        part = Bases(*(None if basis is None else basis[index] for basis in bases))
        own = Bases(*(None if probe is None else probe[index] for probe in probes))
        torch.testing.assert_close(found[index], project(whole[index], with_columns(part, own)))
    assert found.shape == held_shape(low_rank_shape(whole.shape, side, 4), probe_shapes(shapes_of(bases), 8))
    assert without_probes(found, side, 4).shape == low_rank_shape(whole.shape, side, 4)
    norms = torch.stack([norm_of_each(held(whole, bases, seed)) for seed in range(60)])
    assert (norms.mean(dim=0) - torch.arange(6)).abs().max() < 0.15
    relative = (norms / torch.arange(6))[:, 1:]
    assert relative.corrcoef().isfinite().all()
    assert torch.corrcoef(relative.T).fill_diagonal_(0).abs().max() < 0.5  # chance is not the same for all


def shapes_of(bases: Bases) -> BasisShapes:
    return BasisShapes(*(None if basis is None else tuple(basis.shape) for basis in bases))


def test_they_are_orthogonal_to_a_basis() -> None:
    basis = torch.linalg.qr(random(0, 64, 16))[0]
    probes = probes_for(Bases(basis, None), 8, 1).left
    assert probes is not None
    assert probes.shape == (64, 8)
    assert (basis.mT @ probes).abs().max() < 1e-5
    torch.testing.assert_close(probes.square().sum(), torch.tensor(64 - 16.0), rtol=0.1, atol=0)


def test_without_a_basis_they_are_all_there_is() -> None:
    """Zeros, before the first refresh, and columns of zeros, of a gradient of a lower rank."""
    whole = gradient(32, 32)
    basis = bases_of(whole, "right", 8).right
    assert basis is not None
    for kept in (0, 3):
        some = Bases(None, torch.cat([basis[:, :kept], torch.zeros(32, 8 - kept)], dim=1))
        squares = torch.stack([held(whole, some, seed).square().sum() for seed in range(200)])
        assert abs(squares.mean() - 1) < 4 * squares.std() / math.sqrt(200)


def test_a_seed_is_what_they_follow_from() -> None:
    bases = Bases(None, torch.linalg.qr(random(0, 32, 4))[0])
    once, again, other = (probes_for(bases, 8, seed).right for seed in (1, 1, 2))
    assert once is not None
    assert again is not None
    assert other is not None
    assert torch.equal(once, again)
    assert not torch.equal(once, other)
    left, right = probes_for(Bases(bases.right, bases.right), 8, 1)
    assert left is not None
    assert right is not None
    assert not torch.equal(left, right)
    seeds = {probe_seed(index, refreshes) for index in range(20) for refreshes in range(20)}
    assert len(seeds) == 400
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize(("rank", "columns"), [(4, 8), (48, 8), (54, 5), (62, 1), (63, 1)])
def test_a_basis_that_leaves_little_has_fewer(rank: int, columns: int) -> None:
    """Half of what it leaves, so that less than the gradient is held."""
    assert probe_shapes(BasisShapes(None, (64, rank)), 8) == BasisShapes(None, (64, columns))
    assert probe_shapes(BasisShapes((3, 64, rank), None), 8) == BasisShapes((3, 64, columns), None)


BAD: dict[str, Callable[[Tensor], Any]] = {
    "nan": lambda g: g.__setitem__((3, 5), math.nan),
    "inf": lambda g: g.__setitem__((3, 5), math.inf),
}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("side", SIDES)
def test_a_gradient_that_is_not_finite_has_no_finite_norm(side: Side, bad: str) -> None:
    whole = gradient(20, 30)
    bases = bases_of(whole, side, 4)
    BAD[bad](whole)
    assert not held(whole, bases, 0).norm().isfinite()
