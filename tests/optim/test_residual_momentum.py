"""The residual's own momentum in 8 bits: what it computes, beside a reference that reads the codes by itself."""

from __future__ import annotations

import copy
import io
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from bitsandbytes.functional import create_dynamic_map
from torch import Tensor, nn

from hf_galore import GaLoreAdamW, GaLoreAdamW8bit
from hf_galore.lowrank.projection import add_projected_back_, project
from hf_galore.optim.optimizer import GaLoreOptimizer
from hf_galore.optim.whole_muon import ABSMAX, RESIDUAL_MOMENTUM
from tests.optim.test_residual import KINDS, OPTIONS, gradients, made, reference_of
from tests.support.helpers import assert_a_bad_gradient_changes_nothing

BLOCK = 256
M, N = 64, 80  # 20 blocks of 256
OPTION = "muon, momentum"
Array = npt.NDArray[np.float64]


def read(state: dict[str, Tensor]) -> tuple[Array, Array]:
    """M_S as its codes stand for it, and the values that each of its elements could have had: a row for each block."""
    table = create_dynamic_map(signed=True).numpy().astype(np.float64)
    codes = state[RESIDUAL_MOMENTUM].numpy().reshape(-1, BLOCK)
    possible = table[None, :] * state[ABSMAX].numpy().astype(np.float64)[:, None]
    return np.take_along_axis(possible, codes.astype(np.int64), axis=1), possible


def in_8_bits(shape: tuple[int, ...], dtype: torch.dtype = torch.float64, **group: Any) -> tuple[Any, nn.Parameter]:
    """An optimizer of one weight, whose M_S has codes, and the weight."""
    weight = nn.Parameter(torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(2)))
    return made(weight, OPTION, **group), weight


@pytest.mark.parametrize("stack", [None, 3])
@pytest.mark.parametrize("side", ["left", "right", "full"])
def test_it_follows_the_formula_for_fifty_steps_with_refreshes(side: str, stack: int | None) -> None:
    """M_S is read from what the state holds, and what the state holds next is the nearest to what it should be."""
    shape = (M, N) if stack is None else (stack, M, N)
    optimizer, weight = in_8_bits(shape, proj_type=side)
    (target,) = optimizer.targets()
    start = weight.detach().numpy().copy().reshape(-1, M, N)
    references = [reference_of(OPTION, one) for one in start]
    state, largest = optimizer.state[weight], 0.0
    for gradient in gradients(shape, 50):
        weight.grad = gradient.clone()
        optimizer.step()
        assert torch.equal(weight.grad, gradient)
        bases = [None if basis is None else basis.numpy().reshape(-1, *basis.shape[-2:]) for basis in target.bases()]
        for index, reference in enumerate(references):
            own = [None if basis is None else basis[index] for basis in bases]
            reference.step(gradient.numpy().reshape(-1, M, N)[index], *own)
        exact = np.stack([reference.of_residual for reference in references]).reshape(-1, BLOCK)
        found, possible = read(state)
        # A scale is the largest number of its block; a code is the nearest. bitsandbytes' kernel for CPUs looks numbers
        # up in a table of 2^16 places, so that it takes the middle between two codes, up to 0.014 apart, to 2^-15.
        np.testing.assert_allclose(state[ABSMAX].numpy(), np.abs(exact).max(1), rtol=1e-6)
        nearest = np.abs(exact[:, :, None] - possible[:, None, :]).min(2)
        assert (np.abs(found - exact) <= nearest + 2 * 2**-15 * np.abs(exact).max(1, keepdims=True)).all()
        largest = max(largest, float(np.abs(found - exact).max() / np.abs(exact).max()))
        for reference, held in zip(references, found.reshape(-1, M, N), strict=True):
            reference.of_residual = held
    assert int(np.max(state["refreshes"].numpy())) == 7
    assert 0.005 < largest < 0.0075  # it is rounded: by up to half of that
    for reference, moved, one in zip(references, weight.detach().numpy().reshape(-1, M, N), start, strict=True):
        assert np.linalg.norm(moved - reference.W) < 1e-5 * np.linalg.norm(reference.W - one)


