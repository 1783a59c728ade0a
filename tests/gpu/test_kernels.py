"""The kernels of a card, ours and bitsandbytes', against plain torch on the CPU, `torch.optim` and each other."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from bitsandbytes.optim.adamw import AdamW8bit
from torch import Tensor, nn

from hf_galore import kernels as own
from hf_galore.config import ProjBits
from hf_galore.integrations import bitsandbytes as kernels
from hf_galore.integrations import bitsandbytes_calls as calls
from hf_galore.lowrank.quantize import dequantize_basis, empty_basis, quantize_basis
from hf_galore.lowrank.rounding import add_rounded_, generator_for, round_stochastically
from hf_galore.optim import GaLoreAdamW, GaLoreAdamW8bit
from tests.support.card import DEVICE, sized

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Odd numbers of elements, less than a block of 64 or 256, no whole number of blocks; and a basis of a 7B model.
SHAPES = ((70, 96), (40, 16), (33, 7), (2, 1), (1, 1), sized((4096, 1024), (512, 64)))


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Of the CPU's generator, so that every device is given the same."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def assert_codes_are_near(found: Tensor, expected: Tensor) -> None:
    """Neighbouring codes for a few elements that lie between two: rounding decides there."""
    apart = (found.cpu().int() - expected.int()).abs()
    assert apart.max() <= 1
    assert apart.count_nonzero() <= max(1e-4 * apart.numel(), apart.numel() > 1000)


def halves(codes: Tensor) -> Tensor:
    return torch.stack([codes >> 4, codes & 15], dim=-1).view(-1)


@pytest.fixture(params=["ours", "bitsandbytes"])
def of(request: pytest.FixtureRequest) -> Any:
    """A module with kernels for blockwise 4 and 8 bits; ours are Triton's."""
    if request.param == "bitsandbytes":
        return calls
    if not own.serves(torch.zeros(1, device=DEVICE)):
        pytest.skip(f"no Triton kernels for this {DEVICE.type}")
    return own


@pytest.mark.parametrize("shape", SHAPES)
def test_bases_in_8_bits_are_those_of_plain_torch(of: Any, shape: tuple[int, int]) -> None:
    table = kernels.linear_table()
    values = normal(*shape) * shape[0] ** -0.5
    expected = kernels.plain_quantize_8bit(values, table, 256)
    found = of.quantize_8bit(values.to(DEVICE), table.to(DEVICE), 256)
    torch.testing.assert_close(found.absmax.cpu(), expected.absmax, rtol=0, atol=0)
    if DEVICE.type == "cuda":  # the CPU's kernel rounds to 16 bits first
        assert_codes_are_near(found.codes, expected.codes)
    assert found.codes.shape == values.shape


