"""Loops without a Trainer: whatever they do with gradients does to low-rank ones what it does to AdamW's."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import GradientState
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hf_galore import GaLoreAdafactor, GaLoreAdamW, GaLoreAdamW8bit
from hf_galore.backward.gradient import LowRankGradient, UsedGradient
from hf_galore.optim.optimizer import GaLoreOptimizer
from hf_galore.optim.report import _MOST_REFRESHES, Refresh, RefreshLog, Stopwatch
from tests.backward.test_layerwise import (
    CLASSES,
    HOOKED,
    INPUTS,
    TOKENS,
    WAYS,
    CheckpointedReentrant,
    Net,
    assert_same_weights,
    batches,
    loss_of,
    make,
)
from tests.support.helpers import assert_identical, snapshot

HELD = [way for way in HOOKED if "held" in way or way.startswith("plain")]
AT_ONCE = [way for way in HOOKED if way not in HELD]


@pytest.fixture(autouse=True)
def _closed_windows() -> Iterator[None]:
    GradientState()._set_sync_gradients(True)
    yield
    GradientState()._set_sync_gradients(True)


def made(way: str, cls: type[Any] = GaLoreAdamW, kind: type[Net] = Net, **group: Any) -> tuple[Net, GaLoreOptimizer]:
    torch.manual_seed(0)
    net = kind()
    return net, make(net, way, cls, group=group)


def state_of(net: nn.Module, optimizer: GaLoreOptimizer) -> dict[str, Any]:
    state = {name: dict(optimizer.state[param]) for name, param in net.named_parameters()}
    return copy.deepcopy({"weights": snapshot(net), "state": state})


def step(net: nn.Module, optimizer: torch.optim.Optimizer, batch: Tensor) -> None:
    loss_of(net, batch).backward()
    optimizer.step()
    optimizer.zero_grad()


# ---- passes that are dropped


def drop_by_model(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    net.zero_grad()


def drop_by_optimizer(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()


def drop_by_none(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for param in net.parameters():
        param.grad = None


def drop_by_deleting(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for param in net.parameters():
        del param.grad


DROPS = [drop_by_model, drop_by_optimizer, drop_by_none, drop_by_deleting]


@pytest.mark.parametrize("way", ["plain", *HELD])
@pytest.mark.parametrize("drop", DROPS)
@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("moments", ["keep", "rotate"])
def test_a_dropped_pass_never_happened(
    way: str, drop: Callable[[nn.Module, torch.optim.Optimizer], None], cls: type[Any], moments: str
) -> None:
    """Bit for bit, at the first refresh, at a later one and between: two Adam steps before."""
    options: dict[str, Any] = {"moments": moments, "lazy_refresh": moments == "rotate"}
    net, optimizer = made(way, cls, **options)
    twin, undisturbed = made(way, cls, **options)
    for number, batch in enumerate(batches(9)):
        if number in (0, 2, 4, 5, 8):
            loss_of(net, 3 * batch.flip(0) + 1).backward()
            drop(net, optimizer)
        step(net, optimizer, batch)
        step(twin, undisturbed, batch)
        assert_identical(state_of(net, optimizer), state_of(twin, undisturbed))


@pytest.mark.parametrize("way", ["plain", *HELD])
def test_zeroed_gradients_make_a_step_without_a_gradient(way: str) -> None:
    """As AdamW's: momentum still moves the weights, and a refresh stays due."""
    results = []
    for zero in ("zero_", "model", "mul_", "optimizer"):
        net, optimizer = made(way)
        for number, batch in enumerate(batches(7)):
            loss_of(net, batch).backward()
            if number == 4:  # a refresh of some
                if zero == "model":
                    net.zero_grad(set_to_none=False)
                elif zero == "optimizer":
                    optimizer.zero_grad(set_to_none=False)
                for param in net.parameters() if zero in ("zero_", "mul_") else ():
                    assert param.grad is not None
                    param.grad.zero_() if zero == "zero_" else param.grad.mul_(0)
            optimizer.step()
            optimizer.zero_grad()
        results.append((zero, state_of(net, optimizer)))
    expected = dict(results)["zero_"]
    assert all(state["step"] == 7 for state in expected["state"].values())
    for zero, found in results:
        if zero != "mul_":  # which cannot be told from a small gradient: the refresh that it came with stays
            assert_identical(found, expected)


class Interrupting(Net):
    """Out of memory in the middle of a backward pass, where `broken` says so."""

    broken = False

    def block(self, x: Tensor) -> Tensor:
        out = super().block(x)
        if self.broken and out.requires_grad:
            out.register_hook(self._fail)
        return out

    def _fail(self, gradient: Tensor) -> None:
        raise torch.OutOfMemoryError("no memory for this batch")


def skipping(net: Interrupting, optimizer: GaLoreOptimizer, batch: Tensor, *, fails: bool) -> None:
    """The usual loop that skips a batch that is too large."""
    net.broken = fails
    try:
        loss_of(net, batch).backward()
    except torch.OutOfMemoryError:
        net.zero_grad()
        return
    optimizer.step()
    net.zero_grad()


