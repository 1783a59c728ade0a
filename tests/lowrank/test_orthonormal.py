"""Cholesky QR beside Householder QR: on what it holds, where it fails, and that a failure is noticed and made good.

On a GPU bases are orthonormalised by products; here the CPU is asked to do the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from hf_galore import GaLoreAdamW
from hf_galore.config import RefreshMethod
from hf_galore.lowrank import methods, orthonormal
from hf_galore.lowrank.orthonormal import Factorisation, by_products, by_reflections, defect, gram
from hf_galore.lowrank.products import FactoredGradient
from hf_galore.lowrank.projection import Bases, Side, project
from hf_galore.lowrank.refresh import new_bases
from hf_galore.optim.refreshing import _Refresh
from tests.lowrank.test_refresh import SIDES, drifted, power_law, random, random_orthonormal, with_spectrum
from tests.support.helpers import assert_identical, target_of

SMALLER = 192
INDEX = torch.arange(SMALLER, dtype=torch.float64)
SPECTRA = {
    "1/i": 1 / (INDEX + 1),
    "i⁻⁴": (INDEX + 1) ** -4,
    "flat": torch.ones_like(INDEX),
    "down to 1e-8": 10 ** (-8 * INDEX / SMALLER),
    "a cliff of 1e-8": torch.where(INDEX < 10, 1.0, 1e-8),
    "rank 20": (INDEX < 20).double(),
    "rank 1": (INDEX < 1).double(),
}


def true_defect(basis: Tensor) -> float:
    """The largest element of |PᵀP − I|, computed in float64."""
    wide = basis.double()
    return (wide.mT @ wide - torch.eye(basis.shape[1], dtype=torch.float64)).abs().max().item()


def of_condition(condition: float, rows: int = 256, columns: int = 64) -> Tensor:
    """Columns of norm about 1 that depend on each other."""
    values = condition ** (-torch.arange(columns, dtype=torch.float64) / (columns - 1))
    mixed = random_orthonormal(rows, columns, 1, torch.float64) * values
    return mixed @ random_orthonormal(columns, columns, 2, torch.float64).mT


# ---- one matrix


@pytest.mark.parametrize(
    ("dtype", "condition", "runs"),
    [
        (torch.float32, 500, 2),
        (torch.float32, 1e6, 3),
        (torch.float64, 1e6, 2),
        (torch.float64, 1e13, 3),
    ],
)
def test_products_are_orthonormal_up_to_a_condition(dtype: torch.dtype, condition: float, runs: int) -> None:
    eps = torch.finfo(dtype).eps
    matrix = of_condition(condition).to(dtype)
    basis = by_products(matrix.clone(), runs)
    assert basis.dtype == dtype
    assert true_defect(basis) <= 10 * eps
    assert not true_defect(by_products(matrix.clone(), runs - 1)) <= 84 * eps, "a run more than it takes"
    # Columns move by the condition times what rounding moves, in QR as well.
    difference = (basis - by_reflections(matrix.clone())).norm() / basis.norm()
    assert difference <= condition * eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_columns_may_be_of_very_different_size(dtype: torch.dtype) -> None:
    matrix = (random(256, 64, dtype=torch.float64) * 10 ** (-torch.arange(64) / 8)).to(dtype)
    matrix /= matrix.abs().max()
    basis = by_products(matrix.clone())
    torch.testing.assert_close(basis, by_reflections(matrix.clone()), atol=10 * torch.finfo(dtype).eps, rtol=0)
    assert ((basis * matrix).sum(dim=0) > 0).all()  # on the side of the column that it came from


def test_what_is_orthonormal_comes_back() -> None:
    basis = random_orthonormal(256, 64, 3)
    for runs in (1, 2, 3):
        torch.testing.assert_close(by_products(basis.clone(), runs), basis, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "matrix",
    [
        torch.zeros(24, 6),
        torch.ones(24, 6),
        random(24, 6).index_fill(1, torch.tensor([2]), 0.0),
        torch.full((24, 6), float("nan")),
    ],
    ids=["zeros", "ones", "a column of zeros", "NaN"],
)
@pytest.mark.parametrize("runs", [1, 2, 3])
def test_a_failure_is_finite_and_has_a_defect(matrix: Tensor, runs: int) -> None:
    basis = by_products(matrix.clone(), runs)
    assert basis.isfinite().all()
    assert basis.abs().max() <= 1
    assert not defect(basis) <= 1


@pytest.mark.parametrize("size", [1e-6, 8e-6, 1.2e-5, 1e-3])
def test_the_defect_is_a_share_of_what_is_allowed(size: float) -> None:
    basis = random_orthonormal(256, 64, 3, torch.float64)
    basis[:, 5] += size * basis[:, 40]
    for found in (defect(basis.float()), defect(basis) * 2**-29):
        assert found == pytest.approx(size / 1e-5, abs=0.1, rel=1e-2)
    assert defect(basis.fill_(float("nan"))).isnan()


# ---- products of float32 in TF32


class TF32(TorchDispatchMode):
    """Rounds what goes into products of matrices, and into triangular solves, to 11 bits."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ("mm", "linalg_solve_triangular"):
            args = (*map(self.rounded, args[:2]), *args[2:])
        elif name in ("addmm", "addmm_"):
            args = (args[0], *map(self.rounded, args[1:3]), *args[3:])
        return func(*args, **(kwargs or {}))

    def rounded(self, matrix: Tensor) -> Tensor:
        mantissa, exponent = torch.frexp(matrix)
        return torch.ldexp((mantissa * 2**11).round() / 2**11, exponent)


