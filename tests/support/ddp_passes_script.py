"""Run by test_ddp.py under torchrun: what backward passes may bring in some processes and not in others.

After each of these all processes have the same weights, to the bit.
"""

from __future__ import annotations

import contextlib
import copy
import io
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from hf_galore.backward.shared_refresh import SharedRefresh
from hf_galore.integrations import ddp
from hf_galore.lowrank import refresh
from hf_galore.lowrank.projection import Bases
from hf_galore.optim.classes import GaLoreAdamW
from hf_galore.optim.target import Target

WAYS: tuple[dict[str, Any], ...] = (
    {"layerwise": True},
    {"projected_backward": True},
    {"layerwise": True, "projected_backward": False},
    {"exchange": "low_rank"},
)


TIMEOUT = timedelta(seconds=120)


class Branches(nn.Module):
    """Two branches that a forward pass takes or not, and one that none takes."""

    def __init__(self, *, idle: bool) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 8)
        self.branches = nn.ModuleList(nn.Linear(16, 16) for _ in range(2 + idle))

    @property
    def idle(self) -> Tensor:
        layer = self.branches[2]
        assert isinstance(layer, nn.Linear)
        return layer.weight

    def forward(self, x: Tensor, taken: int) -> Tensor:
        x = self.first(x)
        out: Tensor = self.last(x + self.branches[taken](x).tanh())
        return out


class Checkpointed(nn.Module):
    """A layer that two checkpoints use."""

    def __init__(self, *, reentrant: bool) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 8)
        self.inner = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in (self.inner[0], self.inner[1], self.inner[0]):
            x = checkpoint(lambda y, layer=layer: torch.tanh(layer(y)), x, use_reentrant=self.reentrant)
        out: Tensor = self.last(x)
        return out


def plain(*, bias: bool = True) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16, bias=bias), nn.Tanh(), nn.Linear(16, 8, bias=bias))


def optimizer_for(model: nn.Module, way: dict[str, Any]) -> GaLoreAdamW:
    group = {"rank": 3, "proj_bits": 16, "update_proj_gap": 3}
    targets = {module.weight: group for module in model.modules() if isinstance(module, nn.Linear)}
    return GaLoreAdamW(model.parameters(), lr=1e-2, eps=1e-4, module=model, param_options=targets, **way)


def batch(step: int) -> Tensor:
    seed = 100 * step + distributed.get_rank()
    return torch.randn(6, 8, generator=torch.Generator().manual_seed(seed))


def take_steps(optimizer: torch.optim.Optimizer, loss: Callable[[int], Tensor], steps: int) -> None:
    for step in range(steps):
        loss(step).backward()
        optimizer.step()
        optimizer.zero_grad()


def flat(model: nn.Module) -> Tensor:
    return torch.cat([param.detach().flatten() for param in model.parameters()])


def assert_same_everywhere(model: nn.Module, before: Tensor) -> None:
    """The weights are the same in all processes, finite, and have moved."""
    weights = flat(model)
    of_all = [torch.empty_like(weights) for _ in range(distributed.get_world_size())]
    distributed.all_gather(of_all, weights)
    assert all(torch.equal(weights, other) for other in of_all)
    assert weights.isfinite().all()
    assert not torch.equal(weights, before)


def unused(way: dict[str, Any]) -> None:
    rank = distributed.get_rank()

    def changing(step: int) -> int:
        return rank % 2 if step % 2 else step // 2 % 2

    def constant(step: int) -> int:
        return rank

    kinds: list[tuple[dict[str, Any], Callable[[int], int]]] = [
        ({"find_unused_parameters": True}, changing),
        ({"static_graph": True}, constant),
    ]
    for options, taken in kinds:
        torch.manual_seed(0)
        model = Branches(idle=True)
        idle, before = model.idle.detach().clone(), flat(model)
        optimizer = optimizer_for(model, way)
        wrapped = DistributedDataParallel(model, **options)

        def loss(step: int, wrapped: nn.Module = wrapped, taken: Callable[[int], int] = taken) -> Tensor:
            found: Tensor = wrapped(batch(step), taken(step)).square().mean()
            return found

        take_steps(optimizer, loss, 8)
        assert_same_everywhere(model, before)
        assert torch.equal(idle, model.idle)  # not even decayed, as by AdamW
        optimizer.close()