@pytest.mark.parametrize("way", ["plain", *HELD])
def test_a_batch_that_ran_out_of_memory_is_skipped(way: str) -> None:
    net, optimizer = made(way, kind=Interrupting)
    twin, undisturbed = made(way, kind=Interrupting)
    assert isinstance(net, Interrupting)
    assert isinstance(twin, Interrupting)
    for number, batch in enumerate(batches(8)):
        if number in (0, 3, 4):
            skipping(net, optimizer, 2 * batch, fails=True)
        skipping(net, optimizer, batch, fails=False)
        skipping(twin, undisturbed, batch, fails=False)
    assert_identical(state_of(net, optimizer), state_of(twin, undisturbed))


@pytest.mark.parametrize("way", AT_ONCE)
def test_after_running_out_of_memory_layerwise_goes_on_and_says_what_it_has_done(
    way: str, caplog: pytest.LogCaptureFixture
) -> None:
    """What the pass had reached has been updated. The next batch is one like any other: nothing is held for it."""
    net, optimizer = made(way, kind=Interrupting)
    assert isinstance(net, Interrupting)
    with caplog.at_level(logging.WARNING, logger="hf_galore"):
        for number, batch in enumerate(batches(8)):
            if number in (2, 3):
                before = snapshot(net)
                skipping(net, optimizer, batch, fails=True)
                moved = {name for name, weight in snapshot(net).items() if not torch.equal(weight, before[name])}
                assert moved == {"square.weight", "square.bias"}
            net.broken = False
            loss_of(net, batch).backward()
            assert optimizer.hooks is not None
            assert optimizer.hooks.held() == []
            assert all(param.grad is None or param.grad.numel() == 0 for param in net.parameters())
            optimizer.step()
            net.zero_grad()
    said = [record.getMessage() for record in caplog.records if "were dropped" in record.getMessage()]
    assert len(said) == 1
    assert "hold_gradients=True" in said[0]


@pytest.mark.parametrize("way", AT_ONCE)
def test_gradients_dropped_after_they_were_used_are_an_error_at_the_step(way: str) -> None:
    net, optimizer = made(way)
    loss_of(net, batches(1)[0]).backward()
    net.zero_grad()
    with pytest.raises(RuntimeError, match=r"gradient of \w+\.(weight|bias) was dropped.*hold_gradients=True"):
        optimizer.step()


# ---- clipping and scaling


def clip_by_torch(net: nn.Module, optimizer: GaLoreOptimizer, accelerator: Accelerator) -> Tensor:
    norm: Tensor = torch.nn.utils.clip_grad_norm_(net.parameters(), 0.05)
    return norm


def clip_by_hand(net: nn.Module, optimizer: GaLoreOptimizer, accelerator: Accelerator) -> Tensor:
    gradients = [param.grad for param in net.parameters() if param.grad is not None]
    norm: Tensor = torch.stack([gradient.detach().float().norm(2) for gradient in gradients]).norm()
    for gradient in gradients:
        gradient.data.mul_((0.05 / (norm + 1e-6)).clamp(max=1.0))
    return norm


def clip_by_accelerate(net: nn.Module, optimizer: GaLoreOptimizer, accelerator: Accelerator) -> Tensor:
    norm: Tensor = accelerator.clip_grad_norm_(net.parameters(), 0.05)
    return norm


def clip_by_foreach(net: nn.Module, optimizer: GaLoreOptimizer, accelerator: Accelerator) -> Tensor:
    gradients = [param.grad for param in net.parameters() if param.grad is not None]
    norm: Tensor = torch.stack(list(torch._foreach_norm(gradients))).norm()
    torch._foreach_mul_(gradients, (0.05 / (norm + 1e-6)).clamp(max=1.0))
    return norm


@pytest.mark.parametrize("way", HELD)
@pytest.mark.parametrize("clip", [clip_by_torch, clip_by_hand, clip_by_accelerate, clip_by_foreach])
def test_clipping_by_others_is_clipping_by_the_optimizer(
    way: str, clip: Callable[[nn.Module, GaLoreOptimizer, Accelerator], Tensor]
) -> None:
    """They saw a norm of 0.0 and no gradients of targets."""
    accelerator = Accelerator(cpu=True)
    found, expected = made(way), made(way)
    for batch in batches(9):
        norms = []
        for net, optimizer in (found, expected):
            loss_of(net, batch).backward()
            ours = net is expected[0]
            norm = optimizer.clip_grad_norm_(0.05) if ours else clip(net, optimizer, accelerator)
            assert norm is not None
            norms.append(norm.item())
            optimizer.step()
            optimizer.zero_grad()
        assert norms[0] == pytest.approx(norms[1], rel=1e-5)
        assert norms[0] > 0.05
    assert_same_weights(found[0], expected[0], tolerance=1e-6)


@pytest.mark.parametrize("way", AT_ONCE)
@pytest.mark.parametrize("clip", [clip_by_torch, clip_by_hand, clip_by_accelerate, clip_by_foreach])
def test_clipping_what_has_been_used_is_refused(
    way: str, clip: Callable[[nn.Module, GaLoreOptimizer, Accelerator], Tensor]
) -> None:
    net, optimizer = made(way)
    loss_of(net, batches(1)[0]).backward()
    with pytest.raises(RuntimeError, match=r"hold_gradients=True.*optimizer\.clip_grad_norm_"):
        clip(net, optimizer, Accelerator(cpu=True))


