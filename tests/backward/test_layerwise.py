"""Layerwise updates and the projected backward: all ways to the same weights, and what they leave behind."""

from __future__ import annotations

import copy
import gc
import io
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from accelerate.state import GradientState
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from hf_galore import GaLoreAdafactor, GaLoreAdamW, GaLoreAdamW8bit
from hf_galore.backward.gradient import StandIn
from hf_galore.backward.linear import ProjectedLinear
from hf_galore.lowrank.projection import project
from hf_galore.optim.optimizer import GaLoreOptimizer
from hf_galore.optim.target import Target
from tests.support.helpers import target_of

CLASSES = [GaLoreAdamW, GaLoreAdamW8bit, GaLoreAdafactor]
RANK, GAP, TOKENS = 3, 4, 10
WIDE, NARROW, INPUTS = 12, 8, 6

# How a run gets its gradients; the first is what the others have to equal.
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "plain, projected backward": {"projected_backward": True},
    "layerwise by hooks": {"layerwise": True, "projected_backward": False},
    "layerwise, projected backward": {"layerwise": True},
    "layerwise by hooks, held": {"layerwise": True, "projected_backward": False, "hold_gradients": True},
    "layerwise, projected backward, held": {"layerwise": True, "hold_gradients": True},
}
HOOKED = [way for way in WAYS if way != "plain"]


@pytest.fixture(autouse=True)
def _closed_windows() -> Iterator[None]:
    """accelerate's window is a process-wide singleton: leave it as a Trainer without accumulation would."""
    GradientState()._set_sync_gradients(True)
    yield
    GradientState()._set_sync_gradients(True)


class Net(nn.Module):
    """Linear layers of both orientations, biases and a norm; subclasses change what `forward` does with them."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(INPUTS, WIDE)  # its input needs no gradient
        self.norm = nn.LayerNorm(WIDE)
        self.down = nn.Linear(WIDE, NARROW, bias=False)
        self.up = nn.Linear(NARROW, WIDE)
        self.square = nn.Linear(WIDE, WIDE)

    def block(self, x: Tensor) -> Tensor:
        return self.up(torch.tanh(self.down(self.norm(x))))  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.enter(x))
        return self.square(x + self.block(x))  # type: ignore[no-any-return]


class CalledTwice(Net):
    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.enter(x))
        return self.square(self.square(x + self.block(x)))  # type: ignore[no-any-return]


class SharedWeight(Net):
    def __init__(self) -> None:
        super().__init__()
        self.twin = nn.Linear(WIDE, WIDE, bias=False)
        self.twin.weight = self.square.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.twin(super().forward(x))  # type: ignore[no-any-return]


class FunctionalUse(Net):
    """A weight that is also used without calling its module, as a fused loss uses an output head's."""

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return x @ self.down.weight.mT @ self.down.weight


class Checkpointed(Net):
    reentrant = False

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.enter(x))
        for _ in range(2):  # the block is shared by two segments
            x = x + checkpoint(self.block, x, use_reentrant=self.reentrant)
        return checkpoint(self.square, x, use_reentrant=self.reentrant)  # type: ignore[no-any-return]


class CheckpointedReentrant(Checkpointed):
    reentrant = True


def options_of(net: nn.Module, **more: Any) -> dict[Tensor, dict[str, Any]]:
    # Bases unquantised: a code that rounding tips over is a difference of its own size.
    group = {"rank": RANK, "update_proj_gap": GAP, "scale": 0.5, "proj_bits": 16, **more}
    return {module.weight: group for module in net.modules() if isinstance(module, (nn.Linear, Conv1D))}


def make(
    net: nn.Module, way: str, cls: type[Any] = GaLoreAdamW, *, group: dict[str, Any] | None = None, **options: Any
) -> GaLoreOptimizer:
    optimizer = cls(
        net.parameters(),
        lr=1e-2,
        weight_decay=0.1,
        param_options=options_of(net, **(group or {})),
        module=net,
        **WAYS[way],
        **options,
    )
    assert isinstance(optimizer, GaLoreOptimizer)
    return optimizer


def batches(steps: int, rows: int = TOKENS) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(rows, INPUTS, generator=generator) for _ in range(steps)]


