"""docs/examples/lightning_module.py: Lightning's Trainer, which calls step() with a closure, and Fabric."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from hf_galore import make_optimizer
from tests.support.examples import all_apart, example
from tests.support.helpers import assert_identical, assert_same_path, fraction_apart, hooks_on, snapshot

lightning = pytest.importorskip("lightning")
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging  # noqa: E402
from lightning.pytorch.plugins import MixedPrecision  # noqa: E402

program = example("lightning_module")

# Bases unquantised: a code that rounding tips over is a difference of its own size.
ARGS = "rank=8, update_proj_gap=3, scale=1, proj_bits=16"
NAMES = ("galore_adamw", "galore_adamw_layerwise", "galore_adamw_8bit_layerwise")
STEPS = 8


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("lightning.pytorch", "lightning.fabric"):
        monkeypatch.setattr(logging.getLogger(name), "level", logging.ERROR)


def loader() -> DataLoader[Any]:
    """16 batches, each of more rows than the rank: of fewer, rounding would be what the rest of a basis is made of."""
    return DataLoader(program.tiny_rows(256), batch_size=16)


def trainer(**options: Any) -> Any:
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return lightning.Trainer(accelerator="cpu", **{"max_steps": STEPS, "max_epochs": None, **quiet, **options})


def fitted(
    optim: str, kind: Any = None, *, optim_args: str = ARGS, fit: dict[str, Any] | None = None, **options: Any
) -> Any:
    """A module that the example's Trainer has trained."""
    module = (kind or program.FineTuning)(program.tiny_classifier(), optim, optim_args)
    trainer(**options).fit(module, loader(), **(fit or {}))
    assert hooks_on(module) == 0
    return module


def ended(*args: Any, **options: Any) -> dict[str, Tensor]:
    return snapshot(fitted(*args, **options).model)


def start() -> dict[str, Tensor]:
    return snapshot(program.tiny_classifier())


def plain_loop(
    optim: str, *, max_norm: float | None = None, accumulate: int = 1, scheduled: bool = True, optim_args: str = ARGS
) -> dict[str, Tensor]:
    """The same without Lightning."""
    model = program.tiny_classifier().train()
    optimizer = make_optimizer(
        model, optim=optim, optim_args=optim_args, lr=1e-2, hold_gradients=max_norm is not None or accumulate > 1
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=STEPS)
    batches = list(loader())
    for number, (inputs, labels) in enumerate(batches[: STEPS * accumulate], 1):
        (cross_entropy(model(inputs), labels) / accumulate).backward()
        if number % accumulate:
            continue
        if max_norm is not None:
            # In the order of the groups, as Lightning asks for them: a sum's rounding depends on it.
            params = [param for group in optimizer.param_groups for param in group["params"]]
            torch.nn.utils.clip_grad_norm_(params, max_norm)
        optimizer.step()
        optimizer.zero_grad()
        if scheduled:
            schedule.step()
    return snapshot(model)


class Manual(program.FineTuning):  # type: ignore[name-defined]
    """Calls backward and step itself."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.automatic_optimization = False

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, index))
        optimizer.step()
        self.lr_schedulers().step()


class ManualAndClipped(program.FineTuning):  # type: ignore[name-defined]
    """Clips by the optimizer's own method, which Lightning's wrapper has too."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        return make_optimizer(self.model, optim=self.optim, optim_args=ARGS, lr=1e-2, hold_gradients=True)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        optimizer = self.optimizers()
        self.manual_backward(super().training_step(batch, index))
        optimizer.clip_grad_norm_(0.5)
        optimizer.step()
        optimizer.zero_grad()


# ---- its Trainer


@pytest.mark.parametrize("kind", [None, Manual], ids=["automatic", "manual"])
@pytest.mark.parametrize("optim", NAMES)
def test_its_steps_are_those_of_a_plain_loop(optim: str, kind: Any) -> None:
    """With a schedule, which moves the rate at each step."""
    assert_identical(ended(optim, kind), plain_loop(optim))


def test_the_schedule_is_felt() -> None:
    found, without = plain_loop("galore_adamw"), plain_loop("galore_adamw", scheduled=False)
    assert any(not torch.equal(weight, without[name]) for name, weight in found.items())


@pytest.mark.parametrize("optim", NAMES)
def test_gradient_clip_val(optim: str) -> None:
    found = ended(optim, gradient_clip_val=0.5)
    assert_identical(found, plain_loop(optim, max_norm=0.5))
    assert any(not torch.equal(weight, found[name]) for name, weight in plain_loop(optim).items())