@pytest.mark.parametrize("way", HELD)
@pytest.mark.parametrize("unscale_first", [False, True])
def test_a_grad_scaler_unscales_low_rank_gradients(way: str, unscale_first: bool) -> None:
    """R kept the factor 2¹⁶. A step that overflows is skipped, and the scale halved, as with AdamW."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    found, expected = made(way, eps=1e-3), made(way, eps=1e-3)
    for number, batch in enumerate(batches(9)):
        overflows = number == 4
        net, optimizer = found
        scaler.scale(loss_of(net, batch) * (1e38 if overflows else 1.0)).backward()
        if unscale_first:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(net.parameters(), 0.05)
        before = snapshot(net)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if overflows:
            assert_identical(snapshot(net), before)
            assert scaler.get_scale() == 2.0**15
            continue
        net, optimizer = expected
        loss_of(net, batch).backward()
        if unscale_first:
            optimizer.clip_grad_norm_(0.05)
        optimizer.step()
        optimizer.zero_grad()
    assert_same_weights(found[0], expected[0], tolerance=1e-5)


@pytest.mark.parametrize("way", AT_ONCE)
def test_a_grad_scaler_is_refused_where_weights_are_updated_at_once(way: str) -> None:
    scaler = torch.amp.GradScaler("cpu")
    net, optimizer = made(way)
    scaler.scale(loss_of(net, batches(1)[0])).backward()
    with pytest.raises(RuntimeError, match="hold_gradients=True"):
        scaler.unscale_(optimizer)


@pytest.mark.parametrize("way", HOOKED)
def test_gradients_of_several_tasks_are_refused_before_they_are_mixed_up(way: str) -> None:
    """PCGrad flattens the gradient of each task: it trained on the last one alone."""
    net, _optimizer = made(way)  # its hooks go with it
    before = snapshot(net)
    loss_of(net, batches(1)[0]).backward()
    gradients = [param.grad for param in net.parameters() if param.grad is not None]
    with pytest.raises(RuntimeError, match=r"layerwise=False and projected_backward=False|hold_gradients=True"):
        torch.cat([gradient.clone().flatten() for gradient in gradients])
    if way in HELD:
        assert_identical(snapshot(net), before)


@pytest.mark.parametrize("way", HELD)
def test_gradients_of_several_tasks_may_be_added(way: str) -> None:
    """Between refreshes all is linear: a weighted sum of two tasks' gradients is the gradient of that sum."""
    found, expected = made(way, update_proj_gap=100), made("plain", update_proj_gap=100)
    for number, batch in enumerate(batches(4)):
        net, optimizer = found
        if number == 0:
            loss_of(net, batch).backward()
        else:
            parts = []
            for task in (batch, batch.flip(1)):
                optimizer.zero_grad()
                loss_of(net, task).backward()
                parts.append([param.grad.clone() for param in net.parameters() if param.grad is not None])
            for param, first, second in zip(net.parameters(), *parts, strict=True):
                param.grad = 0.3 * first + second / 2
        optimizer.step()
        optimizer.zero_grad()
        net, optimizer = expected
        loss = loss_of(net, batch)
        (loss if number == 0 else 0.3 * loss + loss_of(net, batch.flip(1)) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert_same_weights(found[0], expected[0])


@pytest.mark.parametrize("way", HELD)
def test_gradients_that_were_kept_over_a_refresh_are_refused(way: str) -> None:
    net, optimizer = made(way, update_proj_gap=1, stagger=False)
    first, second = batches(2)
    loss_of(net, first).backward()
    kept = [param.grad.clone() for param in net.parameters() if param.grad is not None]
    optimizer.step()
    optimizer.zero_grad()
    loss_of(net, second).backward()
    assert net.enter.weight.grad is not None
    with pytest.raises(RuntimeError, match="different bases"):
        net.enter.weight.grad.add_(kept[0])
    for param, gradient in zip(net.parameters(), kept, strict=True):
        param.grad = gradient
    with pytest.raises(RuntimeError, match="earlier basis"):
        optimizer.step()


@pytest.mark.parametrize("way", ["plain", *HELD])
def test_a_step_without_zero_grad_leaves_the_gradients_there(way: str) -> None:
    """AdamW's next pass adds to them: a loop that forgets zero_grad trains the same by every way."""
    results = []
    for each in ("plain", way):
        net, optimizer = made(each, update_proj_gap=100)
        for batch in batches(4):
            loss_of(net, batch).backward()
            optimizer.step()
        results.append(net)
    assert_same_weights(results[0], results[1])


@pytest.mark.parametrize("way", HELD)
def test_a_gradient_set_by_hand_is_used(way: str) -> None:
    """Gradient surgery that ends in a gradient of its own, after a pass that had a refresh."""
    found, expected = made(way), made("plain")
    for number, batch in enumerate(batches(7)):
        for net, optimizer in (found, expected):
            loss_of(net, batch).backward()
            if number in (0, 2, 4):
                for index, param in enumerate(net.parameters()):
                    param.grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(100 * number + index))
            optimizer.step()
            optimizer.zero_grad()
    assert_same_weights(found[0], expected[0])


