"""Sides, bases and projection against their definitions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_galore.config import PROJ_TYPES, ProjType
from hf_galore.lowrank import products
from hf_galore.lowrank.methods import svd_bases
from hf_galore.lowrank.products import FactoredGradient, times, transposed_times
from hf_galore.lowrank.projection import (
    Bases,
    Side,
    add_projected_back_,
    basis_shapes,
    is_projectable,
    low_rank_shape,
    project,
    side_of,
)
from hf_galore.lowrank.refresh import align_signs

pytestmark = pytest.mark.arithmetic

SHAPES = [(12, 7), (7, 12), (9, 9)]
SIDES: list[Side] = ["left", "right", "full"]


@pytest.mark.parametrize(
    ("shape", "proj_type", "side"),
    [
        ((8, 4), "std", "right"),
        ((4, 8), "std", "left"),
        ((4, 4), "std", "right"),
        ((8, 4), "reverse_std", "left"),
        ((4, 8), "reverse_std", "right"),
        ((4, 4), "reverse_std", "left"),
        ((8, 4), "left", "left"),
        ((8, 4), "right", "right"),
        ((8, 4), "full", "full"),
    ],
)
def test_side_comes_from_the_shape_of_the_weight(shape: tuple[int, int], proj_type: ProjType, side: Side) -> None:
    assert side_of(shape, proj_type) == side


@pytest.mark.parametrize(("shape", "rank", "expected"), [((8, 4), 3, True), ((8, 4), 4, False), ((8, 4), 9, False)])
def test_a_matrix_is_projectable_below_its_smaller_side(shape: tuple[int, int], rank: int, expected: bool) -> None:
    assert is_projectable(shape, rank) is expected


def test_only_matrices_are_projectable() -> None:
    assert not is_projectable((8,), 2)
    assert not is_projectable((8, 8, 8, 8), 2)
    assert is_projectable((8, 3, 4), 2)  # a stack, whose matrices count
    assert not is_projectable((8, 3, 2), 2)


@given(m=st.integers(2, 20), n=st.integers(2, 20), proj_type=st.sampled_from(PROJ_TYPES), data=st.data())
def test_shapes_agree_with_what_projection_does(m: int, n: int, proj_type: ProjType, data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, min(m, n) - 1))
    side = side_of((m, n), proj_type)
    bases = svd_bases(torch.randn(m, n), side, rank)
    assert tuple(None if basis is None else tuple(basis.shape) for basis in bases) == basis_shapes((m, n), side, rank)
    assert tuple(project(torch.randn(m, n), bases).shape) == low_rank_shape((m, n), side, rank)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("shape", SHAPES)
def test_svd_bases_are_orthonormal_and_capture_the_leading_energy(shape: tuple[int, int], side: Side) -> None:
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    rank = 3
    bases = svd_bases(gradient, side, rank)
    for basis in bases:
        if basis is not None:
            torch.testing.assert_close(basis.mT @ basis, torch.eye(rank), atol=1e-5, rtol=0)
    leading = torch.linalg.svdvals(gradient)[:rank].norm()
    torch.testing.assert_close(project(gradient, bases).norm(), leading)


def test_svd_bases_do_not_keep_the_whole_factorisation_alive() -> None:
    """The incumbent's basis is a view of U or Vh: 8 times its size at r = 64, n = 512."""
    bases = svd_bases(torch.randn(32, 64), "full", 4)
    for basis in bases:
        assert basis is not None
        assert basis.untyped_storage().nbytes() == basis.numel() * basis.element_size()


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("shape", SHAPES)
def test_projecting_back_is_the_definition(shape: tuple[int, int], side: Side) -> None:
    torch.manual_seed(0)
    bases = svd_bases(torch.randn(shape), side, 3)
    direction = torch.randn(low_rank_shape(shape, side, 3))
    weight = torch.randn(shape)
    left = bases.left if bases.left is not None else torch.eye(shape[0])
    right = bases.right if bases.right is not None else torch.eye(shape[1])
    expected = weight - 0.3 * (left @ direction @ right.mT)
    pointer = weight.data_ptr()
    add_projected_back_(weight, direction, bases, alpha=-0.3)
    torch.testing.assert_close(weight, expected)
    assert weight.data_ptr() == pointer


def test_a_low_precision_weight_takes_a_float32_direction() -> None:
    weight = torch.zeros(4, 2, dtype=torch.bfloat16)
    bases = Bases(None, torch.eye(2, 1, dtype=torch.bfloat16))
    add_projected_back_(weight, torch.ones(4, 1), bases, alpha=-0.5)
    assert weight.tolist() == [[-0.5, 0.0]] * 4


def test_signs_follow_the_old_basis() -> None:
    torch.manual_seed(0)
    old = torch.linalg.qr(torch.randn(9, 4))[0]
    drifted = torch.linalg.qr(old + 0.1 * torch.randn(9, 4))[0]
    flips = torch.tensor([1.0, -1.0, -1.0, 1.0])
    aligned = align_signs(drifted * flips, old)
    torch.testing.assert_close(aligned, align_signs(drifted, old), atol=0, rtol=0)
    assert ((aligned * old).sum(dim=0) > 0).all()
    torch.testing.assert_close(align_signs(drifted, torch.zeros(9, 4)), drifted, atol=0, rtol=0)


@pytest.mark.parametrize("elements", [1, 64, 100, 10**9])
@pytest.mark.parametrize("factored", [True, False])
def test_products_in_another_dtype_are_those_of_the_cast_gradient(
    factored: bool, elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many elements are cast at a time."""
    monkeypatch.setattr(products, "CAST_ELEMENTS", elements)
    delta, inputs = (torch.randn(11, size).to(torch.bfloat16) for size in (12, 7))
    whole = delta.double().mT @ inputs.double()
    gradient = FactoredGradient(delta, inputs) if factored else whole.to(torch.bfloat16)
    expected = whole if factored else whole.to(torch.bfloat16).double()
    for matrix in (torch.randn(7, 3), torch.randn(7, 3, dtype=torch.float64)):
        found = times(gradient, matrix)
        assert found.dtype == matrix.dtype
        torch.testing.assert_close(found.double(), expected @ matrix.double(), rtol=1e-5, atol=1e-5)
    for matrix in (torch.randn(12, 3), torch.randn(12, 3, dtype=torch.float64)):
        found = transposed_times(gradient, matrix)
        assert found.dtype == matrix.dtype
        torch.testing.assert_close(found.double(), expected.mT @ matrix.double(), rtol=1e-5, atol=1e-5)
