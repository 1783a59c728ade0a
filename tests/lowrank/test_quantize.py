"""Bases in 8 and 4 bits: what they cost, how far they are from the basis, and what that does to an update."""

from __future__ import annotations

import math
import sys
from typing import Any

import pytest
import torch
from bitsandbytes import functional
from torch import Tensor, nn

from hf_galore import GaLoreAdamW
from hf_galore.config import PROJ_BITS, ProjBits
from hf_galore.lowrank.quantize import dequantize_basis, empty_basis, quantize_basis
from tests.optim.test_classes import gradients, parameters

pytestmark = pytest.mark.arithmetic

# ‖P̂ − P‖ / ‖P‖ of a basis of many rows, whose elements are nearly normal with deviation σ:
# 16 bits: bfloat16 rounds each element by at most 2⁻⁹ of its size;
# 8 bits: half a step of a block's largest element / 127; the largest of 256 is about 3σ, so 3 / (127 · √12) = 0.7 %;
# 4 bits: NormalFloat4 has 16 values for all of a block; measured 9.2 %.
# A small basis has few blocks, and their largest elements scatter: a tenth is added for that.
RELATIVE_ERROR: dict[ProjBits, float] = {16: 2**-9, 8: 0.0077, 4: 0.101}


def orthonormal(rows: int, columns: int) -> Tensor:
    generator = torch.Generator().manual_seed(rows + columns)
    q: Tensor = torch.linalg.qr(torch.randn(rows, columns, generator=generator))[0]
    return q


def through(basis: Tensor, bits: ProjBits) -> Tensor:
    """The basis as it is read back, with bfloat16 for 16 bits."""
    return dequantize_basis(quantize_basis(basis, bits, torch.bfloat16), basis.shape, bits, torch.float32)


def error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


# ---- the numbers


@pytest.mark.parametrize("shape", [(1024, 256), (300, 40), (64, 16)])
@pytest.mark.parametrize("bits", PROJ_BITS)
def test_a_basis_comes_back_within_its_bits(bits: ProjBits, shape: tuple[int, int]) -> None:
    basis = orthonormal(*shape)
    found = error(through(basis, bits), basis)
    assert found < RELATIVE_ERROR[bits]
    # Nor is it far better: it would not be in these bits then.
    assert found > RELATIVE_ERROR[bits] / 2


def test_what_fits_in_the_dtype_comes_back_as_it_was() -> None:
    basis = orthonormal(30, 4)
    kept = quantize_basis(basis, 16, torch.float32)
    assert kept.absmax is None
    assert torch.equal(dequantize_basis(kept, basis.shape, 16, torch.float32), basis)


def test_equal_steps_are_better_than_the_code_for_moments() -> None:
    basis = orthonormal(1024, 256)
    dynamic = functional.dequantize_blockwise(*functional.quantize_blockwise(basis, blocksize=256))
    # Measured: 0.70 % against 1.09 %.
    assert error(through(basis, 8), basis) < 0.75 * error(dynamic, basis)


@pytest.mark.parametrize(("bits", "bound"), [(16, 0.004), (8, 0.015), (4, 0.2)])
def test_a_quantised_basis_is_nearly_orthonormal(bits: ProjBits, bound: float) -> None:
    """P̂ᵀP̂ − I is about PᵀE + EᵀP: of size 2√2 · √(r/k) times the relative error where E is like noise.

    That is 0.0025, 0.0099 and 0.13 for 1024 × 256, and 0.0023, 0.0098 and 0.13 are measured. The bounds are half as
    much again: errors that all pointed inwards or outwards, as truncation gives them, would be past them.
    """
    basis = through(orthonormal(1024, 256), bits)
    assert torch.linalg.matrix_norm(basis.mT @ basis - torch.eye(256), 2) < bound


@pytest.mark.parametrize("shape", [(1024, 256), (300, 40), (64, 16)])
@pytest.mark.parametrize("bits", PROJ_BITS)
def test_an_update_is_off_by_no_more_than_the_basis(bits: ProjBits, shape: tuple[int, int]) -> None:
    """‖P̂N − PN‖ / ‖PN‖: that of the basis for most directions, and 1 + √(r/k) times it for the worst."""
    rows, rank = shape
    basis = orthonormal(*shape)
    quantised = through(basis, bits)
    direction = torch.randn(rank, 200)
    # 200 random columns average over the columns of the basis.
    assert error(quantised @ direction, basis @ direction) < 1.1 * error(quantised, basis)
    *_, vh = torch.linalg.svd(quantised - basis, full_matrices=False)
    worst = vh[:1].mT
    # The largest singular value of a noise matrix of k × r is √k + √r times its deviation; a tenth for its scatter.
    factor = 1.1 * (1 + math.sqrt(rank / rows))
    assert error(quantised @ worst, basis @ worst) < factor * RELATIVE_ERROR[bits]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("bits", PROJ_BITS)
def test_every_dtype_reads_the_same_basis(bits: ProjBits, dtype: torch.dtype) -> None:
    basis = orthonormal(33, 7)  # 231 elements: less than a block
    kept = quantize_basis(basis, bits, torch.float32)
    found = dequantize_basis(kept, basis.shape, bits, dtype)
    assert found.dtype == dtype
    assert torch.equal(found, dequantize_basis(kept, basis.shape, bits, torch.float32).to(dtype))