@pytest.mark.parametrize("shape", SHAPES)
def test_bases_in_4_bits_are_those_of_plain_torch(of: Any, shape: tuple[int, int]) -> None:
    values = normal(*shape) * shape[0] ** -0.5
    expected = kernels.plain_quantize_4bit(values, 64)
    found = of.quantize_4bit(values.to(DEVICE), 64)
    torch.testing.assert_close(found.absmax.cpu(), expected.absmax, rtol=0, atol=0)
    assert found.codes.shape == expected.codes.shape
    assert_codes_are_near(halves(found.codes), halves(expected.codes))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_codes_mean_what_they_mean_to_plain_torch(of: Any, shape: tuple[int, int], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    numel = math.prod(shape)

    def codes(*size: int) -> Tensor:
        return torch.randint(256, size, generator=generator, dtype=torch.uint8)

    table = kernels.linear_table()
    in_8 = kernels.Quantized(codes(*shape), normal(math.ceil(numel / 256)).abs() + 0.1)
    scales = (normal(math.ceil(numel / 64)).abs() + 0.1).to(torch.bfloat16)  # as bases keep them
    in_4 = kernels.Quantized(codes(math.ceil(numel / 2), 1), scales)
    there_8, there_4 = (kernels.Quantized(*(part.to(DEVICE) for part in kept)) for kept in (in_8, in_4))
    for found, expected in (
        (
            of.dequantize_8bit(there_8, table.to(DEVICE), 256, dtype),
            kernels.plain_dequantize_8bit(in_8, table, 256, torch.float32),
        ),
        (
            of.dequantize_4bit(there_4, 64, shape, dtype),
            kernels.plain_dequantize_4bit(in_4, 64, shape, torch.float32),
        ),
    ):
        assert found.shape == shape
        assert found.dtype == dtype
        torch.testing.assert_close(found.float().cpu(), expected, rtol=torch.finfo(dtype).eps, atol=1e-7)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_basis_comes_back_as_on_the_cpu(bits: ProjBits) -> None:
    for shape in SHAPES:
        basis = normal(*shape) * shape[0] ** -0.5
        both = []
        for device in (DEVICE, CPU):
            kept = quantize_basis(basis.to(device), bits, torch.bfloat16)
            room = empty_basis(shape, bits, basis.to(device))
            assert [t.shape for t in kept if t is not None] == [t.shape for t in room if t is not None]
            both.append(dequantize_basis(kept, shape, bits, torch.float32).cpu())
        found, expected = both
        assert found.shape == shape
        # One in many lies between two codes; a step of NormalFloat4 is up to a third of the largest magnitude.
        assert (found != expected).float().mean() <= (2e-2 if bits == 8 else 2e-4)
        assert (found - expected).norm() <= 1e-2 * expected.norm()
        lost = (found - basis).norm() / basis.norm()
        assert lost < (0.01 if bits == 8 else 0.15)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_without_a_rank_it_is_torchs_fused_adamw(weight_decay: float) -> None:
    weights = [nn.Parameter(normal(257, 129).to(DEVICE, copy=True)) for _ in range(2)]
    options: dict[str, Any] = {"lr": 1e-2, "weight_decay": weight_decay}
    optimizers = (GaLoreAdamW([weights[0]], **options), torch.optim.AdamW([weights[1]], fused=True, **options))
    start, steps = weights[1].detach().clone(), 10
    for step in range(steps):
        for weight, optimizer in zip(weights, optimizers, strict=True):
            weight.grad = normal(257, 129, seed=step).to(DEVICE)
            optimizer.step()
    apart, way = ((other.detach() - weights[1].detach()).norm() for other in (weights[0], start))
    # Each rounds the weight once a step, or twice with decay.
    assert apart <= 1e-6 * way + (2 * steps) ** 0.5 * torch.finfo(torch.float32).eps / 2 * weights[1].detach().norm()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_32_bit_kernel_is_adamw(dtype: torch.dtype) -> None:
    start = normal(130, 70).to(dtype)
    weight, expected = start.to(DEVICE), start.clone()
    exp_avg, exp_avg_sq = (torch.zeros(130, 70, device=DEVICE) for _ in range(2))
    exact, exact_sq = (torch.zeros(130, 70) for _ in range(2))
    for step in range(1, 6):
        gradient = normal(130, 70, seed=step).to(dtype)
        now = kernels.AdamStep(step, (0.9, 0.999), 1e-8, 1e-2, 0.0)
        kernels.adam_32bit_(weight, gradient.to(DEVICE), exp_avg, exp_avg_sq, now)
        kernels.plain_adam_(expected, gradient, exact, exact_sq, now)
    torch.testing.assert_close(exp_avg.cpu(), exact, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(exp_avg_sq.cpu(), exact_sq, rtol=1e-5, atol=1e-7)
    limit = 5 * torch.finfo(dtype).eps * expected.abs().max().item()
    assert (weight.cpu().float() - expected.float()).abs().max() <= limit


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_a_rank_8_bits_are_bitsandbytes_own(dtype: torch.dtype) -> None:
    steps, shape = 10, (256, 260)
    start = normal(*shape).to(dtype)
    on_card, theirs, on_cpu = (nn.Parameter(start.to(device, copy=True)) for device in (DEVICE, DEVICE, CPU))
    optimizers: dict[nn.Parameter, torch.optim.Optimizer] = {
        on_card: GaLoreAdamW8bit([on_card], lr=1e-2, weight_decay=0.0),
        theirs: AdamW8bit([theirs], lr=1e-2, weight_decay=0.0),
        on_cpu: GaLoreAdamW8bit([on_cpu], lr=1e-2, weight_decay=0.0),
    }
    for step in range(steps):
        gradient = normal(*shape, seed=step).to(dtype)
        for weight, optimizer in optimizers.items():
            weight.grad = gradient.to(weight.device)
            optimizer.step()
        ours, their = (optimizers[weight].state[weight] for weight in (on_card, theirs))
        apart = (ours["exp_avg"].int() - their["state1"].int()).abs()
        assert apart.max() <= 1
        assert apart.float().mean() <= 1e-3
        # Each step from the same moments: where the next gradient cancels one, a code becomes many of the smallest.
        ours["exp_avg"].copy_(their["state1"])
        ours["exp_avg_sq"].copy_(their["state2"])
    expected, way = theirs.detach().float(), (theirs.detach().float() - start.float().to(DEVICE)).norm()
    # Each rounds the weight once a step, ours not before all is added up.
    rounding = steps**0.5 * torch.finfo(dtype).eps * expected.norm()
    assert (on_card.detach().float() - expected).norm() <= 1e-5 * way + rounding
    assert (on_cpu.detach().float() - expected.cpu()).norm() <= 1e-2 * way.cpu() + rounding.cpu()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("rank", [None, 16])
@pytest.mark.parametrize("cls", [GaLoreAdamW, GaLoreAdamW8bit])
def test_a_gradient_that_is_not_finite_moves_nothing(cls: type[Any], rank: int | None, bad: float) -> None:
    weight = nn.Parameter(normal(256, 320).to(DEVICE, torch.bfloat16))
    group = {"params": [weight], **({} if rank is None else {"rank": rank})}
    optimizer = cls([group], lr=1e-2, weight_decay=0.1)
    for step in range(2):
        weight.grad = normal(256, 320, seed=step).to(DEVICE, torch.bfloat16)
        optimizer.step()

    def seen() -> dict[str, Tensor]:
        state = {key: value.clone() for key, value in optimizer.state[weight].items() if key.startswith("exp_avg")}
        return {"weight": weight.detach().clone(), **state}

    before = seen()
    assert len(before) >= 3
    weight.grad = normal(256, 320, seed=2).to(DEVICE, torch.bfloat16)
    weight.grad[3, 5] = bad
    optimizer.step()
    for key, value in seen().items():
        assert torch.equal(value, before[key]), key
    assert [(times, first) for times, first in optimizer.skipped_updates().values()] == [(1, 3)]
    assert int(optimizer.state[weight]["step"].item()) == 2
    weight.grad = normal(256, 320, seed=3).to(DEVICE, torch.bfloat16)
    optimizer.step()
    assert not torch.equal(weight, before["weight"])
    assert weight.isfinite().all()


def test_an_update_is_seen_by_autograd() -> None:
    """A backward pass through a weight that has been updated since is an error, not a wrong gradient."""
    weight = nn.Parameter(normal(128, 64).to(DEVICE))
    optimizer = GaLoreAdamW8bit([weight], lr=1e-2)
    x = normal(8, 64).to(DEVICE).requires_grad_()
    loss = (x @ weight.mT).square().sum()
    weight.grad = normal(128, 64).to(DEVICE)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_stochastic_rounding_is_right_on_average_and_repeatable() -> None:
    lower, upper = 1.0, 1.0 + 2**-7  # neighbours in bfloat16
    share, number = 0.3, sized(2**22, 2**16)
    values = torch.full((number,), lower + share * (upper - lower), device=DEVICE)
    rounded = [round_stochastically(values, generator_for(DEVICE, 1, 2, step)) for step in (3, 3, 4)]
    assert set(rounded[0].float().unique().tolist()) == {lower, upper}
    sigma = math.sqrt(share * (1 - share) / number)
    assert abs((rounded[0] == upper).double().mean().item() - share) <= 5 * sigma + 2**-16
    assert torch.equal(rounded[0], rounded[1])
    assert not torch.equal(rounded[0], rounded[2])


def test_small_updates_arrive_by_stochastic_rounding_only() -> None:
    steps, size = 100, 2**-12  # a sixteenth of half a step between neighbours of 1
    weights = [torch.ones(sized(2**16, 2**12), device=DEVICE, dtype=torch.bfloat16) for _ in range(2)]
    update = torch.ones_like(weights[0], dtype=torch.float32)
    for step in range(steps):
        generator = generator_for(DEVICE, 0, 0, step)
        add_rounded_(weights[0], update.__getitem__, alpha=-size, decay=1.0, generator=generator)
        add_rounded_(weights[1], update.__getitem__, alpha=-size, decay=1.0)
    # In each step with a probability of about 2^-12 / 2^-8 by 2^-8: the mean of all is far nearer than one of them.
    assert abs(weights[0].double().mean().item() - (1 - steps * size)) <= 1e-3
    assert (weights[1] == 1).all()