# ---- gradients that nobody asked for


@pytest.mark.parametrize("way", HOOKED)
def test_gradients_for_inputs_leave_the_weights_alone(way: str) -> None:
    """Adversarial examples, in the middle of a step: the pass for the input added to R."""
    found, expected = made(way), made("plain")
    for batch in batches(7):
        for net, optimizer in (found, expected):
            x = batch.clone().requires_grad_()
            loss = loss_of(net, x)
            (slope,) = torch.autograd.grad(loss, x, retain_graph=True)
            (loss + loss_of(net, batch + 0.1 * slope.sign())).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert_same_weights(found[0], expected[0])


@pytest.mark.parametrize("way", HOOKED)
def test_a_probe_changes_nothing(way: str) -> None:
    """Saliency on held-out data, by `autograd.grad` and by `backward(inputs=...)`."""
    net, optimizer = made(way)
    twin, undisturbed = made(way)
    for number, batch in enumerate(batches(7)):
        x = (batch + 1).requires_grad_()
        if number % 2:
            loss_of(net, x).backward(inputs=[x])
        else:
            torch.autograd.grad(loss_of(net, x), x)
        assert optimizer.grad_norm() is None
        step(net, optimizer, batch)
        step(twin, undisturbed, batch)
    assert_identical(state_of(net, optimizer), state_of(twin, undisturbed))


@pytest.mark.parametrize("way", HOOKED)
def test_gradients_of_weights_that_are_returned_are_the_gradients(way: str) -> None:
    net, optimizer = made(way)
    for batch in batches(3):
        returned = torch.autograd.grad(loss_of(net, batch), list(net.parameters()))
        reference = copy.deepcopy(net)
        expected = torch.autograd.grad(loss_of(reference, batch), list(reference.parameters()))
        for found, gradient in zip(returned, expected, strict=True):
            torch.testing.assert_close(found, gradient)
        assert optimizer.grad_norm() is None
        step(net, optimizer, batch)


@pytest.mark.parametrize("way", HOOKED)
def test_a_gradient_penalty(way: str) -> None:
    """The gradient of a gradient goes through the weights once more."""
    found, expected = made(way, eps=1e-3), made("plain", eps=1e-3)
    for batch in batches(7):
        for net, optimizer in (found, expected):
            x = batch.clone().requires_grad_()
            loss = loss_of(net, x)
            (slope,) = torch.autograd.grad(loss, x, create_graph=True)
            (loss + slope.square().sum()).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert_same_weights(found[0], expected[0])


@pytest.mark.parametrize("way", HELD)
def test_a_backward_pass_that_is_to_be_differentiated(way: str) -> None:
    """`backward(create_graph=True)`: gradients stay as they are, with their graph, until the step."""
    found, expected = made(way, eps=1e-3), made("plain", eps=1e-3)
    for batch in batches(5):
        for net, optimizer in (found, expected):
            loss_of(net, batch).backward(create_graph=True)
            gradients = [param.grad for param in net.parameters() if param.grad is not None]
            second = torch.autograd.grad(torch.stack([g.square().sum() for g in gradients]).sum(), net.down.weight)
            net.down.weight.grad = (gradients[4] + second[0]).detach()
            for param in net.parameters():
                assert param.grad is not None
                param.grad = param.grad.detach()
            optimizer.step()
            optimizer.zero_grad()
    assert_same_weights(found[0], expected[0])


@pytest.mark.parametrize("way", HOOKED)
def test_hooks_on_a_weight_get_its_gradient(way: str) -> None:
    """Masking rows, as for the embeddings of new tokens alone: the hook got `None`."""
    mask = (torch.arange(12) % 3 == 0).float().unsqueeze(1)
    found, expected = made(way), made("plain")
    for net, _ in (found, expected):
        net.square.weight.register_hook(lambda gradient: gradient * mask)
    for batch in batches(7):
        for net, optimizer in (found, expected):
            step(net, optimizer, batch)
    assert_same_weights(found[0], expected[0])


@pytest.mark.parametrize("way", HOOKED)
def test_function_transforms_go_past_the_projected_backward(way: str) -> None:
    net, _ = made(way)
    reference = copy.deepcopy(net)
    batch = batches(1)[0]
    params = {name: param.detach() for name, param in net.named_parameters()}

    def loss(values: dict[str, Tensor], model: nn.Module, x: Tensor) -> Tensor:
        out: Tensor = torch.func.functional_call(model, values, (x,))
        return (out - 1).square().mean()

    for model in (net, reference):
        model.requires_grad_(True)
    found, expected = (torch.func.grad(loss)(params, model, batch) for model in (net, reference))
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient)
    tangents = [torch.func.jvp(lambda x, m=model: m(x), (batch,), (batch,))[1] for model in (net, reference)]
    torch.testing.assert_close(*tangents)


# ---- passes and uses that are counted or not


def no_grad_pass(net: nn.Module, batch: Tensor) -> None:
    with torch.no_grad():
        net(batch)