@pytest.mark.parametrize("bits", [8, 4])
def test_a_basis_of_zeros_stays_one(bits: ProjBits) -> None:
    assert torch.equal(through(torch.zeros(40, 9), bits), torch.zeros(40, 9))


@pytest.mark.parametrize("bits", [8, 4])
def test_a_transposed_view_is_read_by_its_indices(bits: ProjBits) -> None:
    """The kernels walk the memory."""
    basis = orthonormal(40, 9)
    view = basis.mT.contiguous().mT
    assert torch.equal(through(view, bits), through(basis, bits))


# ---- the room they take


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("bits", PROJ_BITS)
@pytest.mark.parametrize("shape", [(7, 3), (1000, 7), (64, 16), (64, 4), (16, 4)], ids=str)
def test_the_room_made_is_the_room_needed(shape: tuple[int, int], bits: ProjBits, device: str) -> None:
    """Odd sizes, and exactly one block of 8 bits (64 × 4) and of 4 (16 × 4)."""
    empty = empty_basis(shape, bits, torch.empty(1, dtype=torch.bfloat16, device=device))
    full = quantize_basis(orthonormal(*shape), bits, torch.bfloat16)
    for room, needed in zip(empty, full, strict=True):
        if needed is None:
            assert room is None
        else:
            assert room is not None
            assert (room.shape, room.dtype, room.device.type) == (needed.shape, needed.dtype, device)


@pytest.mark.parametrize(("bits", "each"), [(16, 16.0), (8, 8.125), (4, 4.25)])
def test_an_element_takes_the_bits_it_says(bits: ProjBits, each: float) -> None:
    kept = quantize_basis(orthonormal(1024, 256), bits, torch.bfloat16)
    taken = sum(tensor.numel() * tensor.element_size() for tensor in kept if tensor is not None)
    assert 8 * taken == each * 1024 * 256


@pytest.mark.parametrize("bits", [8, 4])
def test_sizes_that_are_no_whole_blocks_are_rounded_up(bits: ProjBits) -> None:
    """1000 × 7 is neither a whole number of blocks nor, at 4 bits and 7 × 3, of bytes."""
    for rows, rank, codes, scales in [
        (1000, 7, {8: 7000, 4: 3500}, {8: 28, 4: 110}),
        (7, 3, {8: 21, 4: 11}, {8: 1, 4: 1}),
    ]:
        kept = quantize_basis(orthonormal(rows, rank), bits, torch.float32)
        assert kept.absmax is not None
        assert (kept.codes.dtype, kept.codes.numel()) == (torch.uint8, codes[bits])
        dtype = torch.float32 if bits == 8 else torch.bfloat16
        assert (kept.absmax.dtype, kept.absmax.numel()) == (dtype, scales[bits])


# ---- in an optimizer


def trained(shape: tuple[int, int], bits: ProjBits) -> tuple[Tensor, GaLoreAdamW, nn.Parameter]:
    """How far 30 steps have gone, with refreshes at the first, the 11th and the 21st."""
    (param,) = parameters(shape)
    start = param.detach().clone()
    options: dict[str, Any] = {"rank": 12, "update_proj_gap": 10, "scale": 0.5, "refresh": "svd", "proj_bits": bits}
    optimizer = GaLoreAdamW([{"params": [param], "stagger": False, **options}], lr=1e-2, weight_decay=0.0)
    for gradient in gradients(shape, 30, falloff=1.3):
        param.grad = gradient
        optimizer.step()
    return param.detach() - start, optimizer, param


@pytest.mark.parametrize("shape", [(64, 48), (48, 64)])
@pytest.mark.parametrize(
    ("bits", "bound"),
    [
        # The strongest direction is 1.3¹¹ = 18 times the weakest that is kept: what the basis mixes of the one into
        # the coordinate of the other, Adam scales up with it. Measured: 1.6 % and 25 %.
        (8, 0.03),
        (4, 0.35),
    ],
)
def test_training_with_codes_stays_near_training_with_bases(
    bits: ProjBits, bound: float, shape: tuple[int, int]
) -> None:
    found, optimizer, param = trained(shape, bits)
    state = optimizer.state[param]
    (side,) = {"basis_left", "basis_right"} & set(state)
    assert state[side].dtype == torch.uint8
    assert state[f"{side}_absmax"].dtype == (torch.float32 if bits == 8 else torch.bfloat16)
    expected, *_ = trained(shape, 16)
    distance = error(found, expected)
    assert 0 < distance < bound


def test_without_bitsandbytes_bases_in_8_and_4_bits_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    for bits in (8, 4):
        (param,) = parameters((12, 7))
        param.grad = torch.ones_like(param)
        with pytest.raises(ImportError, match=r"need bitsandbytes: pip install bitsandbytes, or set proj_bits=16"):
            GaLoreAdamW([{"params": [param], "rank": 3, "proj_bits": bits}]).step()


def test_without_bitsandbytes_a_basis_in_16_bits_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    (param,) = parameters((12, 7))
    before = param.detach().clone()
    param.grad = torch.ones_like(param)
    GaLoreAdamW([{"params": [param], "rank": 3, "proj_bits": 16}]).step()
    assert not torch.equal(param, before)