def loss_of(net: nn.Module, batch: Tensor) -> Tensor:
    loss: Tensor = (net(batch) - 1).square().mean()
    return loss


def ordinary_step(net: nn.Module, optimizer: GaLoreOptimizer, batch: Tensor) -> None:
    loss_of(net, batch).backward()
    optimizer.step()
    optimizer.zero_grad()


Step = Callable[[nn.Module, GaLoreOptimizer, Tensor], None]


def run(
    kind: type[Net],
    way: str,
    *,
    cls: type[Any] = GaLoreAdamW,
    steps: int = 9,
    step: Step = ordinary_step,
    group: dict[str, Any] | None = None,
    **options: Any,
) -> nn.Module:
    torch.manual_seed(0)
    net = kind()
    optimizer = make(net, way, cls, group=group, **options)
    for batch in batches(steps):
        step(net, optimizer, batch)
    optimizer.close()
    return net


def assert_same_weights(net: nn.Module, other: nn.Module, tolerance: float = 1e-5) -> None:
    theirs = dict(other.named_parameters())
    for name, param in net.named_parameters():
        difference = (param - theirs[name]).abs().max().item()
        assert difference <= tolerance, f"{name} differs by {difference}"


# ---- the same weights by every way


@pytest.mark.parametrize("way", HOOKED)
@pytest.mark.parametrize("cls", CLASSES)
def test_every_way_gives_the_weights_of_the_plain_optimizer(way: str, cls: type[Any]) -> None:
    """30 steps with 8 refreshes."""
    assert_same_weights(run(Net, way, cls=cls, steps=30), run(Net, "plain", cls=cls, steps=30))


@pytest.mark.parametrize("way", HOOKED)
@pytest.mark.parametrize("proj_type", ["reverse_std", "left", "right", "full"])
def test_every_side(way: str, proj_type: str) -> None:
    # ε as for the reference in test_optimizers: with both sides projected, Adam magnifies rounding.
    group = {"proj_type": proj_type, "eps": 1e-3}
    assert_same_weights(run(Net, way, group=group), run(Net, "plain", group=group))


@pytest.mark.parametrize("way", HOOKED)
@pytest.mark.parametrize("kind", [CalledTwice, SharedWeight, FunctionalUse, Checkpointed, CheckpointedReentrant])
def test_every_way_of_using_a_layer(way: str, kind: type[Net]) -> None:
    # ε as above: what a weight gets by two ways is summed up in another order.
    group = {"eps": 1e-3} if kind is FunctionalUse else {}
    assert_same_weights(run(kind, way, group=group), run(kind, "plain", group=group))


@pytest.mark.parametrize("kind", [Checkpointed, CheckpointedReentrant])
def test_checkpointing_changes_nothing(kind: type[Net]) -> None:
    """The incumbent takes one optimizer step a use under use_reentrant=True."""

    class NotCheckpointed(Net):
        def forward(self, x: Tensor) -> Tensor:
            x = torch.tanh(self.enter(x))
            for _ in range(2):
                x = x + self.block(x)
            return self.square(x)  # type: ignore[no-any-return]

    assert_same_weights(run(kind, "layerwise, projected backward"), run(NotCheckpointed, "plain"))


