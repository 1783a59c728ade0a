"""Int8 weights under each optimizer: all ways to train agree, and updates are those of floats, rounded at random.

In float64 the ways differ by so little that no code is another, however updates are rounded.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hf_galore.int8 import Int8Weight, add_int8_, is_int8, products, to_blocks
from hf_galore.optim import GaLoreAdafactor, GaLoreAdamW, GaLoreAdamW8bit
from tests.support.helpers import assert_identical
from tests.support.int8 import Net, as_int8, batch, codes_apart, net, snapshot, train, weight_of
from tests.support.reference import ReferenceGaLore

CLASSES = [GaLoreAdamW, GaLoreAdamW8bit, GaLoreAdafactor]
# For moments that are really in 8 bits.
WIDTHS = {GaLoreAdamW8bit: 96}
DTYPES = {GaLoreAdamW8bit: torch.float32}
LR = 3e-3


@pytest.fixture(autouse=True)
def tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several of a weight."""
    monkeypatch.setattr(products, "TILE_ELEMENTS", 1500)


def maker(cls: Any = GaLoreAdamW, group: dict[str, Any] | None = None, **options: Any) -> Callable[[Net], Any]:
    if cls is not GaLoreAdafactor:
        options = {"eps": 1e-4, **options}

    def make(model: Net) -> Any:
        rank = 24 if model.square.in_features == 96 else 8
        entries = {"rank": rank, "update_proj_gap": 3, "proj_bits": 16, **(group or {})}
        if "scaling" in entries:  # which keeps no basis
            del entries["proj_bits"]
        return cls(
            model.parameters(),
            **{"lr": LR, "weight_decay": 0.1, **options},
            module=model,
            param_options=dict.fromkeys(model.targets(), entries),
        )

    return make


def assert_moved(model: Net, start: dict[str, Tensor]) -> None:
    """Each weight: codes too, and most of them not at every step."""
    for name, value in snapshot(model).items():
        part = (value != start[name]).double().mean().item()
        assert part > 0.1, name
        assert part < 1 or not is_int8(model.get_parameter(name)), name


def assert_same(found: Net, expected: Net, tolerance: float = 1e-12) -> None:
    assert codes_apart(found, expected) == 0
    others = snapshot(expected)
    for name, value in snapshot(found).items():
        assert (value - others[name]).abs().max() <= tolerance, name


WAYS: dict[str, dict[str, Any]] = {
    "layerwise": {"layerwise": True, "projected_backward": False},
    "layerwise, held": {"layerwise": True, "projected_backward": False, "hold_gradients": True},
    "layerwise, projected": {"layerwise": True},
    "layerwise, projected, held": {"layerwise": True, "hold_gradients": True},
    "projected": {"projected_backward": True},
}


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_all_ways_agree(cls: Any) -> None:
    """With each optimizer, over several refreshes; and with micro-batches that add up to the batch."""
    width, dtype = WIDTHS.get(cls, 40), DTYPES.get(cls, torch.float64)
    plain = net(dtype, width=width)
    start = snapshot(plain)
    train(plain, maker(cls))
    assert_moved(plain, start)
    # In float32 a code of moments is another now and then.
    limit, tolerance = (0.0, 1e-12) if dtype == torch.float64 else (2e-3, 1e-4)
    for words, options in WAYS.items():
        model = net(dtype, width=width)
        train(model, maker(cls, **options))
        assert codes_apart(model, plain) <= limit, words
        if limit == 0:
            assert_same(model, plain, tolerance)
        if cls is GaLoreAdamW:  # windows do not know which optimizer it is
            accumulated = net(dtype, width=width)
            train(accumulated, maker(cls, **options), accumulation=2, same=True)
            assert codes_apart(accumulated, plain) <= limit, words
    accumulated = net(dtype, width=width)
    train(accumulated, maker(cls), accumulation=3)
    assert codes_apart(accumulated, plain) <= limit