def test_the_default_keeps_none() -> None:
    """And moves the weight as an optimizer that is not told of it, while a momentum moves it elsewhere."""
    ends = []
    for bits in ({}, {"residual_bits": 0}, {"residual_bits": 8}):
        weight = nn.Parameter(torch.ones(M, N))
        optimizer = made(weight, "muon", **bits)
        for gradient in gradients((M, N), 10, torch.float32):
            weight.grad = gradient
            optimizer.step()
        ends.append(weight.detach())
        assert (RESIDUAL_MOMENTUM in optimizer.state[weight]) == bool(bits.get("residual_bits"))
    assert torch.equal(ends[0], ends[1])
    assert (ends[2] - ends[0]).norm() > 0.1 * (ends[0] - 1).norm()


# ---- what is kept


@pytest.mark.parametrize(
    ("shape", "found"),
    [
        ((64, 64), (torch.uint8, 16)),
        ((63, 65), (torch.float32, None)),  # 4,095 elements
        ((64, 65), (torch.uint8, 17)),  # the last block is not full
        ((3, 64, 64), (torch.uint8, 48)),
        ((3, 64, 65), (torch.float32, None)),  # blocks would run from one matrix into the next
        ((3, 32, 64), (torch.float32, None)),  # of 6,144 elements, each matrix of 2,048
    ],
    ids=str,
)
@pytest.mark.parametrize("cls", [GaLoreAdamW, GaLoreAdamW8bit])
def test_matrices_are_in_as_many_bits_as_moments_of_adam(
    shape: tuple[int, ...], found: tuple[torch.dtype, int | None], cls: type[GaLoreOptimizer]
) -> None:
    weight = nn.Parameter(torch.ones(shape, dtype=torch.bfloat16))
    group = {"params": [weight], "rank": 4, "rule": "muon", "residual": "muon", "residual_bits": 8}
    optimizer = cls([group], lr=1e-2)
    weight.grad = torch.randn(shape).to(torch.bfloat16)
    optimizer.step()
    state = optimizer.state[weight]
    dtype, blocks = found
    assert (state[RESIDUAL_MOMENTUM].shape, state[RESIDUAL_MOMENTUM].dtype) == (torch.Size(shape), dtype)
    assert (list(state[ABSMAX].shape) if ABSMAX in state else [None]) == [blocks]
    memory = optimizer.memory()
    assert memory.moment_bytes + memory.basis_bytes == sum(
        value.nbytes for key, value in state.items() if key not in ("step", "refreshed_at", "refreshes")
    )
    alone = GaLoreAdamW8bit([nn.Parameter(torch.ones(shape, dtype=torch.bfloat16))], lr=1e-2)
    if len(shape) == 2:  # the matrix itself as a moment of Adam's
        (param,) = alone.param_groups[0]["params"]
        param.grad = torch.ones_like(param)
        alone.step()
        assert alone.state[param]["exp_avg"].dtype == dtype