def test_the_optimizers_own_clipping_by_the_wrapper_that_a_module_gets() -> None:
    found = ended("galore_adamw_layerwise", ManualAndClipped)
    # The two ways of clipping round otherwise.
    assert_same_path(found, plain_loop("galore_adamw_layerwise", max_norm=0.5, scheduled=False), start(), 1e-3)
    without = plain_loop("galore_adamw_layerwise", scheduled=False)
    assert any(fraction_apart(found[name], weight, start()[name]) > 0.01 for name, weight in without.items())


@pytest.mark.parametrize("optim", NAMES)
def test_accumulate_grad_batches(optim: str) -> None:
    assert_identical(ended(optim, accumulate_grad_batches=2), plain_loop(optim, accumulate=2))


class NothingHeld(program.FineTuning):  # type: ignore[name-defined]
    def configure_optimizers(self) -> Any:
        return make_optimizer(self.model, optim=self.optim, optim_args=ARGS)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"accumulate_grad_batches": 2},
            "A second gradient .* Make the optimizer with hold_gradients=True",
        ),
        ({"gradient_clip_val": 0.5}, "To clip, .* make the optimizer with hold_gradients=True"),
    ],
    ids=str,
)
def test_what_needs_held_gradients_says_so(options: dict[str, Any], words: str) -> None:
    with pytest.raises(RuntimeError, match=words):
        fitted("galore_adamw_layerwise", NothingHeld, **options)


def test_clipping_by_value_is_refused_where_there_are_low_rank_gradients() -> None:
    options: dict[str, Any] = {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}
    with pytest.raises(RuntimeError, match="clamp_ needs the gradient itself"):
        fitted("galore_adamw_layerwise", **options)
    fitted("galore_adamw", **options)


@pytest.mark.parametrize("optim", NAMES)
@pytest.mark.parametrize("options", [{}, {"gradient_clip_val": 0.5, "accumulate_grad_batches": 2}], ids=str)
def test_a_resumed_fit_is_the_uninterrupted_one(optim: str, options: dict[str, Any], tmp_path: Path) -> None:
    """After an epoch: in the middle of one Lightning itself begins the data anew."""
    whole = {"max_epochs": 2, "max_steps": -1, **options}
    optim_args = "rank=8, update_proj_gap=3, scale=1"  # with bases in 4 bits
    expected = ended(optim, optim_args=optim_args, **whole)
    half = program.FineTuning(program.tiny_classifier(), optim, optim_args)
    # The same schedule: Lightning's estimate of the steps is of two epochs in both.
    stopping = trainer(**whole, callbacks=[StopAfter(1)])
    stopping.fit(half, loader())
    stopping.save_checkpoint(tmp_path / "half.ckpt")
    assert any(not torch.equal(weight, expected[name]) for name, weight in snapshot(half.model).items())
    found = ended(
        optim, optim_args=optim_args, fit={"ckpt_path": tmp_path / "half.ckpt", "weights_only": True}, **whole
    )
    assert_identical(found, expected)


class StopAfter(Callback):
    """Stops after some epochs, as an interruption would."""

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        trainer.should_stop = trainer.current_epoch + 1 >= self.epochs


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
@pytest.mark.parametrize("options", [{}, {"gradient_clip_val": 0.5}], ids=str)
def test_bfloat16(precision: str, options: dict[str, Any]) -> None:
    """Layerwise is no further from plain than plain in bfloat16 is from float32."""
    exact = ended("galore_adamw", **options)
    plain, found = (ended(optim, precision=precision, **options) for optim in NAMES[:2])
    dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32
    assert {weight.dtype for weight in found.values()} == {dtype}
    assert all_apart(found, plain, start()) < all_apart(plain, exact, start()) < 0.15