@pytest.mark.parametrize("cls", [GaLoreAdamW, GaLoreAdafactor], ids=lambda cls: cls.__name__)
def test_all_ways_agree_clipped(cls: Any) -> None:
    """To a third of the norm; where R alone is held its norm is clipped, and probes estimate what the norm is."""
    plain, free = net(), net()
    train(plain, maker(cls), max_norm=0.05)
    train(free, maker(cls))
    assert not torch.equal(weight_of(plain.head).dequantized(), weight_of(free.head).dequantized())
    for words, options in WAYS.items():
        if options.get("hold_gradients") and "projected" not in words:
            model = net()
            train(model, maker(cls, **options), max_norm=0.05)
            assert_same(model, plain)
    held, projected = net(), net()
    train(held, maker(cls, layerwise=True, hold_gradients=True), max_norm=0.05)
    train(projected, maker(cls, projected_backward=True), max_norm=0.05)
    assert_same(held, projected)


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not reentrant"])
@pytest.mark.parametrize("way", WAYS)
def test_checkpointing_changes_nothing(way: str, use_reentrant: bool) -> None:
    def forward(model: Net, x: Tensor) -> Tensor:
        out: Tensor = checkpoint(model, x.requires_grad_(), use_reentrant=use_reentrant)
        return out

    found, expected = net(), net()
    train(found, maker(**WAYS[way]), steps=4, forward=forward)
    train(expected, maker(**WAYS[way]), steps=4)
    assert_same(found, expected)


OPTIONS: dict[str, dict[str, Any]] = {
    "left": {"proj_type": "left"},
    "right": {"proj_type": "right"},
    "full": {"proj_type": "full"},
    "svd": {"refresh": "svd"},
    "random": {"refresh": "random"},
    "rotate": {"moments": "rotate"},
    "reset": {"moments": "reset"},
    "bases of 4 bits": {"proj_bits": 4},
    "fira": {"residual": "fira"},
    "sign": {"residual": "sign"},
    "channels": {"scaling": "channel"},
    "one scale": {"scaling": "tensor", "rank": 1},
    "muon": {"rule": "muon"},
    "lion": {"rule": "lion"},
    "lazy": {"lazy_refresh": True},
    "full-rank": {"rank": 40},
}


@pytest.mark.parametrize("words", OPTIONS)
def test_options(words: str) -> None:
    """Layerwise as plain, and each step as floats of the same values would go, but for one code."""
    group = OPTIONS[words]
    plain, layerwise = net(), net()
    starts: list[dict[str, Tensor]] = []
    train(plain, maker(group=group), steps=5)
    train(layerwise, maker(group=group, layerwise=True), steps=5, each_step=lambda *_: starts.append({}))
    if words == "bases of 4 bits":
        assert codes_apart(plain, layerwise) < 2e-2  # a code of a basis is another where it is due to rounding
    else:
        assert_same(layerwise, plain, 1e-9)
    one, floats = net(), net(int8=False)
    for model in (one, floats):
        train(model, maker(group=group, lr=0.03), steps=1)
    for name, param in one.named_parameters():
        expected = floats.get_parameter(name).detach()
        if is_int8(param):
            assert_neighbours(param, expected)
        else:
            assert torch.allclose(param, expected, rtol=0, atol=1e-12)


# ---- against floats


def steps_of(values: Tensor) -> Tensor:
    """The distance between neighbours that 8 bits have, of the blocks of these values: by their largest."""
    exponents = to_blocks(values).exponents
    powers = 2.0 ** (exponents.double() - 127)
    return powers.repeat_interleave(32, dim=-1)[..., : values.shape[-1]]


def assert_neighbours(found: Tensor, expected: Tensor) -> None:
    """Each element is one of the two on either side of it."""
    assert isinstance(found, Int8Weight)
    apart = (found.dequantized(torch.float64) - expected).abs()
    assert (apart < steps_of(expected) * (1 + 1e-9)).all()


