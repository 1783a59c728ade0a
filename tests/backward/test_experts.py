"""The projected backward of experts: whichever way a module computes them, and what is not computed any more."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from hf_galore import GaLoreAdamW
from hf_galore.backward.gradient import LowRankGradient
from hf_galore.backward.hooks import BackwardHooks
from hf_galore.optim.optimizer import GaLoreOptimizer
from tests.support.helpers import assert_identical

COUNT, WIDTH, INNER, TOKENS, RANK = 6, 24, 40, 50, 4

needs_kernel = pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="torch.nn.functional.grouped_mm is of 2.10")


class Experts(nn.Module):
    """Two stacks, used one way or another; `down` lies the other way round."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.up = nn.Parameter(torch.randn(COUNT, INNER, WIDTH, generator=generator, dtype=dtype) / 5)
        self.down = nn.Parameter(torch.randn(COUNT, INNER, WIDTH, generator=generator, dtype=dtype) / 5)
        self.bias = nn.Parameter(torch.zeros(COUNT, INNER, dtype=dtype))

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        raise NotImplementedError


class Loop(Experts):
    """One expert after the other."""

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        """The output for rows that are sorted by expert."""
        found = []
        for index, rows in enumerate(x.split(counts.tolist())):
            if len(rows):
                inner = torch.tanh(F.linear(rows, self.up[index], self.bias[index]))
                found.append(inner @ self.down[torch.tensor(index)])
        return torch.cat(found)


class Transposed(Experts):
    """The same by other operations."""

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        """The output for rows that are sorted by expert."""
        found = []
        for index, rows in enumerate(x.split(counts.tolist())):
            if len(rows):
                inner = torch.tanh(torch.matmul(rows, self.up[index - COUNT].T) + self.bias[index])
                found.append(F.linear(inner, self.down[index].transpose(0, 1)))
        return torch.cat(found)


class Grouped(Experts):
    """All experts in one operation."""

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        """The output for rows that are sorted by expert."""
        ends = counts.cumsum(0).to(torch.int32)
        bias = self.bias.repeat_interleave(counts, dim=0)
        inner = torch.tanh(F.grouped_mm(x, self.up.transpose(-2, -1), offs=ends) + bias)
        return F.grouped_mm(inner, self.down, offs=ends)


class Batched(Experts):
    """As many rows for each expert."""

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        """The output for rows that are sorted by expert."""
        x = x.view(COUNT, -1, WIDTH)
        inner = torch.tanh(torch.bmm(x, self.up.mT) + self.bias.unsqueeze(1))
        return torch.matmul(inner, self.down).view(-1, WIDTH)


class Gathered(Experts):
    """A weight for each row: autograd's to differentiate."""

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        """The output for rows that are sorted by expert."""
        index = torch.arange(COUNT).repeat_interleave(counts)
        inner = torch.tanh(torch.einsum("ti,toi->to", x, self.up[index]) + self.bias[index])
        return torch.einsum("to,toi->ti", inner, self.down[index])


WAYS: list[Any] = [Loop, Transposed, pytest.param(Grouped, marks=needs_kernel), Batched, Gathered]
SERVED = WAYS[:-1]


def dtype_of(cls: type[Experts]) -> torch.dtype:
    return torch.float32 if cls is Grouped else torch.float64  # what torch's kernel is made for


def batch(cls: type[Experts], step: int = 0) -> tuple[Tensor, Tensor]:
    """Rows sorted by expert, and how many each has: one has none, one fewer than the rank."""
    counts = torch.tensor([12, 0, 9, 15, 2, 10]) if step % 2 == 0 else torch.tensor([12, 3, 9, 14, 0, 10])
    if cls is Batched:
        counts = torch.full((COUNT,), 8)
    generator = torch.Generator().manual_seed(10 + step)
    x = torch.randn(int(counts.sum()), WIDTH, generator=generator, dtype=torch.float64)
    return x.to(dtype_of(cls)), counts


def made(cls: type[Experts], **how: Any) -> tuple[Experts, GaLoreOptimizer]:
    model = cls(dtype_of(cls))
    options = {"rank": RANK, "update_proj_gap": 2, "scale": 0.5, "proj_bits": 16}
    projected: dict[Tensor, dict[str, Any]] = {model.up: options, model.down: options}
    return model, GaLoreAdamW(model.parameters(), lr=1e-2, eps=1e-4, param_options=projected, module=model, **how)