def test_each_matrix_of_a_stack_is_as_by_itself() -> None:
    stack = nn.Parameter(torch.ones(3, M, N))
    ones = [nn.Parameter(torch.ones(M, N)) for _ in range(3)]
    optimizers = [made(weight, OPTION) for weight in (stack, *ones)]
    for gradient in gradients((3, M, N), 12, torch.float32):
        for weight, of_it in zip((stack, *ones), (gradient, *gradient), strict=True):
            weight.grad = of_it.clone()
        for optimizer in optimizers:
            optimizer.step()
    state = optimizers[0].state[stack]
    for index, (one, optimizer) in enumerate(zip(ones, optimizers[1:], strict=True)):
        assert (stack[index] - one).norm() < 1e-5 * (one - 1).norm()
        blocks = slice(index * M * N // BLOCK, (index + 1) * M * N // BLOCK)
        alone = optimizer.state[one]
        assert torch.allclose(state[ABSMAX][blocks], alone[ABSMAX], rtol=1e-5)
        # What rounding tips over is the next code.
        apart = state[RESIDUAL_MOMENTUM][index].int() - alone[RESIDUAL_MOMENTUM].int()
        assert apart.abs().max() <= 1
        assert (apart != 0).float().mean() < 0.01


@pytest.mark.parametrize("moments", ["keep", "reset"])
def test_a_refresh_leaves_it(moments: str) -> None:
    """Whatever becomes of the momentum of R: without a residual in the new bases M_S only fades."""
    optimizer, weight = in_8_bits((M, N), moments=moments, update_proj_gap=2)
    (target,) = optimizer.targets()
    state = optimizer.state[weight]
    for gradient in gradients((M, N), 2):
        weight.grad = gradient
        optimizer.step()
    before, _ = read(state)
    generator = torch.Generator().manual_seed(7)
    left, right = (torch.randn(size, 4, generator=generator, dtype=torch.float64) for size in (M, N))
    weight.grad = left @ right.mT  # of the rank of the bases that it makes
    optimizer.step()
    assert int(state["refreshes"]) == 2
    basis = target.bases().left
    assert basis is not None
    assert (basis.mT @ torch.linalg.qr(left).Q).square().sum() == pytest.approx(4)
    found, _ = read(state)
    assert np.abs(found - 0.95 * before).max() < 0.02 * np.abs(before).max()


@pytest.mark.parametrize("side", ["left", "right", "full"])
@pytest.mark.parametrize("stack", [None, 3])
def test_a_refresh_that_rotates_divides_the_momentum_of_the_whole_anew(side: str, stack: int | None) -> None:
    """Of it nothing is lost but rounding, and what the new bases have of it they have all of."""
    shape = (M, N) if stack is None else (stack, M, N)
    optimizer, weight = in_8_bits(shape, moments="rotate", update_proj_gap=2, proj_type=side)
    (target,) = optimizer.targets()
    state = optimizer.state[weight]

    def whole() -> Tensor:
        held, _ = read(state)
        both = torch.from_numpy(held).view(shape)
        add_projected_back_(both, state["momentum_buffer"], target.bases(), 1.0)
        return both

    some = gradients(shape, 5)
    for gradient in some[:4]:
        weight.grad = gradient
        optimizer.step()
    before = whole()
    gradient = some[4].clone()
    if stack is not None:
        gradient[1] = 0  # one that has no refresh, and whose momentum fades as it did
    weight.grad = gradient
    optimizer.step()
    assert state["refreshes"].flatten().tolist() == ([3.0] if stack is None else [3.0, 2.0, 3.0])
    expected = 0.95 * before + 0.05 * gradient
    assert (whole() - expected).abs().max() < 0.01 * expected.abs().max()
    of_bases = project(expected, target.bases())
    assert (state["momentum_buffer"] - of_bases).norm() < 0.02 * of_bases.norm()


# ---- ways to the gradient


class Net(nn.Module):
    """Two targets whose M_S has codes."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(M, N), nn.Linear(N, M)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.down(torch.tanh(self.up(x)))
        return x + made


def trained(cls: type[GaLoreOptimizer], dtype: torch.dtype, *, parts: int = 1, **way: Any) -> dict[str, Tensor]:
    """The weights and the momenta of residuals after some steps, of as many micro-batches each."""
    torch.manual_seed(0)
    net = Net().to(dtype)
    group = {"rank": 4, "update_proj_gap": 4, "scale": 0.5, **OPTIONS[OPTION]}
    targets = {param: group for param in net.parameters() if param.ndim > 1}
    optimizer = cls(net.parameters(), lr=1e-2, weight_decay=0.1, param_options=targets, module=net, **way)
    for batch in torch.randn(9, 16, M).to(dtype):
        for part in batch.chunk(parts):
            ((net(part) - 1).square().mean() / parts).backward()
        optimizer.step()
        optimizer.zero_grad()
    found = {name: param.detach() for name, param in net.named_parameters()}
    states = {name: optimizer.state[param] for name, param in net.named_parameters() if param.ndim > 1}
    for name, state in states.items():
        found |= {f"{name}, {key}": state[key] for key in (RESIDUAL_MOMENTUM, ABSMAX)}
    optimizer.close()
    return found


@pytest.mark.parametrize("cls", [GaLoreAdamW, GaLoreAdamW8bit])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layerwise_is_plain(cls: type[GaLoreOptimizer], dtype: torch.dtype) -> None:
    plain, layerwise = (trained(cls, dtype, layerwise=way) for way in (False, True))
    assert len(plain) == 8
    for name, value in plain.items():
        assert torch.equal(value, layerwise[name]), name


def test_an_accumulation_is_a_large_batch() -> None:
    whole, parts = (trained(GaLoreAdamW, torch.float64, parts=count) for count in (1, 4))
    for name, value in whole.items():
        assert torch.allclose(value.double(), parts[name].double(), rtol=1e-6, atol=1e-9), name


# ---- saving and skipping


@pytest.mark.parametrize("shape", [(M, N), (2, M, N)], ids=["matrix", "stack"])
def test_a_resumed_run_is_an_uninterrupted_one(shape: tuple[int, ...]) -> None:
    weight = nn.Parameter(torch.ones(shape, dtype=torch.bfloat16))
    optimizer = made(weight, OPTION)
    some = gradients(shape, 20, torch.bfloat16)
    for step, gradient in enumerate(some):
        if step == 11:  # between two refreshes
            file = io.BytesIO()
            torch.save(optimizer.state_dict(), file)
            file.seek(0)
            resumed_weight = nn.Parameter(weight.detach().clone())
            resumed = made(resumed_weight, OPTION)
            resumed.load_state_dict(torch.load(file, weights_only=True))
        weight.grad = gradient
        optimizer.step()
        if step >= 11:
            resumed_weight.grad = gradient
            resumed.step()
    assert torch.equal(weight, resumed_weight)
    for key, value in optimizer.state[weight].items():
        assert torch.equal(value, resumed.state[resumed_weight][key]), key


def test_a_checkpoint_without_it_is_refused() -> None:
    optimizer, _ = in_8_bits((M, N), residual_bits=0)
    other, _ = in_8_bits((M, N))
    with pytest.raises(ValueError, match=r"residual_bits=0.*residual_bits=8"):
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))


@pytest.fixture(params=["known to the host", "known to the device"])
def _who_knows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "known to the device":
        monkeypatch.setattr("hf_galore.lowrank.nonfinite._look", lambda norm: None)
        monkeypatch.setattr("hf_galore.lowrank.nonfinite.host_knows", lambda tensor: False)


@pytest.mark.usefixtures("_who_knows")
@pytest.mark.parametrize("shape", [(M, N), (2, M, N)], ids=["matrix", "stack"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_skipped_update_leaves_its_codes(shape: tuple[int, ...], kind: str) -> None:
    """To the bit: a largest number that is negative is none of the table's, and put back it would fade."""
    dtype, rounds = KINDS[kind]
    seeds = {"stochastic_rounding": rounds, "rounding_seed": 1} if rounds else {}
    optimizer, weight = in_8_bits(shape, dtype, **seeds)
    for step, gradient in enumerate(gradients(shape, 10, dtype)):
        if step in (3, 8):  # with a gap of 8 the ninth update refreshes
            assert_a_bad_gradient_changes_nothing(optimizer, weight, gradient)
            optimizer.skipped_updates()
        weight.grad = gradient
        optimizer.step()
        assert weight.detach().isfinite().all()


# ---- what is refused


def test_without_bitsandbytes_it_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise ImportError("No module named 'bitsandbytes'")

    monkeypatch.setattr("hf_galore.integrations.bitsandbytes.functional", missing)
    weight = nn.Parameter(torch.ones(M, N))
    with pytest.raises(ImportError, match=r"residual_bits=8 needs bitsandbytes: pip install bitsandbytes\. res"):
        made(weight, OPTION)
    made(weight, OPTION, residual_bits=0)


def test_a_residual_of_another_kind_has_none() -> None:
    weight = nn.Parameter(torch.ones(M, N))
    for option in ("fira", "sign"):
        with pytest.raises(ValueError, match=f"residual_bits=8 keeps a momentum .* residual={option} has none"):
            made(weight, option, residual_bits=8)


def test_bits_that_are_changed_between_steps_are_refused() -> None:
    optimizer, weight = in_8_bits((M, N), residual_bits=0)
    assert OPTIONS["muon"]["residual"] == "muon"
    weight.grad = torch.ones(M, N, dtype=torch.float64)
    optimizer.step()
    optimizer.param_groups[0]["residual_bits"] = 8
    with pytest.raises(ValueError, match=r"other options of its group \(residual_momentum, residual_momentum_absmax\)"):
        optimizer.step()