def test_an_update_is_that_of_the_paper_rounded_at_random() -> None:
    """One of the two beside what it is in float64, and that on average: 5 standard errors over 100 seeds.

    With decay, of weights that are projected from either side.
    """
    for name in ("up", "down"):
        model = net(torch.float64)
        found: list[Tensor] = []
        start = getattr(model, name).weight.dequantized()
        generator = torch.Generator().manual_seed(5)
        gradient = torch.randn(start.shape, generator=generator, dtype=torch.float64)
        reference = ReferenceGaLore(
            start.numpy(), rank=8, gap=3, scale=0.5, proj_type="std", lr=0.01, betas=(0.9, 0.999), eps=1e-8,
            weight_decay=0.3,
        )  # fmt: skip
        reference.step(gradient.numpy())
        expected = torch.from_numpy(reference.W)
        for seed in range(100):
            weight = nn.Parameter(Int8Weight.from_float(start))
            group = {"params": [weight], "rank": 8, "scale": 0.5, "refresh": "svd", "rounding_seed": seed}
            optimizer = GaLoreAdamW([group | {"proj_bits": 16}], lr=0.01, weight_decay=0.3)
            weight.grad = gradient.clone()
            optimizer.step()
            assert_neighbours(weight, expected)
            found.append(as_int8(weight).dequantized())
        assert_right_on_average(torch.stack(found), expected)
        assert 0.01 < (found[0] != start).double().mean() < 0.99


def assert_right_on_average(found: Tensor, expected: Tensor) -> None:
    """To 5 standard errors each element, and together."""
    step = steps_of(expected)
    fraction = (expected / step) % 1
    errors = step * (fraction * (1 - fraction) / len(found)).sqrt()
    off = (found.mean(0) - expected) / errors.clamp_min(1e-3 * step)
    assert off.abs().max() < 5
    assert abs(off.sum().item()) / off.numel() ** 0.5 < 5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_decay_and_updates_far_below_a_step(dtype: torch.dtype) -> None:
    """A thousandth of a step, which to the nearest would be lost: 1,000 of them, each with its own noise."""
    start = torch.linspace(-1, 1, 64, dtype=torch.float64).repeat(4, 1)
    weight = Int8Weight.from_float(start, dtype)
    start = weight.dequantized(torch.float64)
    step = steps_of(start)[0, 0].item()
    update = torch.full((4, 64), 1e-3 * step, dtype=dtype)
    generator = torch.Generator().manual_seed(3)
    for _ in range(1000):
        add_int8_(weight, lambda rows: update[rows], alpha=-1.0, decay=1 - 1e-4, generator=generator)
    expected = start.clone()
    for _ in range(1000):
        expected = expected * (1 - 1e-4) - update.double()
    moved = (weight.dequantized(torch.float64) - start).mean(0)
    # Each element has taken steps at random: 1,000 of about a hundredth of a step's variance, four times over.
    tolerance = 5 * step * (1000 * 0.25 * 0.04 / 4) ** 0.5
    assert (moved - (expected - start)[0]).abs().max() < tolerance
    assert (moved - (expected - start)[0]).mean().abs() < tolerance / 8
    nearest = Int8Weight.from_float(start, dtype)
    for _ in range(100):
        add_int8_(nearest, lambda rows: update[rows], alpha=-1.0, decay=1 - 1e-4)
    assert torch.equal(nearest.dequantized(torch.float64), start)


def test_decay_alone() -> None:
    """Of a gradient that is zero: W(1 − ηλ), on average, of targets and of full-rank weights alike."""
    found: dict[str, list[Tensor]] = {}
    start = snapshot(net())
    for seed in range(40):
        model = net()
        optimizer = maker(group={"rounding_seed": seed}, lr=0.01, weight_decay=0.5)(model)
        for group in optimizer.param_groups:
            group["rounding_seed"] = seed
        for param in model.parameters():
            param.grad = torch.zeros_like(param)
        optimizer.step()
        for name, value in snapshot(model).items():
            found.setdefault(name, []).append(value)
    for name, values in found.items():
        expected = start[name] * (1 - 0.005)
        if is_int8(model.get_parameter(name)):
            assert_right_on_average(torch.stack(values), expected)
        else:
            assert torch.allclose(values[0], expected, rtol=1e-12)