def trained(
    cls: type[Experts], run: Callable[..., Tensor] = lambda model, *batch: model(*batch), **how: Any
) -> tuple[Experts, GaLoreOptimizer]:
    """A model after some steps."""
    model, optimizer = made(cls, **how)
    for step in range(6):
        x, counts = batch(cls, step)
        run(model, x.requires_grad_(), counts).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


MODES: list[dict[str, Any]] = [
    {"layerwise": True},
    {"layerwise": True, "hold_gradients": True},
    {"projected_backward": True},
    {"layerwise": True, "projected_backward": False},
]


@pytest.mark.parametrize("cls", WAYS)
@pytest.mark.parametrize("how", MODES, ids=str)
def test_experts_train_as_by_whole_gradients(cls: type[Experts], how: dict[str, Any]) -> None:
    (plain, _), (found, _) = trained(cls), trained(cls, **how)
    for name, param in found.named_parameters():
        # What differs is the order of sums: by 1e-16 of float64 numbers; of float32 ones Adam's ε keeps it small.
        rtol, atol = (1e-9, 1e-11) if dtype_of(cls) == torch.float64 else (1e-4, 2e-5)
        torch.testing.assert_close(param, plain.get_parameter(name), rtol=rtol, atol=atol)


def test_all_ways_are_the_same_model() -> None:
    expected, _ = trained(Loop)
    for cls in (Transposed, Gathered):
        found, _ = trained(cls, layerwise=True)
        torch.testing.assert_close(found.up, expected.up, rtol=1e-9, atol=1e-11)


class Shapes(TorchDispatchMode):
    """How many floating-point tensors of the size of a stack operations have made, besides a model's own."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.count: int = 0
        self._own = {param.data_ptr() for param in model.parameters()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for one in made if isinstance(made, (list, tuple)) else (made,):
            if not isinstance(one, Tensor) or isinstance(one, LowRankGradient) or not one.is_floating_point():
                continue
            storage = one.untyped_storage()
            is_large = storage.nbytes() >= COUNT * INNER * WIDTH * one.element_size()
            self.count += int(is_large and storage.data_ptr() not in self._own)
        return made


@pytest.mark.parametrize("cls", SERVED)
def test_no_gradient_of_a_stack_is_built(cls: type[Experts]) -> None:
    def count_of(how: dict[str, Any]) -> int:
        model, optimizer = made(cls, **how)
        for step in (0, 1):  # by then all have had a refresh
            model(*batch(cls, step)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        optimizer.param_groups[0]["update_proj_gap"] = optimizer.param_groups[-1]["update_proj_gap"] = 1000
        loss = model(*batch(cls, 0)).square().sum()
        with Shapes(model) as shapes:
            loss.backward()
        kinds = {type(model.up.grad), type(model.down.grad)}
        assert (LowRankGradient in kinds) == bool(how)
        return int(shapes.count)

    assert count_of({}) > 0
    assert count_of({"projected_backward": True}) == 0


@pytest.mark.parametrize("cls", WAYS)
def test_gradients_that_somebody_asks_for_are_whole(cls: type[Experts]) -> None:
    model, _ = made(cls, projected_backward=True)
    x, counts = batch(cls)
    x.requires_grad_()
    plain = cls(dtype_of(cls))

    def asked(experts: Experts) -> list[Tensor]:
        found = torch.autograd.grad(experts(x, counts).square().sum(), [experts.up, experts.down, experts.bias, x])
        again = torch.autograd.grad(experts(x, counts).square().sum(), [x])
        return [*found, *again]

    for found, expected in zip(asked(model), asked(plain), strict=True):
        torch.testing.assert_close(found, expected)
    if cls is not Grouped:  # torch has no second derivative of its kernel
        for experts in (model, plain):
            (first,) = torch.autograd.grad(experts(x, counts).square().sum(), [experts.up], create_graph=True)
            first.square().sum().backward()
        torch.testing.assert_close(model.bias.grad, plain.bias.grad)


@pytest.mark.parametrize("cls", SERVED)
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_experts(cls: type[Experts], reentrant: bool) -> None:
    def run(model: Experts, x: Tensor, counts: Tensor) -> Any:
        return checkpoint(model, x, counts, use_reentrant=reentrant)

    (plain, _), (found, _) = trained(cls, layerwise=True), trained(cls, run, layerwise=True)
    torch.testing.assert_close(found.up, plain.up)
    torch.testing.assert_close(found.down, plain.down)


class Other(Loop):
    """One that uses a weight in another way too."""

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        """The output, of which a part is no product."""
        return super().forward(x, counts) + self.up[2].sum() + self.down.mean()


class Sums(Loop):
    """One that adds up all of a weight, the gradient of which is one number in memory."""

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        """The output, of which a part is no product; one weight is in no product at all."""
        return super().forward(x, counts) + self.up[1].sum() + self.up[2].sum()


class Indexed(Loop):
    """One that looks weights up by arrays."""

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        """The output of two weights together."""
        both = self.up[np.array([0, 2])].sum(dim=0) + self.up[range(2)].sum(dim=0)
        return F.linear(torch.tanh(F.linear(x, both)), self.down[np.int64(1)].T)


class Checkpointed(Loop):
    """One that computes each expert anew in the backward pass, in the newer way."""

    reentrant = False

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        """The output for rows that are sorted by expert."""

        def one(rows: Tensor, index: int) -> Tensor:
            return torch.tanh(F.linear(rows, self.up[index])) @ self.down[index]

        parts = enumerate(x.split(counts.tolist()))
        return torch.cat(
            [cast("Tensor", checkpoint(one, rows, index, use_reentrant=self.reentrant)) for index, rows in parts]
        )


class CheckpointedReentrantly(Checkpointed):
    """One that does so in the older way: each expert's gradient comes in a backward pass of its own."""

    reentrant = True