def detached_pass(net: nn.Module, batch: Tensor) -> None:
    net(batch).detach()


def two_passes(net: nn.Module, batch: Tensor) -> None:
    no_grad_pass(net, batch)
    net(batch).sum()


@pytest.mark.parametrize("way", HOOKED)
@pytest.mark.parametrize("extra", [no_grad_pass, detached_pass, two_passes])
def test_a_forward_pass_without_a_backward_one_holds_nothing(
    way: str, extra: Callable[[nn.Module, Tensor], None]
) -> None:
    """GRPO's log-probabilities, a metric: layerwise held every gradient until the step."""
    net, optimizer = made(way)
    twin, undisturbed = made(way)
    for batch in batches(6):
        extra(net, batch)
        loss_of(net, batch).backward()
        if way in AT_ONCE:
            assert optimizer.hooks is not None
            assert optimizer.hooks.held() == []
            assert all(isinstance(param.grad, UsedGradient) for param in net.parameters())
            assert sum(param.grad.nbytes for param in net.parameters() if param.grad is not None) == 0
        optimizer.step()
        optimizer.zero_grad()
        step(twin, undisturbed, batch)
    assert_identical(state_of(net, optimizer), state_of(twin, undisturbed))


@pytest.mark.parametrize("way", AT_ONCE)
@pytest.mark.parametrize("extra", [True, False])
def test_passes_without_gradients_through_checkpoints_hold_nothing(way: str, extra: bool) -> None:
    """A reentrant checkpoint runs its segment without gradients in any case: which of them come back is looked at."""

    class InSegments(CheckpointedReentrant):
        def forward(self, x: Tensor) -> Tensor:
            x = torch.tanh(self.enter(x))
            x = x + checkpoint(self.block, x, use_reentrant=True)
            return checkpoint(self.square, x, use_reentrant=True)  # type: ignore[no-any-return]

    net, optimizer = made(way, kind=InSegments)
    for batch in batches(3):
        if extra:
            with torch.no_grad():  # of an input that needs a gradient, as enable_input_require_grads makes it
                net(batch.clone().requires_grad_())
            net(batch).detach()
        loss_of(net, batch).backward()
        assert optimizer.hooks is not None
        assert optimizer.hooks.held() == []
        optimizer.step()
        optimizer.zero_grad()


class Tied(Net):
    def __init__(self) -> None:
        super().__init__()
        self.twin = nn.Linear(12, 12, bias=False)
        self.twin.weight = self.square.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.twin(super().forward(x))  # type: ignore[no-any-return]


class ModuleAndFunction(Net):
    """A weight used by its module, by a function and, as a view, by a product."""

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return nn.functional.linear(x, self.square.weight) + x @ self.square.weight[:12]


@pytest.mark.parametrize("way", HOOKED)
@pytest.mark.parametrize("kind", [Tied, ModuleAndFunction])
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("refresh", ["subspace", "svd"])
def test_several_uses_of_a_weight_are_summed_up(way: str, kind: type[Net], train: bool, refresh: str) -> None:
    """With a new basis from the sum at every step; dropout off while training, too."""
    options: dict[str, Any] = {"refresh": refresh, "update_proj_gap": 1, "stagger": False, "eps": 1e-3}
    found, expected = made(way, kind=kind, **options), made("plain", kind=kind, **options)
    for net, optimizer in (found, expected):
        net.train(train)
        for batch in batches(5):
            step(net, optimizer, batch)
    assert_same_weights(found[0], expected[0])


@pytest.mark.parametrize("way", AT_ONCE)
def test_several_uses_of_a_weight_hold_nothing(way: str) -> None:
    net, optimizer = made(way, kind=Tied)
    for batch in batches(3):
        loss_of(net, batch).backward()
        assert optimizer.hooks is not None
        assert optimizer.hooks.held() == []
        optimizer.step()


# ---- refreshes that find nothing


@pytest.mark.parametrize("way", ["plain", *HOOKED])
@pytest.mark.parametrize("first", [0, 4], ids=["first window", "later window"])
@pytest.mark.parametrize("moments", ["keep", "rotate", "reset"])
def test_a_refresh_waits_for_a_micro_batch_with_a_gradient(way: str, first: int, moments: str) -> None:
    """All labels masked in the window's first micro-batch: the refresh was counted, and lost for a gap."""
    group: dict[str, Any] = {"update_proj_gap": 4, "stagger": False, "moments": moments}
    found, expected = made(way, **group), made(way, **group)
    for number, batch in enumerate(batches(6, rows=TOKENS)):
        for net, optimizer in (found, expected):
            if number == first and net is found[0]:
                GradientState()._set_sync_gradients(False)
                (loss_of(net, batch) * 0).backward()
                GradientState()._set_sync_gradients(True)
            step(net, optimizer, batch)
    for name, param in expected[0].named_parameters():
        state, other = expected[1].state[param], found[1].state[dict(found[0].named_parameters())[name]]
        if "refreshes" in state:
            assert (other["refreshes"], other["refreshed_at"]) == (state["refreshes"], state["refreshed_at"])
    assert_same_weights(found[0], expected[0], tolerance=2e-5)