@pytest.mark.parametrize("seeds", [(0, 0), (0, 1)], ids=["same", "other"])
def test_the_seed_says_the_rounding(seeds: tuple[int, int]) -> None:
    ends = []
    for seed in seeds:
        model = net(torch.bfloat16)
        torch.manual_seed(seed)
        optimizer = train(model, maker())
        ends.append(snapshot(model))
        assert {group["rounding_seed"] for group in optimizer.param_groups} == {seed}
    same = all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())
    assert same == (seeds[0] == seeds[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_outer_dtypes(dtype: torch.dtype) -> None:
    """Of activations and gradients: the loss goes the way that it does in float64."""
    losses = {}
    for outer in (torch.float64, dtype):
        model = net(outer)
        train(model, maker(layerwise=True), steps=30)
        with torch.no_grad():
            x, y = batch(0, outer)
            losses[outer] = nn.functional.mse_loss(model(x).double(), y.double()).item()
    untrained = net()
    with torch.no_grad():
        x, y = batch(0, torch.float64)
        before = nn.functional.mse_loss(untrained(x), y).item()
    assert losses[torch.float64] < 0.7 * before
    assert abs(losses[dtype] / losses[torch.float64] - 1) < 0.1


# ---- what happens beside updates


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("layerwise", [False, True], ids=["plain", "layerwise"])
def test_a_step_that_is_not_finite_leaves_codes_alone(layerwise: bool, bad: float) -> None:
    model = net()
    start: dict[str, Tensor] = {}
    rows = batch(0, torch.float64)[0]
    optimizer = maker(layerwise=layerwise)(model)
    for step in range(5):
        if step == 3:
            start = copy.deepcopy({name: p.detach() for name, p in model.named_parameters()})
        loss = model(rows).square().mean() * (bad if step == 3 else 1.0)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == 3:
            for name, param in model.named_parameters():
                if isinstance(param, Int8Weight):
                    before = as_int8(start[name])
                    assert torch.equal(param.codes, before.codes), name
                    assert torch.equal(param.exponents, before.exponents), name
                else:
                    assert torch.equal(param, start[name])
    assert all(value.isfinite().all() for value in snapshot(model).values())
    assert codes_apart(model, net()) > 0.05
    assert len(optimizer.skipped_updates()) == len(list(model.parameters()))


@pytest.mark.parametrize("group", [{}, {"residual": "fira"}, {"scaling": "channel"}], ids=str)
@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_resumed_is_uninterrupted(cls: Any, group: dict[str, Any]) -> None:
    """From a checkpoint in bfloat16, as any model's: bit for bit, codes too."""
    width = WIDTHS.get(cls, 40)
    options: dict[str, Any] = {"layerwise": True}
    whole = net(torch.bfloat16, width=width)
    first = train(whole, maker(cls, group, **options), steps=4)
    weights = snapshot(whole)
    assert all(type(value) is Tensor and value.dtype == torch.bfloat16 for value in weights.values())
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)

    def make_resumed(model: Net) -> Any:
        torch.manual_seed(17)  # the seed of the rounding is in the checkpoint
        optimizer = maker(cls, group, **options)(model)
        optimizer.load_state_dict(state)
        return optimizer

    uninterrupted = net(torch.bfloat16, width=width)
    train(uninterrupted, maker(cls, group, **options), steps=8)
    resumed = net(torch.bfloat16, width=width, seed=9)
    resumed.load_state_dict(weights)
    train(resumed, make_resumed, steps=4, start=4)
    assert_identical(snapshot(resumed), snapshot(uninterrupted))
    for name, param in resumed.named_parameters():
        if isinstance(param, Int8Weight):
            assert torch.equal(param.exponents, as_int8(uninterrupted.get_parameter(name)).exponents)


def test_frozen_weights_stay() -> None:
    """And their inputs have gradients; thawed they train."""
    model, floats = net(), net(int8=False)
    for each in (model, floats):
        each.down.weight.requires_grad_(False)
    before = weight_of(model.down).dequantized()
    gradients: list[Tensor] = []
    for each in (model, floats):
        optimizer = maker(layerwise=True)(each)
        x = batch(0, torch.float64)[0].requires_grad_()
        each(x).square().sum().backward()
        assert x.grad is not None
        gradients.append(x.grad)
        optimizer.step()
        optimizer.zero_grad()
        optimizer.close()
    assert torch.allclose(gradients[0], gradients[1], rtol=1e-9)
    assert torch.equal(weight_of(model.down).dequantized(), before)
    model.down.weight.requires_grad_(True)
    train(model, maker(layerwise=True), steps=2)
    assert not torch.equal(weight_of(model.down).dequantized(), before)


def test_a_schedule_and_groups_of_ones_own() -> None:
    """Rates are read at each step: at a rate of 0 no code moves, and in one group more than in the other."""
    model = net()
    start = snapshot(model)
    groups: list[dict[str, Any]] = [
        {"params": [model.up.weight], "rank": 8, "lr": 0.0},
        {"params": [model.down.weight], "rank": 8},
        {"params": [model.head.weight, model.square.weight]},
    ]
    optimizer = GaLoreAdamW(groups, lr=1e-2, module=model, layerwise=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: float(step < 2))
    for step in range(4):
        x, y = batch(step, torch.float64)
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step == 1:
            middle = snapshot(model)
    optimizer.close()
    assert torch.equal(middle["up.weight"], start["up.weight"])
    for name in ("down.weight", "head.weight", "square.weight"):
        assert (middle[name] != start[name]).double().mean() > 0.1
    assert_identical(snapshot(model), middle)


def test_its_options_are_single_parameters_too() -> None:
    model, other = net(), net()
    train(model, maker())
    groups = [
        {"params": [p for p in other.parameters() if not any(p is t for t in other.targets())]},
        {"params": other.targets(), "rank": 8, "update_proj_gap": 3, "proj_bits": 16},
    ]
    # Rounding follows from the place among all parameters, which is another here: so all but that is the same.
    optimizer = GaLoreAdamW(groups, lr=LR, weight_decay=0.1, eps=1e-4)
    x, y = batch(0, torch.float64)
    nn.functional.mse_loss(other(x), y).backward()
    optimizer.step()
    one, floats = net(), net(int8=False)
    train(floats, maker(), steps=1)
    train(one, maker(), steps=1)
    for name, param in other.named_parameters():
        if is_int8(param):
            assert_neighbours(param, floats.get_parameter(name).detach())


# ---- in a Trainer


@pytest.fixture
def tiny(tmp_path: Any) -> Any:
    from tests.support.helpers import make_trainer, tiny_llama
    from tests.support.int8 import in_8_bits

    def make(name: str, **overrides: Any) -> Any:
        model = in_8_bits(tiny_llama(), but=["lm_head"])
        return make_trainer(model, tmp_path, name, **overrides)

    return make


@pytest.mark.parametrize("name", ["galore_adamw", "galore_adamw_8bit", "galore_adafactor"])
def test_layerwise_is_plain_in_a_trainer(name: str, tiny: Any) -> None:
    """With checkpointing, accumulation of what is held and clipping of neither."""
    ends = []
    for optim in (name, f"{name}_layerwise"):
        trainer = tiny(optim, max_steps=4, optim_args="rank=16, update_proj_gap=3, scale=0.5, proj_bits=16, "
                       "projected_backward=false", gradient_checkpointing=True)  # fmt: skip
        start = snapshot(trainer.model)
        trainer.train()
        ends.append(snapshot(trainer.model))
    assert_identical(ends[0], ends[1])
    assert sum(not torch.equal(value, start[key]) for key, value in ends[0].items()) == len(start)


def test_dequantised_twin_reaches_the_same_loss(tiny: Any) -> None:
    """Int8 and float weights of the same values: losses of eight steps within 2 %."""
    from tests.support.helpers import logged, make_trainer, tiny_llama

    trainer = tiny("galore_adamw_layerwise", max_steps=8, learning_rate=3e-3)
    floats = tiny_llama()
    floats.load_state_dict(trainer.model.state_dict())
    twin = make_trainer(floats, trainer.args.output_dir, "galore_adamw_layerwise", max_steps=8, learning_rate=3e-3)
    losses = []
    for each in (trainer, twin):
        each.train()
        losses.append(torch.tensor(logged(each, "loss")))
    assert abs(losses[0][0] / losses[1][0] - 1) < 1e-5
    assert losses[0][-1] < losses[0][0]
    assert (losses[0] / losses[1] - 1).abs().max() < 0.02