def refused(way: dict[str, Any]) -> None:
    model = Branches(idle=False)
    optimizer = optimizer_for(model, way)
    wrapped = DistributedDataParallel(model)
    wrapped(batch(0), 0).square().mean().backward()
    with pytest.raises(RuntimeError, match=r"1 target\(s\) had no gradient.*branches.1.weight.*find_unused_parameters"):
        optimizer.step()
    optimizer.close()
    # Where nothing wraps the model its gradients are of one process.
    model_alone = plain()
    before = flat(model_alone)
    optimizer = optimizer_for(model_alone, way)
    model_alone(batch(0)).square().mean().backward()
    with pytest.raises(RuntimeError, match=r"2 processes run.*Wrap the model in it.*projected_backward=False"):
        optimizer.step()
    assert torch.equal(flat(model_alone), before)
    optimizer.close()
    wrapped = DistributedDataParallel(plain())
    optimizer = optimizer_for(wrapped.module, way)
    wrapped.register_comm_hook(None, lambda _, bucket: distributed.all_reduce(bucket.buffer(), async_op=True).future())
    with pytest.raises(ValueError, match="communication hook"):
        wrapped(batch(0))
    optimizer.close()


def nothing_but_targets(way: dict[str, Any]) -> None:
    model = plain(bias=False)
    before, optimizer = flat(model), optimizer_for(model, way)
    wrapped = DistributedDataParallel(model)
    take_steps(optimizer, lambda step: wrapped(batch(step)).square().mean(), 5)
    assert_same_everywhere(model, before)


def not_finite_and_zero(way: dict[str, Any]) -> None:
    rank, model = distributed.get_rank(), plain()
    before, optimizer = flat(model), optimizer_for(model, way)
    wrapped = DistributedDataParallel(model)

    def loss(step: int) -> Tensor:
        found: Tensor = wrapped(batch(step)).square().mean()
        if step in (0, 4, 6) and rank == 1:  # 0 and 6 would have been steps with new bases
            found = found * float("nan")
        nowhere = step in (1, 5) or (step in (2, 8) and rank == 0)
        return found * 0 if nowhere else found

    take_steps(optimizer, loss, 10)
    assert_same_everywhere(model, before)
    assert {found.times for found in optimizer.skipped_updates().values()} == {3}


def clipped_by_torch(way: dict[str, Any]) -> None:
    model = plain()
    before, optimizer = flat(model), optimizer_for(model, {**way, "hold_gradients": True})
    wrapped = DistributedDataParallel(model)
    for step in range(4):
        wrapped(batch(step)).square().mean().backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        least = norm.clone()
        distributed.all_reduce(least, distributed.ReduceOp.MIN)
        assert norm == least > 0.01
        optimizer.step()
        optimizer.zero_grad()
    assert_same_everywhere(model, before)


def checkpoints(way: dict[str, Any]) -> None:
    ends = []
    for reentrant in (True, False):
        torch.manual_seed(0)
        model = Checkpointed(reentrant=reentrant)
        before, optimizer = flat(model), optimizer_for(model, way)
        wrapped = DistributedDataParallel(model, static_graph=reentrant)

        def loss(step: int, wrapped: nn.Module = wrapped) -> Tensor:
            found: Tensor = wrapped(batch(step)).square().mean()
            return found

        take_steps(optimizer, loss, 7)
        assert_same_everywhere(model, before)
        ends.append(flat(model))
        optimizer.close()
    assert (ends[0] - ends[1]).abs().max() < 1e-6  # R of three uses is summed in another order


