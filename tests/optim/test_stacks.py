"""Stacks of matrices, and parameters of other dimensions as matrices: each is projected as it would be by itself."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_galore import GaLoreAdafactor, GaLoreAdamW, GaLoreAdamW8bit
from hf_galore.optim.optimizer import GaLoreOptimizer
from tests.support.helpers import assert_identical, target_of

COUNT, M, N, RANK, GAP = 5, 24, 40, 6, 3
OPTIONS: dict[str, Any] = {"rank": RANK, "update_proj_gap": GAP, "scale": 0.5, "proj_bits": 16, "stagger": False}
STEPS = 9


def gradients(dtype: torch.dtype, shape: tuple[int, int, int] = (COUNT, M, N)) -> list[Tensor]:
    """Of rank 8, or 1 once; and zero of some matrices at some steps, their refreshes among them."""
    generator = torch.Generator().manual_seed(1)
    count, m, n = shape
    found = []
    for step in range(STEPS):
        left, right = (torch.randn(size, generator=generator) for size in ((count, m, 8), (count, 8, n)))
        gradient = left @ right
        absent = {0: [0, 3], 3: [1], 4: [1], 7: [1]}.get(step, [])
        gradient[[*absent, *([4] if step < 6 else [])]] = 0
        if step == 5:
            gradient[2] = left[2, :, :1] @ right[2, :1]
        found.append(gradient.to(dtype))
    return found


def weights(dtype: torch.dtype, shape: tuple[int, int, int] = (COUNT, M, N)) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(dtype)


def trained(
    make: Any, start: Sequence[Tensor], steps: Sequence[Sequence[Tensor]], options: dict[str, Any]
) -> list[Tensor]:
    """The weights after the steps, one optimizer for each."""
    params = [nn.Parameter(weight.clone()) for weight in start]
    optimizers = [make([{"params": [param], **OPTIONS, **options}], lr=1e-2) for param in params]
    for each in steps:
        for param, gradient, optimizer in zip(params, each, optimizers, strict=True):
            param.grad = gradient.clone()
            optimizer.step()
    return [param.detach() for param in params]


@pytest.mark.parametrize("make", [GaLoreAdamW, GaLoreAdafactor])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"refresh": "svd"},
        {"refresh": "randomized", "lazy_refresh": True},
        {"moments": "rotate"},
        {"moments": "reset"},
        {"moments": "rotate", "proj_bits": 8},
        {"proj_bits": 4, "lazy_refresh": True},
        {"proj_type": "full"},
        {"proj_type": "right", "stagger": True},
        {"rule": "lion"},
        {"rule": "muon", "moments": "rotate"},
        {"rule": "muon", "moments": "reset", "proj_type": "full"},
    ],
    ids=str,
)
def test_a_stack_is_as_many_matrices_each_by_itself(make: Any, options: dict[str, Any]) -> None:
    steps = gradients(torch.float64)
    (found,) = trained(make, [weights(torch.float64)], [[gradient] for gradient in steps], options)
    expected = torch.stack(trained(make, list(weights(torch.float64)), [list(g) for g in steps], options))
    # In float64; rounding is all that can differ: products of a stack may be summed up in another order.
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    assert all((found[i] - weights(torch.float64)[i]).norm() > 1e-3 for i in range(COUNT)), "one has not moved"


@pytest.mark.parametrize("options", [{}, {"moments": "rotate"}, {"moments": "reset"}, {"proj_bits": 4}], ids=str)
def test_moments_in_8_bits_are_those_of_each_matrix(options: dict[str, Any]) -> None:
    shape, options = (COUNT, 64, 128), {**options, "rank": 32}  # 4,096 elements of R each: they are in 8 bits
    steps, start = gradients(torch.float32, shape), weights(torch.float32, shape)
    (found,) = trained(GaLoreAdamW8bit, [start], [[gradient] for gradient in steps], options)
    expected = torch.stack(trained(GaLoreAdamW8bit, list(start), [list(g) for g in steps], options))
    # A code that rounding tips over moves one element of R's direction by a part of it, 2 % of a step.
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-4)


def test_blocks_of_moments_do_not_run_from_one_matrix_into_the_next() -> None:
    weight = nn.Parameter(torch.zeros(2, 65, 130))
    optimizer = GaLoreAdamW8bit([{"params": [weight], "rank": 33}])
    assert optimizer.state[weight]["exp_avg"].dtype == torch.float32  # 33 · 130 is no multiple of 256
    optimizer = GaLoreAdamW8bit([{"params": [weight], "rank": 32, "proj_type": "left"}])
    assert optimizer.state[weight]["exp_avg"].dtype == torch.float32
    other = nn.Parameter(torch.zeros(2, 65, 128))
    optimizer = GaLoreAdamW8bit([{"params": [other], "rank": 32, "proj_type": "left"}])
    assert optimizer.state[other]["exp_avg"].dtype == torch.uint8


def as_one(make: Any, shape: tuple[int, ...], options: dict[str, Any], layout: Any = torch.contiguous_format) -> Tensor:
    """A weight of a shape after some steps, as the shape of a matrix or stack has it."""
    generator = torch.Generator().manual_seed(3)
    weight = nn.Parameter(torch.randn(shape, generator=generator).to(memory_format=layout))
    optimizer = make([{"params": [weight], **OPTIONS, **options}], lr=1e-2)
    for _ in range(5):
        weight.grad = torch.randn(shape, generator=generator).to(memory_format=layout)
        optimizer.step()
    assert weight.is_contiguous(memory_format=layout)
    return weight.detach()


@pytest.mark.parametrize("make", [GaLoreAdamW, GaLoreAdafactor])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_a_convolution_is_projected_as_a_matrix_of_its_outputs(make: Any, decay: float) -> None:
    options = {"weight_decay": decay}
    expected = as_one(make, (16, 36), options)
    for shape, more in (((16, 4, 3, 3), {}), ((16, 12, 3), {"view_as": "flat"}), ((16, 2, 2, 3, 3), {})):
        found = as_one(make, shape, {**options, **more})
        torch.testing.assert_close(found.flatten(1), expected, rtol=0, atol=0)
    found = as_one(make, (16, 4, 3, 3), options, torch.channels_last)
    torch.testing.assert_close(found.flatten(1), expected, rtol=1e-6, atol=1e-6)  # strides change the order of sums


def test_parts_of_a_matrix_are_a_stack() -> None:
    found = as_one(GaLoreAdamW, (48, 20), {"view_as": 3})
    expected = as_one(GaLoreAdamW, (3, 16, 20), {})
    torch.testing.assert_close(found.view(3, 16, 20), expected, rtol=0, atol=0)


def test_bfloat16_stacks_are_rounded_stochastically() -> None:
    start, gradient = torch.ones(3, 16, 16, dtype=torch.bfloat16), torch.randn(3, 16, 16).bfloat16()
    options = {"rank": 4, "stochastic_rounding": True, "rounding_seed": 1, "scale": 1.0}
    means = []
    weight = nn.Parameter(start.clone())
    optimizer = GaLoreAdamW([{"params": [weight], **options}], lr=1e-3, weight_decay=0.0)
    for _ in range(10):
        weight.grad = gradient.clone()
        optimizer.step()
        means.append((weight.detach().float() - 1).abs().mean().item())
    assert means[-1] > 1e-3, "updates of half a unit in the last place were lost"


def test_state_of_a_stack_and_its_counters() -> None:
    weight = nn.Parameter(torch.zeros(COUNT, M, N))
    optimizer = GaLoreAdamW([{"params": [weight], **OPTIONS, "lazy_refresh": True, "proj_bits": 4}])
    state = optimizer.state[weight]
    assert {key: tuple(value.shape) for key, value in state.items()} == {
        "step": (),
        "refreshed_at": (COUNT,),
        "refreshes": (COUNT,),
        "gap_factor": (COUNT,),
        "basis_left": (COUNT, 96),  # 24 · 6 codes in blocks of 64, of which two make a byte
        "basis_left_absmax": (COUNT, 3),
        "exp_avg": (COUNT, RANK, N),
        "exp_avg_sq": (COUNT, RANK, N),
    }
    memory = optimizer.memory()
    assert memory.targets == 1
    assert memory.basis_bytes == COUNT * (96 + 3 * 2)
    assert memory.moment_bytes == 2 * 4 * COUNT * RANK * N


@pytest.mark.parametrize("moments", ["keep", "reset"])
def test_resumed_while_some_have_not_had_their_turn(moments: str) -> None:
    def made() -> tuple[nn.Parameter, GaLoreOptimizer]:
        weight = nn.Parameter(weights(torch.float32))
        return weight, GaLoreAdamW([{"params": [weight], **OPTIONS, "moments": moments}], lr=1e-2)

    steps = gradients(torch.float32)
    weight, optimizer = made()
    saved: dict[str, Any] = {}
    for index, gradient in enumerate(steps):
        weight.grad = gradient
        optimizer.step()
        if index == 4:
            saved = {"weight": weight.detach().clone(), "state": copy.deepcopy(optimizer.state_dict())}
    assert saved["state"]["state"][0]["refreshed_at"].tolist() == [3.0, 0.0, 3.0, 3.0, -1.0]
    other, resumed = made()
    with torch.no_grad():
        other.copy_(saved["weight"])
    resumed.load_state_dict(saved["state"])
    for gradient in steps[5:]:
        other.grad = gradient
        resumed.step()
    assert_identical(other.detach(), weight.detach())
    assert_identical(resumed.state_dict()["state"], optimizer.state_dict()["state"])


def test_some_have_their_turn_after_the_weight_was_cast() -> None:
    weight = nn.Parameter(weights(torch.float32))
    optimizer = GaLoreAdamW([{"params": [weight], **OPTIONS}], lr=1e-2)
    state = optimizer.state[weight]
    for index, gradient in enumerate(gradients(torch.float64)[:6]):
        if index == 5:  # the next refresh is that of one matrix alone
            assert state["refreshed_at"].tolist() == [3, 0, 3, 3, -1]
            weight.data = weight.data.double()
        weight.grad = gradient.to(weight.dtype)
        optimizer.step()
    assert state["refreshed_at"].tolist() == [3, 5, 3, 3, -1]
    basis = state["basis_left"]
    assert basis.dtype == torch.float64
    expected = torch.eye(RANK, dtype=torch.float64).expand(COUNT, RANK, RANK)
    torch.testing.assert_close(basis.mT @ basis, expected, rtol=0, atol=1e-5)
    assert (basis[1].mT @ basis[1] - expected[1]).abs().max() < 1e-12, "made from a float64 gradient"


def test_one_gradient_that_is_not_finite_skips_the_parameter() -> None:
    weight = nn.Parameter(weights(torch.float32))
    optimizer = GaLoreAdamW([{"params": [weight], **OPTIONS}], lr=1e-2)
    for index, gradient in enumerate(gradients(torch.float32)[:5]):
        if index in (0, 2, 3):
            gradient[2, 1, 1] = float("nan")
        before = weight.detach().clone()
        weight.grad = gradient
        optimizer.step()
        assert torch.equal(weight, before) == (index in (0, 2, 3))
    assert target_of(optimizer, weight).state["step"] == 2
    assert [skipped.times for skipped in optimizer.skipped_updates().values()] == [3]


class Stack(nn.Module):
    """A stack that each input uses with weights of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(weights(torch.float64))

    def forward(self, scales: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(4)
        factors = torch.randn(COUNT, M, N, generator=generator, dtype=torch.float64)
        return (self.weight * factors * scales.view(-1, 1, 1)).sum()


def test_nothing_is_lost_of_a_matrix_whose_first_gradient_comes_later_in_a_window() -> None:
    model = Stack()
    options: dict[Tensor, dict[str, Any]] = {model.weight: {**OPTIONS, "update_proj_gap": 100}}
    optimizer = GaLoreAdamW(model.parameters(), lr=1e-2, param_options=options, module=model, layerwise=True,
                            hold_gradients=True)  # fmt: skip
    start = model.weight.detach().clone()
    first, second = torch.ones(COUNT, dtype=torch.float64), torch.zeros(COUNT, dtype=torch.float64)
    first[1] = 0
    second[1] = 1
    model(first).backward()
    model(second).backward()
    optimizer.step()
    moved = (model.weight.detach() - start).flatten(1).norm(dim=1)
    assert (moved > 0).all()
    assert target_of(optimizer, model.weight).state["refreshed_at"].tolist() == [0, -1, 0, 0, 0]
    optimizer.zero_grad()
    model(second).backward()  # its own turn, at last; the others' is not yet
    optimizer.step()
    assert target_of(optimizer, model.weight).state["refreshed_at"].tolist() == [0, 1, 0, 0, 0]


def test_a_dropped_pass_takes_back_the_refresh_of_some() -> None:
    model = Stack()
    options: dict[Tensor, dict[str, Any]] = {model.weight: {**OPTIONS, "update_proj_gap": 100}}
    optimizer = GaLoreAdamW(model.parameters(), lr=1e-2, param_options=options, module=model, layerwise=True,
                            hold_gradients=True)  # fmt: skip
    some, others = torch.tensor([1.0, 1, 0, 1, 0]).double(), torch.tensor([0.0, 1, 1, 0, 0]).double()
    model(some).backward()
    optimizer.step()
    optimizer.zero_grad()
    before = copy.deepcopy(optimizer.state_dict()["state"])
    model(others).backward()
    assert target_of(optimizer, model.weight).state["refreshed_at"].tolist() == [0, 0, 1, 0, -1]
    optimizer.zero_grad()
    assert_identical(optimizer.state_dict()["state"], before)


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((8, 6, 4), {"view_as": 2}, "has no rows that can be"),
        ((9, 6), {"view_as": 2}, "Give a number that divides them"),
        ((8, 6), {"view_as": "rows"}, "'stack', 'flat' or a number"),
        ((8, 6, 4, 2), {"view_as": "stack"}, "which has 3 dimensions"),
        ((8,), {}, "fewer than 2 dimensions"),
    ],
)
def test_what_a_parameter_cannot_be_viewed_as(shape: tuple[int, ...], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GaLoreAdamW([{"params": [nn.Parameter(torch.zeros(shape))], "rank": 2, **options}])


def test_a_view_without_a_rank_is_refused() -> None:
    with pytest.raises(ValueError, match="view_as, which says how parameters are projected, but no rank"):
        GaLoreAdamW([{"params": [nn.Parameter(torch.zeros(8, 6))], "view_as": 2}])
    with pytest.raises(ValueError, match="Did you mean 'view_as'"):
        GaLoreAdamW([{"params": [nn.Parameter(torch.zeros(8, 6))], "rank": 2, "viewas": 2}])