def scaled(optim: str, kind: Any = None, **options: Any) -> dict[str, Tensor]:
    """With float16 and loss scaling, as "16-mixed" has it on a GPU; a CPU would take bfloat16 for that."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    return ended(optim, kind, plugins=[MixedPrecision("16-mixed", "cpu", scaler=scaler)], **options)


def test_loss_scaling() -> None:
    """Held gradients are unscaled; those that are used at once cannot be, and that is said."""
    exact, plain = ended("galore_adamw", gradient_clip_val=0.5), scaled("galore_adamw", gradient_clip_val=0.5)
    assert all_apart(plain, exact, start()) < 0.05
    assert all_apart(scaled("galore_adamw_layerwise", gradient_clip_val=0.5), exact, start()) < 0.1
    with pytest.raises(RuntimeError, match=r"To clip, unscale, .* make the optimizer with hold_gradients=True"):
        scaled("galore_adamw_layerwise", NothingHeld)


@pytest.mark.parametrize("optim", NAMES[:2])
def test_an_average_of_the_weights_is_that_of_the_plain_model(optim: str) -> None:
    """A deep copy of the module is averaged, and swapped in for each validation."""

    class Validated(program.FineTuning):  # type: ignore[name-defined]
        def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
            self.training_step(batch, index)

    module = Validated(program.tiny_classifier(), optim, ARGS)
    average = EMAWeightAveraging(decay=0.5)
    trainer(callbacks=[average], val_check_interval=3).fit(module, loader(), loader())
    averaged: dict[str, Tensor] = {}
    for steps in range(1, STEPS + 1):  # by hand
        weights = dict(plain_steps(optim)[steps - 1])
        averaged = {
            name: weight if steps == 1 else 0.5 * averaged[name] + 0.5 * weight for name, weight in weights.items()
        }
    assert_same_path(snapshot(module.model), averaged, start(), 1e-4)  # fit ends with the average


def plain_steps(optim: str) -> list[dict[str, Tensor]]:
    """The weights after each step of the plain loop."""
    model = program.tiny_classifier().train()
    optimizer = make_optimizer(model, optim=optim, optim_args=ARGS, lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=STEPS)
    found = []
    for inputs, labels in list(loader())[:STEPS]:
        cross_entropy(model(inputs), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        found.append(snapshot(model))
    return found


def test_a_second_fit_takes_the_hooks_over() -> None:
    """A module that is trained twice, each time by an optimizer of its own."""
    module = program.FineTuning(program.tiny_classifier(), "galore_adamw_layerwise", ARGS)
    seen = []

    class Looking(Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            seen.append(trainer.optimizers[0].hooks.attached)

    for _ in range(2):
        trainer(max_steps=2, callbacks=[Looking()]).fit(module, loader())
        assert hooks_on(module) == 0
    assert seen == [True] * 4


# ---- Fabric


@pytest.mark.parametrize(("accumulate", "max_norm"), [(1, None), (2, 0.5)])
@pytest.mark.parametrize("optim", NAMES)
def test_fabrics_loop_is_a_plain_one(optim: str, accumulate: int, max_norm: float | None) -> None:
    model = program.tiny_classifier().train()
    program.train_with_fabric(
        lightning.Fabric(accelerator="cpu"),
        model,
        list(loader())[: STEPS * accumulate],
        accumulate=accumulate,
        max_norm=max_norm,
        optim=optim,
        optim_args=ARGS,
    )
    assert hooks_on(model) == 0
    expected = plain_loop(optim, max_norm=max_norm, accumulate=accumulate, scheduled=False)
    assert_identical(snapshot(model), expected)


@pytest.mark.parametrize("optim", NAMES)
def test_fabric_saves_and_loads(optim: str, tmp_path: Path) -> None:
    fabric = lightning.Fabric(accelerator="cpu")
    batches = list(loader())

    def made() -> tuple[nn.Module, Any, Any]:
        model = program.tiny_classifier().train()
        optimizer = make_optimizer(model, optim=optim, optim_args="rank=8, update_proj_gap=3, scale=1", lr=1e-2)
        return (model, *fabric.setup(model, optimizer))

    def trained(prepared: Any, optimizer: Any, steps: list[Any]) -> None:
        for inputs, labels in steps:
            fabric.backward(cross_entropy(prepared(inputs), labels))
            optimizer.step()
            optimizer.zero_grad()

    whole, prepared, optimizer = made()
    trained(prepared, optimizer, batches[:8])
    _, prepared, optimizer = made()
    trained(prepared, optimizer, batches[:5])
    fabric.save(tmp_path / "half.ckpt", {"model": prepared, "optimizer": optimizer})
    resumed, prepared, optimizer = made()
    fabric.load(tmp_path / "half.ckpt", {"model": prepared, "optimizer": optimizer})
    trained(prepared, optimizer, batches[5:8])
    assert_identical(snapshot(resumed), snapshot(whole))