@pytest.mark.parametrize("cls", [Other, Sums, Indexed, Checkpointed, CheckpointedReentrantly])
def test_other_uses_of_a_weight_count(cls: type[Experts]) -> None:
    (plain, _), (found, _) = trained(cls), trained(cls, layerwise=True, hold_gradients=True)
    torch.testing.assert_close(found.up, plain.up, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(found.down, plain.down, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("cls", SERVED)
def test_it_is_said_where_gradients_are_built(cls: type[Experts], caplog: pytest.LogCaptureFixture) -> None:
    for other, is_said in ((cls, False), (Gathered, True)):
        caplog.clear()
        trained(other, projected_backward=True)
        said = [
            record.getMessage() for record in caplog.records if "in no product that is recognised" in record.message
        ]
        assert len(said) == is_said


@pytest.mark.parametrize("cls", SERVED)
def test_two_passes_before_a_step_add_up(cls: type[Experts]) -> None:
    def run(**how: Any) -> Experts:
        model, optimizer = made(cls, **how)
        for step in range(4):
            for part in (0, 2):
                (model(*batch(cls, step + part)).square().sum() / 2).backward()
            optimizer.step()
            optimizer.zero_grad()
        return model

    # The basis is that of the first pass in a window, so that plain accumulation is another run: held ≡ held.
    expected, found = run(layerwise=True, hold_gradients=True, projected_backward=False), run(projected_backward=True)
    torch.testing.assert_close(found.up, expected.up, rtol=1e-4, atol=2e-5)


def test_the_module_is_its_own_again() -> None:
    model, optimizer = made(Loop, layerwise=True)
    assert isinstance(model, Loop)
    assert type(model) is not Loop
    assert inspect.signature(model.forward) == inspect.signature(Loop().forward)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.copy(model)):
        assert type(other) is Loop
        assert_identical(other.state_dict(), model.state_dict())
    optimizer.close()
    assert type(model) is Loop
    assert "_galore_sink" not in model.__dict__


@pytest.mark.parametrize("cls", [Loop, Batched])
def test_autocast_reaches_experts(cls: type[Experts], monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[Tensor] = []
    serve = BackwardHooks.gradient_of_stack

    def noted(hooks: BackwardHooks, weight: Tensor, factors: Any) -> Tensor | None:
        served.append(weight)
        return serve(hooks, weight, factors)

    monkeypatch.setattr(BackwardHooks, "gradient_of_stack", noted)

    def run(**how: Any) -> Experts:
        torch.manual_seed(0)
        model = cls(torch.float32)
        projected: dict[Tensor, dict[str, Any]] = {model.up: {"rank": RANK, "proj_bits": 16}}
        optimizer = GaLoreAdamW(model.parameters(), lr=1e-2, eps=1e-2, param_options=projected, module=model, **how)
        for step in range(3):
            x, counts = batch(cls, step)
            with torch.autocast("cpu", torch.bfloat16):
                output = model(x.float(), counts)
                assert output.dtype == torch.bfloat16
            output.float().square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return model

    # G is rounded to bfloat16 before it is projected, R after.
    torch.testing.assert_close(run(layerwise=True).up, run().up, rtol=0, atol=3e-3)
    assert len(served) == 6  # of each step both stacks