def several_wrappers(way: dict[str, Any]) -> None:
    first, second = plain(), plain()
    both = nn.ModuleList([first, second])
    before, optimizer = flat(both), optimizer_for(both, way)
    a, b = DistributedDataParallel(first), DistributedDataParallel(second)
    take_steps(optimizer, lambda step: b(a(batch(step))).square().mean(), 5)
    assert_same_everywhere(both, before)
    # Without hooks the wrappers reduce what they left alone.
    optimizer.close()
    before = flat(both)
    take_steps(optimizer, lambda step: b(a(batch(step + 5))).square().mean(), 3)
    assert_same_everywhere(both, before)
    assert not hasattr(first, "_ddp_params_and_buffers_to_ignore")


def passes_that_are_not_reduced(way: dict[str, Any]) -> None:
    model = plain()
    before, optimizer = flat(model), optimizer_for(model, way)
    wrapped = DistributedDataParallel(model)
    for step in range(6):
        with wrapped.no_sync():
            wrapped(batch(step)).square().mean().backward()
        if distributed.get_rank() == 0:
            with torch.no_grad():  # an evaluation in one of them
                wrapped(batch(step))
        wrapped(batch(step + 50)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert_same_everywhere(model, before)


def zeroed_at_other_times(way: dict[str, Any]) -> None:
    ends = []
    for dropped in (False, True):
        model = plain()
        before, optimizer = flat(model), optimizer_for(model, way)
        wrapped = DistributedDataParallel(model)
        for step in range(6):
            if dropped:
                with wrapped.no_sync():
                    wrapped(batch(step + 50)).square().mean().backward()
            loss = wrapped(batch(step)).square().mean()
            optimizer.zero_grad()  # as Lightning's loop has it
            loss.backward()
            optimizer.step()
        assert_same_everywhere(model, before)
        ends.append(flat(model))
        optimizer.close()
    # A refresh that is taken back is not there: the bases of both come from the same gradients.
    assert torch.equal(*ends)


class Optional(nn.Module):
    """Targets in a branch that a forward pass takes or not, beside something that all take."""

    def __init__(self) -> None:
        super().__init__()
        self.shift, self.branch = nn.Parameter(torch.zeros(8)), plain()

    def forward(self, x: Tensor, taken: bool) -> Tensor:
        x = x + self.shift
        return x + self.branch(x) if taken else x


def nothing_for_targets(way: dict[str, Any]) -> None:
    model = Optional()
    before, optimizer = flat(model), optimizer_for(model, way)
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    for step in range(8):
        for micro in range(2):
            with wrapped.no_sync() if micro == 0 else contextlib.nullcontext():
                taken = (step + step // 2 * micro + distributed.get_rank()) % 2 == 0
                (wrapped(batch(step), taken) - 1).square().mean().backward()
            distributed.barrier()  # between backward and step
        optimizer.step()
        optimizer.zero_grad()
    assert_same_everywhere(model, before)


def outside_of_the_wrapper(way: dict[str, Any]) -> None:
    ends = []
    for looks in (False, True):
        model = plain()
        before, optimizer = flat(model), optimizer_for(model, way)
        wrapped = DistributedDataParallel(model)
        for step in range(5):
            if looks and distributed.get_rank() == 0:  # at its gradients, in one process
                model(batch(step + 50)).square().mean().backward()
                optimizer.zero_grad()
            wrapped(batch(step)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert_same_everywhere(model, before)
        ends.append(flat(model))
    assert torch.equal(*ends)
    with pytest.raises(RuntimeError, match=r"2 processes run.*of this one only.*call the wrapper"):
        take_steps(optimizer, lambda step: model(batch(step)).square().mean(), 4)
    optimizer.close()


def copies(way: dict[str, Any]) -> None:
    """A wrapper that nobody reduces the targets of, but itself."""
    model = plain()
    optimizer = optimizer_for(model, way)
    wrapped = DistributedDataParallel(model)
    take_steps(optimizer, lambda step: wrapped(batch(step)).square().mean(), 2)
    file = io.BytesIO()
    torch.save(wrapped, file)
    file.seek(0)
    found = [copy.deepcopy(wrapped), torch.load(file, weights_only=False)]
    optimizer.close()
    torch.save(wrapped, io.BytesIO())
    unknown = plain()
    optimizer = optimizer_for(unknown, way)
    found.append(DistributedDataParallel(unknown))
    optimizer.close()
    for other in found:
        before = flat(other)
        adam = torch.optim.AdamW(other.parameters(), lr=1e-2)
        take_steps(adam, lambda step, other=other: other(batch(step)).square().mean(), 3)  # type: ignore[misc]
        assert_same_everywhere(other, before)


def left_out_by_others(way: dict[str, Any]) -> None:
    model = plain()
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ["2.bias"])
    optimizer = optimizer_for(model, way)
    with pytest.raises(ValueError, match=r"leave out 1 parameter\(s\) that are trained: 2.bias"):
        DistributedDataParallel(model)(batch(0))
    optimizer.close()


def wrappers_in_turn(way: dict[str, Any]) -> None:
    ends = []
    for count in (1, 2):
        model = plain()
        before, optimizer = flat(model), optimizer_for(model, way)
        wrapped = [DistributedDataParallel(model) for _ in range(count)]

        def loss(step: int, wrapped: list[DistributedDataParallel] = wrapped) -> Tensor:
            found: Tensor = wrapped[step % len(wrapped)](batch(step)).square().mean()
            return found

        take_steps(optimizer, loss, 5)
        assert_same_everywhere(model, before)
        ends.append(flat(model))
        optimizer.close()
    assert torch.equal(*ends)


def frozen_later(way: dict[str, Any]) -> None:
    model = plain()
    optimizer, frozen = optimizer_for(model, way), model.get_parameter("2.weight")
    wrapped = DistributedDataParallel(model)
    for requires_grad in (True, False, True):
        frozen.requires_grad_(requires_grad)
        before, was = flat(model), frozen.clone()
        take_steps(optimizer, lambda step: wrapped(batch(step)).square().mean(), 3)
        assert_same_everywhere(model, before)
        assert torch.equal(frozen, was) != requires_grad


def compiled_first() -> None:
    model = plain()
    before, optimizer = flat(model), optimizer_for(model, {"layerwise": True})
    wrapped = DistributedDataParallel(torch.compile(model, backend="eager"))
    take_steps(optimizer, lambda step: wrapped(batch(step)).square().mean(), 3)
    assert_same_everywhere(model, before)


def gradients_that_differ() -> None:
    """Without hooks: refreshes are not shared where the gradients of a step are those of one process."""
    alone, model = plain(), plain()
    wrapped = DistributedDataParallel(model)
    own, optimizer = optimizer_for(alone, {}), optimizer_for(model, {})
    take_steps(own, lambda step: alone(batch(step)).square().mean(), 4)
    with wrapped.no_sync():
        take_steps(optimizer, lambda step: wrapped(batch(step)).square().mean(), 4)
    assert torch.equal(flat(alone), flat(model))
    model = plain()
    before, optimizer = flat(model), optimizer_for(model, {})
    wrapped = DistributedDataParallel(model)
    with wrapped.join():
        take_steps(optimizer, lambda step: wrapped(batch(step)).square().mean(), 4 + 4 * distributed.get_rank())
    assert_same_everywhere(model, before)


def processors_that_round_differently(way: dict[str, Any]) -> None:
    """Each basis is computed once: what another process would have made of the gradient does not matter."""
    computed = 0
    own = refresh.new_bases

    def differently(*args: Any, **options: Any) -> Bases:
        nonlocal computed
        computed += 1
        bases = own(*args, **options)
        return Bases(*(None if basis is None else basis * (-1) ** distributed.get_rank() for basis in bases))

    with mock.patch("hf_galore.optim.refreshing.new_bases", differently):
        model = nn.Sequential(plain(), nn.Tanh(), plain(), nn.Tanh(), plain())
        before, optimizer = flat(model), optimizer_for(model, way)
        wrapped = DistributedDataParallel(model)
        take_steps(optimizer, lambda step: wrapped(batch(step)).square().mean(), 7)
    assert_same_everywhere(model, before)
    refreshes = int(optimizer.refresh_figures()["refreshes"])
    assert computed == refreshes / 2 == 6 + 6 / 2  # of 6 targets 6 at first, and 6 in each gap of 3


def as_patient_as_the_wrapper() -> None:
    """What is exchanged beside a wrapper gives up as early: a Trainer's `ddp_timeout` is for both."""
    assert ddp.moved_parts() == []
    group = ddp.group_like(DistributedDataParallel(plain()))
    assert group._get_backend(torch.device("cpu")).options._timeout == TIMEOUT


class Routed(nn.Module):
    """Experts that a pass takes or not."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.experts = nn.Linear(8, 8), nn.Parameter(torch.randn(4, 16, 8) / 4)

    def forward(self, x: Tensor, taken: Sequence[int]) -> Tensor:
        x = self.first(x)
        for index in taken:
            x = x + nn.functional.linear(x, self.experts[index]).tanh() @ self.experts[index]
        return x


def experts_without_tokens(way: dict[str, Any]) -> None:
    """Some have tokens in one process only, one in none until the sixth step: it is not waited for in each step."""

    def loss_of(model: nn.Module, step: int, rank: int) -> Tensor:
        taken = [0, 1 + rank % 2, *([3] if step == 5 and rank == 1 else [])]
        x = torch.randn(6, 8, generator=torch.Generator().manual_seed(100 * step + rank))
        found: Tensor = model(x, taken).square().mean()
        return found

    def optimizer_of(model: Routed, way: dict[str, Any]) -> GaLoreAdamW:
        group = {"rank": 3, "proj_bits": 16, "update_proj_gap": 100}
        options = dict.fromkeys([model.experts, model.first.weight], group)
        return GaLoreAdamW(model.parameters(), lr=1e-2, eps=1e-4, module=model, param_options=options, **way)

    stacks = []
    own = SharedRefresh.__init__

    def counted(refresh: SharedRefresh, target: Target, *args: Any, **options: Any) -> None:
        stacks.append(target.stack)
        own(refresh, target, *args, **options)

    model, alone = Routed(), Routed()
    before, optimizer = flat(model), optimizer_of(model, way)
    wrapped = DistributedDataParallel(model)
    rank, size = distributed.get_rank(), distributed.get_world_size()
    with mock.patch.object(SharedRefresh, "__init__", counted):
        take_steps(optimizer, lambda step: loss_of(wrapped, step, rank), 8)
    assert_same_everywhere(model, before)
    (experts,) = (target for target in optimizer.targets() if target.stack is not None)
    assert experts.state["refreshed_at"].tolist() == [0, 0, 0, 5]
    # Where whole gradients are exchanged in any case, the process that has the refresh looks for itself.
    dense = way == {"layerwise": True, "projected_backward": False}
    assert stacks.count(4) == (6 if dense else 2)
    optimizer.close()
    own_optimizer = optimizer_of(alone, {})
    take_steps(own_optimizer, lambda step: sum(loss_of(alone, step, r) for r in range(size)) / size, 8)  # type: ignore[arg-type, return-value]
    assert (flat(alone) - flat(model)).abs().max() < 2e-6


def main(output: Path) -> None:
    distributed.init_process_group("gloo", timeout=TIMEOUT)
    as_patient_as_the_wrapper()
    processors_that_round_differently({})
    gradients_that_differ()
    experts_without_tokens({})
    compiled_first()
    for way in WAYS:
        for check in (
            unused,
            experts_without_tokens,
            refused,
            nothing_but_targets,
            not_finite_and_zero,
            clipped_by_torch,
            checkpoints,
            several_wrappers,
            passes_that_are_not_reduced,
            zeroed_at_other_times,
            nothing_for_targets,
            outside_of_the_wrapper,
            copies,
            left_out_by_others,
            wrappers_in_turn,
            frozen_later,
            processors_that_round_differently,
        ):
            check(way)
            distributed.barrier()
    (output / f"done-{distributed.get_rank()}").touch()
    distributed.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