@pytest.fixture
def in_tf32() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.usefixtures("in_tf32")
def test_a_gram_matrix_is_precise_in_tf32() -> None:
    matrix = of_condition(100, rows=1024).float()
    exact = matrix.double().mT @ matrix.double()
    with TF32():
        found, rounded = gram(matrix), matrix.mT @ matrix
    norms = exact.diagonal().sqrt()
    error, worse = (((m - exact) / norms / norms.unsqueeze(1)).abs().max().item() for m in (found, rounded))
    assert error <= 1e-6
    assert worse >= 1e-5  # the way that users ask for


@pytest.mark.usefixtures("in_tf32")
@pytest.mark.parametrize(("condition", "runs"), [(1, 2), (100, 2), (1e5, 3)])
def test_products_are_orthonormal_in_tf32(condition: float, runs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = of_condition(condition, rows=1024).float()
    with TF32():
        basis = by_products(matrix.clone(), runs)
        found = defect(basis)
        monkeypatch.setattr(orthonormal, "gram", lambda matrix: matrix.mT @ matrix)
        careless = by_products(matrix.clone(), runs)
    assert true_defect(basis) <= 2e-6
    assert found <= 0.2
    assert not true_defect(careless) <= 1e-5


@pytest.mark.usefixtures("in_tf32")
@pytest.mark.parametrize("way", ["products", "reflections"])
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("method", ["subspace", "randomized", "random"])
def test_refreshes_are_orthonormal_in_tf32(method: RefreshMethod, side: Side, way: Factorisation) -> None:
    """Else each of them would be computed twice, and the second time no better."""
    gradient = power_law((256, SMALLER), 1)
    with TF32():
        first = new_bases(gradient, side, 48, method, None, factorisation=way)
        second = new_bases(gradient, side, 48, method, first, factorisation=way)
    assert all(true_defect(basis) <= 4e-6 for basis in (*first, *second) if basis is not None)


# ---- refreshes


def assert_as_good(gradient: Tensor, side: Side, rank: int, old: Bases | None) -> None:
    found, expected = (
        new_bases(gradient, side, rank, "subspace", old, factorisation=way) for way in ("products", "reflections")
    )
    for basis in found:
        assert basis is None or true_defect(basis) <= 2e-6
    energy, exact = (project(gradient.double(), bases).square().sum() for bases in (found, expected))
    assert energy.item() == pytest.approx(exact.item(), rel=1e-6)


@pytest.mark.arithmetic
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("rank", [24, 48, 180])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_bases_by_products_are_as_good(spectrum: str, rank: int, side: Side) -> None:
    gradient, far = (with_spectrum((256, SMALLER), SPECTRA[spectrum], seed).float() for seed in (0, 5))
    old = new_bases(gradient, side, rank, "subspace", None)
    for later, start in ((gradient, None), (gradient, old), (drifted(gradient), old), (far, old)):
        assert_as_good(later, side, rank, start)


def refreshed(gradient: Tensor | FactoredGradient, count: list[int], monkeypatch: pytest.MonkeyPatch) -> Bases:
    """The bases of a target's first refresh, and how often it read figures."""
    weight = nn.Parameter(torch.zeros(tuple(gradient.shape)))
    optimizer = GaLoreAdamW([{"params": [weight], "rank": 16, "proj_bits": 16}], lr=1e-2)
    target = target_of(optimizer, weight)
    original = _Refresh._look

    def counted(*args: Any, **options: Any) -> None:
        count[0] += 1
        original(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(_Refresh, "_look", counted)
        made = target.new_basis(gradient)
    assert made.usable
    target.use_basis(made, target.new_version(), keep=False)
    return target.bases()


def whole(gradient: FactoredGradient) -> Tensor:
    return gradient.output_gradient.mT @ gradient.inputs


@pytest.mark.parametrize("form", [whole, lambda gradient: gradient], ids=["gradient", "factors"])
def test_a_refresh_that_fails_is_done_again_by_reflections(
    form: Callable[[FactoredGradient], Tensor | FactoredGradient], monkeypatch: pytest.MonkeyPatch
) -> None:
    gradient = form(FactoredGradient(random(80, 64, seed=1), random(80, 96, seed=2)))
    count = [0]
    expected = refreshed(gradient, count, monkeypatch)
    assert count == [1]
    monkeypatch.setattr("hf_galore.lowrank.refresh.usual", lambda device: "products")
    found = refreshed(gradient, count, monkeypatch)
    assert count == [2], "nothing failed"
    assert found.left is not None
    assert expected.left is not None
    assert not torch.equal(found.left, expected.left), "by products"
    torch.testing.assert_close(found.left, expected.left, atol=1e-4, rtol=0)
    # Of nearly dependent columns two runs without the third, or without a shift, make nothing.
    failing = torch.full((64, 16), float("nan"))
    monkeypatch.setattr(methods, "orthonormal", broken := Broken(failing))
    found = refreshed(gradient, count, monkeypatch)
    assert count == [4]
    assert broken.asked >= {"products", "reflections"}
    assert_identical(tuple(found), tuple(expected))


class Broken:
    """`orthonormal`, whose products fail as on a GPU."""

    def __init__(self, result: Tensor) -> None:
        self.result = result
        self.asked: set[str] = set()

    def __call__(self, matrix: Tensor, factorisation: orthonormal.Factorisation, *, runs: int = 2) -> Tensor:
        self.asked.add(factorisation)
        if factorisation == "products":
            return self.result.nan_to_num(0.5)
        return by_reflections(matrix)


def test_a_gradient_that_is_not_finite_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_galore.lowrank.refresh.usual", lambda device: "products")
    for value in (float("nan"), float("inf"), 0.0):
        weight = nn.Parameter(torch.zeros(64, 96))
        optimizer = GaLoreAdamW([{"params": [weight], "rank": 16}], lr=1e-2)
        monkeypatch.setattr(methods, "orthonormal", broken := Broken(torch.zeros(64, 16)))
        assert not target_of(optimizer, weight).new_basis(torch.full((64, 96), value)).usable
        assert broken.asked == {"products"}