class WithExpert(Net):
    """With a layer that sees the first `tokens` rows only."""

    tokens = 0

    def __init__(self) -> None:
        super().__init__()
        self.expert = nn.Linear(12, 12, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return torch.cat([self.expert(x[: self.tokens]), x[self.tokens :]])


@pytest.mark.parametrize("way", ["plain", *HOOKED])
@pytest.mark.parametrize("cls", CLASSES)
def test_an_expert_without_tokens_waits_for_its_first(way: str, cls: type[Any]) -> None:
    net, optimizer = made(way, cls, kind=WithExpert, update_proj_gap=100)
    assert isinstance(net, WithExpert)
    weight = net.expert.weight
    start = weight.detach().clone()
    for number, batch in enumerate(batches(4)):
        net.tokens = 5 if number >= 2 else 0
        step(net, optimizer, batch)
        assert optimizer.state[weight]["refreshes"] == (number >= 2)
        if number < 2:
            torch.testing.assert_close(weight.detach(), start * (1 - 1e-2 * 0.1) ** (number + 1))  # decay alone


@pytest.mark.parametrize("cls", CLASSES)
def test_a_dry_step_refreshes_nothing(cls: type[Any]) -> None:
    """Checkpoint libraries make state by a step with zero gradients and a learning rate of zero."""
    net, optimizer = made("plain", cls)
    rates = [group["lr"] for group in optimizer.param_groups]
    for param in net.parameters():
        param.grad = torch.zeros_like(param)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    start = snapshot(net)
    optimizer.step()
    optimizer.zero_grad()
    assert_identical(snapshot(net), start)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    for target in optimizer.targets():
        assert target.state["refreshes"] == 0
    step(net, optimizer, batches(1)[0])
    for target in optimizer.targets():
        assert target.state["refreshes"] == 1


# ---- gradients that are not finite


@pytest.mark.parametrize("way", HOOKED)
@pytest.mark.parametrize("bad_part", [0, 1])
@pytest.mark.parametrize("first", [0, 4], ids=["first window", "later window"])
def test_a_bad_micro_batch_skips_its_window(way: str, bad_part: int, first: int) -> None:
    """With a refresh that is due, which the good micro-batch must not lend the bad one: the next window has it."""
    net, optimizer = made(way, stagger=False)
    for number, batch in enumerate(batches(6)):
        before = state_of(net, optimizer)
        parts = batch.chunk(2)
        for index, part in enumerate(parts):
            GradientState()._set_sync_gradients(index == len(parts) - 1)
            (loss_of(net, part) * (float("nan") if number == first and index == bad_part else 1.0)).backward()
        optimizer.step()
        optimizer.zero_grad()
        if number == first:
            after = state_of(net, optimizer)
            assert_identical(after["weights"], before["weights"])
            assert all(state["step"] == number for state in after["state"].values())
        if number == first + 1:
            assert all(target.state["refreshes"] == 1 + (number > 2) for target in optimizer.targets())
    assert all(param.isfinite().all() for param in net.parameters())
    assert {times for times, _ in optimizer.skipped_updates().values()} == {1}


@pytest.mark.parametrize("way", HELD)
@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("moments", ["keep", "rotate", "reset"])
def test_a_checkpoint_before_the_step_is_one_before_the_pass(way: str, cls: type[Any], moments: str) -> None:
    """Its gradients are not saved: a run that goes on from there makes the batch, and its refresh, again."""
    options: dict[str, Any] = {"moments": moments, "lazy_refresh": True}
    net, optimizer = made(way, cls, **options)
    for number, batch in enumerate(batches(9)):
        loss_of(net, batch).backward()
        if number in (0, 4, 6):
            saved, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(net.state_dict())
            net, optimizer = made(way, cls, **options)
            net.load_state_dict(weights)
            optimizer.load_state_dict(saved)
            loss_of(net, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    twin, undisturbed = made(way, cls, **options)
    for batch in batches(9):
        step(twin, undisturbed, batch)
    assert_identical(state_of(net, optimizer), state_of(twin, undisturbed))


@pytest.mark.parametrize("way", ["plain", *HELD])
@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("moments", ["keep", "rotate", "reset"])
def test_a_step_that_is_skipped_refreshes_nothing(way: str, cls: type[Any], moments: str) -> None:
    """The gradients of the targets are finite, and a norm that they share with others is not."""
    net, optimizer = made(way, cls, moments=moments, lazy_refresh=True)
    for number, batch in enumerate(batches(6)):
        loss_of(net, batch).backward()
        if number in (0, 4):
            assert net.norm.weight.grad is not None
            net.norm.weight.grad[0] = float("inf")
            saved = copy.deepcopy(optimizer.state_dict())
        optimizer.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.zero_grad()
        if number in (0, 4):
            assert_identical(copy.deepcopy(optimizer.state_dict()), saved)
    assert {times for times, _ in optimizer.skipped_updates().values()} == {2}


@pytest.mark.parametrize("way", HOOKED)
def test_anomaly_mode(way: str) -> None:
    net, optimizer = made(way)
    with torch.autograd.detect_anomaly(check_nan=True):
        for batch in batches(3):
            step(net, optimizer, batch)
        with pytest.raises(RuntimeError, match="nan values"):
            (loss_of(net, batches(1)[0]) * float("nan")).backward()


@pytest.mark.parametrize("way", HOOKED)
def test_hooks_of_others_that_scale_gradients_before_ours(way: str) -> None:
    found, expected = made("plain", eps=1e-3), made("plain", eps=1e-3)
    nets = []
    for each, pair in ((way, found), ("plain", expected)):
        net, _ = pair

        def halve(param: Tensor) -> None:
            assert param.grad is not None
            param.grad = param.grad * 0.5

        for param in net.parameters():
            param.register_post_accumulate_grad_hook(halve)
        optimizer = make(net, each, group={"eps": 1e-3})
        for batch in batches(7):
            step(net, optimizer, batch)
        nets.append(net)
    assert_same_weights(nets[0], nets[1])


def test_a_state_dict_has_nothing_of_a_dropped_pass() -> None:
    net, optimizer = made("layerwise, projected backward, held")
    before = copy.deepcopy(optimizer.state_dict())
    seen: list[Any] = []
    optimizer.register_state_dict_post_hook(lambda _, saved: seen.append(copy.deepcopy(saved)))
    loss_of(net, batches(1)[0]).backward()
    assert_identical(optimizer.state_dict(), before)
    net.zero_grad()
    assert_identical(optimizer.state_dict(), before)
    assert_identical(seen, [before, before])


@pytest.mark.parametrize("way", ["plain", *HELD])
@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("known", [True, False], ids=["host knows", "device knows"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_clipped_step_that_is_not_finite_moves_nothing(
    way: str, cls: type[Any], bad: float, known: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One norm for all: all are skipped, with their moments, their counts and what was in `.grad`."""
    if not known:
        monkeypatch.setattr("hf_galore.lowrank.nonfinite._look", lambda skip: None)
    torch.manual_seed(0)
    net = Wide().to(dtype)
    optimizer = make(net, way, cls, group={"stagger": False})  # no refresh in that step: see below
    for number, batch in enumerate(batches(4)):
        before = state_of(net, optimizer)
        loss_of(net, batch.to(dtype)).backward()
        if number == 2:
            assert net.down.bias.grad is not None
            net.down.bias.grad[0] = bad
        optimizer.clip_grad_norm_(1.0)
        gradients = [param.grad.norm() for param in net.parameters() if param.grad is not None]
        optimizer.step()
        optimizer.skipped_updates()  # as a log does
        if number == 2:
            assert_identical(state_of(net, optimizer), before)
            after = [param.grad.norm() for param in net.parameters() if param.grad is not None]
            torch.testing.assert_close(after, gradients, equal_nan=True)
            assert {times for times, _ in optimizer.skipped_updates().values()} == {1}
            assert len(optimizer.skipped_updates()) == len(list(net.parameters()))
        optimizer.zero_grad()
    counts = {int(optimizer.state[param]["step"]) for param in net.parameters()}
    assert counts == {3}


class Wide(nn.Module):
    """Large enough for 8-bit moments that are really in 8 bits, of a target and of a full-rank weight."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(INPUTS, 96)
        self.down = nn.Linear(96, 80)
        self.scale = nn.Parameter(torch.ones(4200))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.enter(x))) * self.scale[:80] + self.scale[80:160]  # type: ignore[no-any-return]


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("known", [True, False], ids=["host knows", "device knows"])
def test_without_clipping_only_what_is_not_finite_stays(
    cls: type[Any], known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not known:
        monkeypatch.setattr("hf_galore.lowrank.nonfinite._look", lambda skip: None)
    torch.manual_seed(0)
    net = Wide()
    optimizer = make(net, "plain", cls)
    for number, batch in enumerate(batches(4)):
        loss_of(net, batch).backward()
        assert net.scale.grad is not None
        if number == 2:
            net.scale.grad[7] = float("inf")
            gradient = net.scale.grad.clone()
            before = state_of(net, optimizer)
        optimizer.step()
        optimizer.skipped_updates()
        if number == 2:
            after = state_of(net, optimizer)
            assert torch.equal(net.scale.grad, gradient)
            same = {name for name, weight in after["weights"].items() if torch.equal(weight, before["weights"][name])}
            assert same == {"scale"}
            assert_identical(after["state"]["scale"], before["state"]["scale"])
        optimizer.zero_grad()
    assert {name: skipped for name, (skipped, _) in optimizer.skipped_updates().items()} == {"scale": 1}


def test_the_device_path_trains_as_the_host_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU does instead of asking: the same weights, of every class, dtype and kind of moment."""
    for cls in CLASSES:
        # Near 1 a unit in the last place of bfloat16 is 2⁻⁷, and two ways of rounding may differ by one.
        for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 2**-7)):
            results = []
            for look in (None, lambda skip: None):
                with monkeypatch.context() as patch:
                    if look is not None:
                        patch.setattr("hf_galore.lowrank.nonfinite._look", look)
                    torch.manual_seed(0)
                    net = Wide().to(dtype)
                    optimizer = make(net, "plain", cls)
                    for batch in batches(4):
                        step(net, optimizer, batch.to(dtype))
                    results.append(net)
            assert_same_weights(results[0], results[1], tolerance=tolerance)


# ---- groups and parameters that come later


@pytest.mark.parametrize("way", ["plain", *HOOKED])
def test_a_group_that_comes_later(way: str) -> None:
    """It needed a name, and had no hooks."""
    results = []
    for late in (True, False):
        torch.manual_seed(0)
        net = Net()
        make_late: list[Tensor] = [net.square.weight, net.square.bias] if late else []
        others = [param for param in net.parameters() if not any(param is p for p in make_late)]
        group = {"rank": 3, "update_proj_gap": 4, "scale": 0.5, "proj_bits": 16, "stagger": False}
        options: dict[Tensor, Any] = dict.fromkeys((net.down.weight, net.up.weight), group)
        if not late:
            options[net.square.weight] = group
        optimizer = GaLoreAdamW(others, lr=1e-2, param_options=options, module=net, **WAYS[way])
        if late:
            optimizer.add_param_group({"params": [net.square.weight], **group})
            optimizer.add_param_group({"params": net.square.bias})
            assert optimizer.param_groups[-2]["param_names"] == ["square.weight"]
        for batch in batches(5):
            loss_of(net, batch).backward()
            if way in AT_ONCE:
                assert all(isinstance(param.grad, UsedGradient) for param in net.parameters())
            elif way in HELD:
                assert isinstance(net.square.weight.grad, LowRankGradient)
            optimizer.step()
            optimizer.zero_grad()
        assert optimizer.state_dict()["param_groups"][-1]["param_names"]
        results.append(net)
    assert_same_weights(results[0], results[1])


@pytest.mark.parametrize("way", HOOKED)
def test_parameters_that_thaw_get_hooks(way: str) -> None:
    """At the second step after thawing at the latest; the first is as the plain optimizer's."""
    found: list[nn.Module] = []
    expected: list[nn.Module] = []
    for each, nets in ((way, found), ("plain", expected)):
        torch.manual_seed(0)
        net = Net()
        net.square.weight.requires_grad_(False)
        net.up.bias.requires_grad_(False)
        optimizer = make(net, each)
        for number, batch in enumerate(batches(7)):
            if number == 2:
                net.requires_grad_(True)
            loss_of(net, batch).backward()
            if number > 2 and each in AT_ONCE:
                assert all(isinstance(param.grad, UsedGradient) for param in net.parameters())
            if number > 2 and each in HELD:
                assert isinstance(net.square.weight.grad, LowRankGradient)
            optimizer.step()
            optimizer.zero_grad()
        nets.append(net)
    assert_same_weights(found[0], expected[0])


# ---- the rest


def test_a_log_of_refreshes_that_nobody_reads_ends() -> None:
    log = RefreshLog()
    for number in range(_MOST_REFRESHES + 10):
        log.add(Refresh(float(number >= 10), None, Stopwatch(torch.device("cpu"))))
    assert len(log._refreshes) == _MOST_REFRESHES
    assert log.take()["captured_energy_min"] == 1.0


@pytest.mark.parametrize("way", HOOKED)
def test_float64_stays_float64_under_autocast(way: str) -> None:
    """As in layers that are not patched."""
    torch.manual_seed(0)
    net = nn.Linear(6, 5).double()
    reference = copy.deepcopy(net)
    make(net, way, group={"rank": 2})
    x = torch.randn(4, 6, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = net(x), reference(x)
    assert found.dtype == expected.dtype == torch.float64
    assert torch.equal(found, expected)


def test_hooks_on_loading_see_the_state() -> None:
    net, optimizer = made("plain")
    step(net, optimizer, batches(1)[0])
    saved = copy.deepcopy(optimizer.state_dict())
    twin, other = made("plain")
    seen: list[Any] = []

    def before(opt: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        seen.append({index: sorted(state) for index, state in state_dict["state"].items()})
        state_dict["state"] = {i: {**state, "step": state["step"] + 6} for i, state in state_dict["state"].items()}
        return state_dict

    def after(opt: torch.optim.Optimizer) -> None:
        seen.append([int(state["step"]) for state in opt.state.values()])

    other.register_load_state_dict_pre_hook(before)
    other.register_load_state_dict_post_hook(after)
    other.load_state_dict(saved)
    assert seen[0] == {index: sorted(state) for index, state in saved["state"].items()}
    assert seen[1] == [7] * len(list(twin.parameters()))
    assert len(other._optimizer_load_state_dict_pre_hooks) == len(other._optimizer_load_state_dict_post_hooks) == 1


@pytest.mark.parametrize("cls", [GaLoreAdamW, GaLoreAdamW8bit, GaLoreAdafactor])
def test_an_optimizer_that_is_gone_leaves_gradients_that_say_so(cls: type[Any]) -> None:
    net, optimizer = made("plain, projected backward", cls)
    loss_of(net, batches(1)[0]).backward()
    del optimizer
    with pytest.raises(RuntimeError, match=r"is gone: set it to None"):
        loss_of(net, batches(1)[0]).backward()
    net.zero_grad()
    loss_of(net, batches(1)[0]).backward()
    assert type(net.square.weight.grad) is Tensor