@pytest.mark.parametrize("way", HOOKED)
def test_an_empty_batch(way: str) -> None:
    def sometimes_empty(net: nn.Module, optimizer: GaLoreOptimizer, batch: Tensor) -> None:
        loss = net(batch).square().sum()
        (loss + net(batch[:0]).sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
        net(batch[:0]).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    assert_same_weights(run(Net, way, step=sometimes_empty), run(Net, "plain", step=sometimes_empty))


@pytest.mark.parametrize("way", HOOKED)
def test_evaluation_between_steps_changes_nothing(way: str) -> None:
    def evaluating(net: nn.Module, optimizer: GaLoreOptimizer, batch: Tensor) -> None:
        net.eval()
        with torch.no_grad():
            net(batch)
        net.train()
        ordinary_step(net, optimizer, batch)
        with torch.inference_mode():
            net(batch)

    assert_same_weights(run(Net, way, step=evaluating), run(Net, "plain"), tolerance=1e-5)


@pytest.mark.parametrize("way", HOOKED)
def test_zero_grad_between_forward_and_backward(way: str) -> None:
    def zeroing_late(net: nn.Module, optimizer: GaLoreOptimizer, batch: Tensor) -> None:
        loss = loss_of(net, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    assert_same_weights(run(CalledTwice, way, step=zeroing_late), run(CalledTwice, "plain"))


@pytest.mark.parametrize("way", HOOKED)
def test_autocast(way: str) -> None:
    def under_autocast(net: nn.Module, optimizer: GaLoreOptimizer, batch: Tensor) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(net, batch)
            loss.backward()  # inside too: the update must not run in bfloat16
        optimizer.step()
        optimizer.zero_grad()

    start = run(Net, "plain", steps=0)
    plain = run(Net, "plain", step=under_autocast)
    other = run(Net, way, step=under_autocast)
    # Both round to bfloat16 (2 to 3 digits), one of them the gradient and the other the low-rank gradient.
    moved = sum((p - s).square().sum() for p, s in zip(plain.parameters(), start.parameters(), strict=True))
    apart = sum((p - o).square().sum() for p, o in zip(plain.parameters(), other.parameters(), strict=True))
    assert apart / moved < 0.01**2
    assert all(param.dtype == torch.float32 for param in other.parameters())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_model_that_is_cast_before_training(way: str, dtype: torch.dtype) -> None:
    def cast(net: nn.Module, make_first: bool) -> nn.Module:
        optimizer = make(net, way) if make_first else None
        net.to(dtype)
        optimizer = optimizer or make(net, way)
        for batch in batches(5):
            ordinary_step(net, optimizer, batch.to(dtype))
        return net

    torch.manual_seed(0)
    net = Net()
    made_first, made_after = cast(copy.deepcopy(net), True), cast(net, False)
    # Moments made for float32 stay float32: float64 weights then differ by float32 rounding.
    assert_same_weights(made_first, made_after, tolerance=1e-6)
    assert all(param.dtype == dtype for param in made_first.parameters())


def test_torch_compile() -> None:
    torch.manual_seed(0)
    net = Net()
    optimizer = make(net, "layerwise, projected backward")
    compiled = torch.compile(net, backend="eager")
    for batch in batches(9):
        ordinary_step(compiled, optimizer, batch)  # type: ignore[arg-type]
    assert_same_weights(net, run(Net, "plain"))


# ---- two backward passes in a step


def twice(net: nn.Module, optimizer: GaLoreOptimizer, batch: Tensor) -> None:
    for half in batch.chunk(2):
        loss_of(net, half).backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("way", [way for way in HOOKED if "held" in way or way.startswith("plain")])
def test_two_backward_passes_in_a_step_add_up(way: str) -> None:
    # No refresh after the first step, whose basis the two ways take from different gradients: see accumulation.
    group = {"update_proj_gap": 100}

    def once_then_twice(net: nn.Module, optimizer: GaLoreOptimizer, batch: Tensor) -> None:
        first = next(iter(optimizer.state.values()))["step"] == 0
        (ordinary_step if first else twice)(net, optimizer, batch)

    assert_same_weights(
        run(Net, way, step=once_then_twice, group=group), run(Net, "plain", step=once_then_twice, group=group)
    )


@pytest.mark.parametrize("way", ["layerwise by hooks", "layerwise, projected backward"])
def test_a_second_gradient_after_an_update_is_refused(way: str) -> None:
    torch.manual_seed(0)
    net = Net()
    optimizer = make(net, way)
    first, second = batches(2)
    loss_of(net, first).backward()
    assert optimizer.hooks is not None
    assert optimizer.hooks.has_updated
    with pytest.raises(RuntimeError, match=r"second gradient arrived for square.*hold_gradients=True"):
        loss_of(net, second).backward()


# ---- accumulation


def accumulate(parts: int, seen: list[dict[str, int]] | None = None) -> Step:
    """Micro-batches whose losses sum to that of the whole batch, with accelerate told where the window ends."""

    def step(net: nn.Module, optimizer: GaLoreOptimizer, batch: Tensor) -> None:
        chunks = batch.chunk(parts)
        for index, chunk in enumerate(chunks):
            GradientState()._set_sync_gradients(index == len(chunks) - 1)
            ((net(chunk) - 1).square().sum() / (batch.shape[0] * WIDE)).backward()
            if seen is not None and optimizer.hooks is not None:
                held = sum(r.untyped_storage().nbytes() for r in optimizer.hooks.held())
                gradients = [m.weight.grad for m in net.modules() if isinstance(m, nn.Linear)]
                grads = sum(type(gradient) is Tensor for gradient in gradients)
                assert held == sum(gradient.nbytes for gradient in gradients if isinstance(gradient, StandIn))
                seen.append({"held": held, "target gradients": grads})
        optimizer.step()
        optimizer.zero_grad()

    return step


def accumulated(way: str, parts: int, gap: int, seen: list[dict[str, int]] | None = None) -> nn.Module:
    torch.manual_seed(0)
    net = Net()
    optimizer = make(net, way, group={"update_proj_gap": gap})
    first, *others = batches(6, rows=16)
    ordinary_step(net, optimizer, first)
    for batch in others:
        accumulate(parts, seen)(net, optimizer, batch)
    return net


@pytest.mark.parametrize("way", WAYS)
def test_eight_micro_batches_are_one_batch(way: str) -> None:
    assert_same_weights(accumulated(way, 8, gap=100), accumulated("plain", 1, gap=100))


@pytest.mark.parametrize("way", WAYS)
def test_a_window_holds_low_rank_gradients_only(way: str) -> None:
    seen: list[dict[str, int]] = []
    accumulated(way, 8, gap=100, seen=seen)
    if way == "plain":
        assert not seen
        return
    # enter, down, up and square: the longer side × the rank with norm probes, half of what the rank leaves.
    elements = sum(WIDE * (RANK + (shorter - RANK) // 2) for shorter in (INPUTS, NARROW, NARROW, WIDE))
    assert seen == [{"held": 4 * elements, "target gradients": 0}] * 40


@pytest.mark.parametrize("way", HOOKED)
def test_a_refresh_in_a_window_takes_the_first_micro_batch(way: str) -> None:
    """The documented rule: the basis comes from the window's first micro-batch and serves all of it."""
    parts, gap = 4, 2
    torch.manual_seed(0)
    net = Net()
    reference = copy.deepcopy(net)
    optimizer = make(net, way, group={"update_proj_gap": gap, "stagger": False})
    by_hand = make(reference, "plain", group={"update_proj_gap": 10**6, "stagger": False})
    for index, batch in enumerate(batches(6, rows=16)):
        accumulate(parts)(net, optimizer, batch)
        if index % gap == 0:
            loss_of(reference, batch.chunk(parts)[0]).backward()
            for target in by_hand.targets():
                assert target.param.grad is not None
                target.project(target.param.grad, refresh=True)
            by_hand.zero_grad()
        loss_of(reference, batch).backward()
        for group in by_hand.param_groups:
            for param in group["params"]:
                if "rank" in group:
                    assert param.grad is not None
                    target_of(by_hand, param).update(project(param.grad, target_of(by_hand, param).bases()))
                else:
                    by_hand.trained(param).step(param.grad)
        by_hand.zero_grad()
    assert_same_weights(net, reference)


# ---- clipping and the norm


def clipping(norms: list[float], max_norm: float = 0.05) -> Step:
    def step(net: nn.Module, optimizer: GaLoreOptimizer, batch: Tensor) -> None:
        loss_of(net, batch).backward()
        if optimizer.hooks is None:
            norm = torch.nn.utils.clip_grad_norm_(net.parameters(), max_norm)
        else:
            found = optimizer.clip_grad_norm_(max_norm)
            assert found is not None
            norm = found
        norms.append(norm.item())
        optimizer.step()
        optimizer.zero_grad()

    return step


@pytest.mark.parametrize("cls", CLASSES)
def test_clipped_layerwise_is_clipped_plain(cls: type[Any]) -> None:
    theirs: list[float] = []
    ours: list[float] = []
    plain = run(Net, "plain", cls=cls, step=clipping(theirs), steps=30)
    layerwise = run(Net, "layerwise by hooks, held", cls=cls, step=clipping(ours), steps=30)
    assert ours == pytest.approx(theirs, rel=1e-4)
    assert min(theirs) > 0.05  # every step was clipped
    assert_same_weights(layerwise, plain)


def test_clipped_layerwise_is_clipped_plain_with_projected_backward() -> None:
    theirs: list[float] = []
    ours: list[float] = []
    plain = run(Net, "plain, projected backward", step=clipping(theirs), steps=30)
    layerwise = run(Net, "layerwise, projected backward, held", step=clipping(ours), steps=30)
    assert ours == pytest.approx(theirs, rel=1e-6)
    assert_same_weights(layerwise, plain)


@pytest.mark.parametrize("probes", [0, 8])
@pytest.mark.parametrize("way", HOOKED)
def test_the_norm_is_that_of_what_is_there(way: str, probes: int) -> None:
    """Of the gradients by hooks; with a projected backward, of what targets are projected to, norm probes and all."""
    torch.manual_seed(0)
    net = Net()
    optimizer = make(net, way, group={"norm_probes": probes})
    for batch in batches(6):
        twin = copy.deepcopy(net)
        loss_of(twin, batch).backward()
        loss_of(net, batch).backward()
        norm = optimizer.grad_norm()
        states = dict(zip((n for n, _ in net.named_parameters()), net.parameters(), strict=True))
        squares = 0.0
        for name, param in twin.named_parameters():
            assert param.grad is not None
            gradient = param.grad
            trained = optimizer.trained(states[name])
            if "projected backward" in way and isinstance(trained, Target):
                left, right = trained.with_probes(trained.bases())
                gradient = gradient if left is None else left.mT @ gradient
                gradient = gradient if right is None else gradient @ right
            squares += gradient.square().sum().item()
        assert norm is not None
        assert norm.item() == pytest.approx(squares**0.5, rel=1e-4)
        optimizer.step()
        optimizer.zero_grad()


def test_clipping_after_an_update_is_refused() -> None:
    torch.manual_seed(0)
    net = Net()
    optimizer = make(net, "layerwise, projected backward")
    loss_of(net, batches(1)[0]).backward()
    with pytest.raises(RuntimeError, match="hold_gradients=True"):
        optimizer.clip_grad_norm_(1.0)


# ---- nothing of a target's full shape


class Shapes(TorchDispatchMode):
    """Notes the shape of every new tensor, dead or alive: what never exists is never noted."""

    def __init__(self) -> None:
        super().__init__()
        self.made: set[tuple[int, ...]] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(issubclass(kind, StandIn) for kind in types):
            return NotImplemented  # has a shape and not the elements, and answers with operations on R, which are seen
        out = func(*args, **(kwargs or {}))
        inputs = {arg.untyped_storage().data_ptr() for arg in args if isinstance(arg, Tensor)}
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in inputs:
                self.made.add(tuple(sorted(tensor.shape)))
        return out


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("kind", [Net, Checkpointed, CheckpointedReentrant])
def test_a_projected_backward_makes_nothing_of_a_targets_shape(kind: type[Net], way: str, cls: type[Any]) -> None:
    torch.manual_seed(0)
    net = kind()
    optimizer = make(net, way, cls, group={"stagger": False})  # of a layer that is run twice G is built
    first, second = batches(2)
    ordinary_step(net, optimizer, first)  # a refresh
    with Shapes() as shapes:
        ordinary_step(net, optimizer, second)
    targets = {tuple(sorted(param.shape)) for param in net.parameters() if param.ndim == 2}
    made = targets & shapes.made
    assert made == (set() if "projected" in way else targets)


# ---- gradients that are not finite


def fill(value: float) -> Callable[[nn.Module, Any], tuple[Tensor]]:
    """A backward pre-hook that puts `value` in place of δ."""

    def hook(module: nn.Module, deltas: Any) -> tuple[Tensor]:
        return (torch.full_like(deltas[0], value),)

    return hook


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("bad_step", [2, GAP + 1], ids=["between refreshes", "at a refresh"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_gradient_that_is_not_finite_skips_the_update(
    way: str, cls: type[Any], bad_step: int, bad: float, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    net = Net()
    optimizer = make(net, way, cls)
    target = net.down.weight
    for number, batch in enumerate(batches(GAP + 3), start=1):
        before = target.detach().clone()
        state_before = {key: value.clone() for key, value in optimizer.state[target].items()}
        others_before = net.enter.weight.detach().clone()
        handle = None
        if number == bad_step:
            # δ of `down` becomes bad, and so does its gradient; nothing else sees it.
            handle = net.down.register_full_backward_pre_hook(fill(bad))
            stop = net.norm.register_full_backward_pre_hook(fill(0.0))
        with caplog.at_level(logging.WARNING, logger="hf_galore"):
            ordinary_step(net, optimizer, batch)
        if handle is None:
            assert not torch.equal(target, before)
            continue
        handle.remove()
        stop.remove()
        torch.testing.assert_close(target.detach(), before, atol=0, rtol=0)
        assert not torch.equal(net.enter.weight, others_before)
        exact = {"exp_avg", "exp_avg_sq", "exp_avg_sq_row", "exp_avg_sq_col", "basis_left", "basis_right"}
        for key in exact & set(state_before):
            torch.testing.assert_close(optimizer.state[target][key], state_before[key], atol=0, rtol=0)
    assert [(name, times) for name, (times, _) in optimizer.skipped_updates().items()] == [("down.weight", 1)]
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == 1
    assert f"the update of down.weight was skipped at step {bad_step}" in warnings[0]
    for param in net.parameters():
        assert param.isfinite().all()
        assert all(value.isfinite().all() for value in optimizer.state[param].values())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("cls", CLASSES)
def test_a_loss_of_nan_leaves_the_model_alone(way: str, cls: type[Any]) -> None:
    """The incumbent turns every weight to NaN and logs a loss of 0."""
    torch.manual_seed(0)
    net = Net()
    optimizer = make(net, way, cls)
    first, second, third = batches(3)
    ordinary_step(net, optimizer, first)
    before = copy.deepcopy(net)
    (loss_of(net, second) * float("nan")).backward()
    optimizer.step()
    optimizer.zero_grad()
    assert_same_weights(net, before, tolerance=0.0 if cls is not GaLoreAdamW8bit else 0.02)
    ordinary_step(net, optimizer, third)
    assert all(param.isfinite().all() for param in net.parameters())
    assert len(optimizer.skipped_updates()) == len(list(net.parameters()))


def test_a_gradient_too_large_for_its_square_is_skipped() -> None:
    """1e30 is finite, but the second moment of it is not."""
    torch.manual_seed(0)
    net = Net()
    optimizer = make(net, "layerwise, projected backward")
    first, second = batches(2)
    ordinary_step(net, optimizer, first)
    before = net.square.weight.detach().clone()
    (loss_of(net, second) * 1e30).backward()
    optimizer.step()
    torch.testing.assert_close(net.square.weight.detach(), before, atol=0, rtol=0)
    assert "square.weight" in optimizer.skipped_updates()


# ---- coming and going


def traces(net: nn.Module) -> list[str]:
    """What hooks would leave on a model."""
    found = [f"{n}: hook" for n, p in net.named_parameters() if getattr(p, "_post_accumulate_grad_hooks", None)]
    for name, module in net.named_modules():
        if module._forward_pre_hooks or module._backward_hooks or module._forward_hooks:
            found.append(f"{name}: module hook")
        if isinstance(module, ProjectedLinear) or "forward" in module.__dict__ or "_galore_sink" in module.__dict__:
            found.append(f"{name}: patch")
    return found


@pytest.mark.parametrize("way", HOOKED)
def test_close_leaves_the_model_as_it_was(way: str) -> None:
    torch.manual_seed(0)
    net = Net()
    attributes = {name: dict(module.__dict__) for name, module in net.named_modules()}
    optimizer = make(net, way)
    assert traces(net)
    ordinary_step(net, optimizer, batches(1)[0])
    optimizer.close()
    assert traces(net) == []
    assert {name: set(module.__dict__) for name, module in net.named_modules()} == {
        name: set(attribute) for name, attribute in attributes.items()
    }
    before = copy.deepcopy(net)
    loss_of(net, batches(1)[0]).backward()
    assert_same_weights(net, before, tolerance=0)
    assert net.down.weight.grad is not None
    optimizer.step()  # a closed optimizer is a plain one
    assert not torch.equal(net.down.weight, before.down.weight)


@pytest.mark.parametrize("way", ["layerwise by hooks", "layerwise, projected backward"])
def test_close_in_the_middle_of_a_step_says_so_and_gives_no_advice(way: str, caplog: pytest.LogCaptureFixture) -> None:
    """As after Ctrl-C: nobody has dropped a gradient."""
    net = Net()
    optimizer = make(net, way)
    for closes_in_the_middle in (False, True):
        loss_of(net, batches(1)[0]).backward()
        if not closes_in_the_middle:
            optimizer.step()
        optimizer.close()
        messages = [record.getMessage() for record in caplog.records if record.name == "hf_galore"]
        assert len(messages) == closes_in_the_middle
        assert optimizer.hooks is not None
        optimizer.hooks.attach()
    assert messages[0].startswith("Training stopped in the middle of a step: it has updated some weights already (")
    assert "hold_gradients" not in messages[0]
    assert all(param.grad is None for param in net.parameters())


@pytest.mark.parametrize("way", HOOKED)
def test_garbage_collection_takes_the_hooks_away(way: str) -> None:
    net = Net()
    optimizer = make(net, way)
    ordinary_step(net, optimizer, batches(1)[0])
    del optimizer
    gc.collect()
    assert traces(net) == []


@pytest.mark.parametrize("way", HOOKED)
@pytest.mark.parametrize("second", WAYS)
def test_a_second_optimizer_behaves_as_if_the_first_had_never_been(way: str, second: str) -> None:
    torch.manual_seed(0)
    net = Net()
    fresh = copy.deepcopy(net)
    first = make(net, way)
    if second == "plain":
        first.close()  # without hooks of its own it cannot know; a Trainer sees to it
    optimizer, alone = make(net, second), make(fresh, second)
    for batch in batches(5):
        ordinary_step(net, optimizer, batch)
        ordinary_step(fresh, alone, batch)
    assert_same_weights(net, fresh, tolerance=0)
    assert all(state["step"] == 0 for state in first.state.values())
    assert not (first.hooks is not None and first.hooks.attached)


@pytest.mark.parametrize("way", HOOKED)
def test_a_copy_of_a_hooked_model_is_a_plain_model(way: str) -> None:
    torch.manual_seed(0)
    net = Net()
    optimizer = make(net, way)
    ordinary_step(net, optimizer, batches(1)[0])
    buffer = io.BytesIO()
    torch.save(net, buffer)
    buffer.seek(0)
    copied = copy.deepcopy(net)
    loaded = torch.load(buffer, weights_only=False)
    for other in (copied, loaded):
        assert not any(isinstance(module, ProjectedLinear) for module in other.modules())
        other.square.weight.data.zero_()
        assert other(batches(1)[0]).abs().max() <= other.square.bias.abs().max() + 1e-6
    assert net.square.weight.abs().max() > 0


def test_a_layer_that_cannot_be_served_falls_back_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    class Special(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    class WithSpecial(Net):
        def __init__(self) -> None:
            super().__init__()
            self.square, self.up = Special(WIDE, WIDE), Special(NARROW, WIDE)

    with caplog.at_level(logging.INFO, logger="hf_galore"):
        net = run(WithSpecial, "layerwise, projected backward")
    said = [record.getMessage() for record in caplog.records if "cannot serve" in record.getMessage()]
    assert len(said) == 1
    assert "up (its class Special has a forward of its own), nor 1 other(s)" in said[0]
    assert_same_weights(net, run(WithSpecial, "plain"))


def test_hooks_need_the_model() -> None:
    with pytest.raises(ValueError, match="module=model"):
        GaLoreAdamW(Net().parameters(), layerwise=True)
