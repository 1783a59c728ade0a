"""Low-rank gradients that are held in 8 bits: what is linear acts on them, and what is refused is refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import GradientState
from torch import Tensor, nn

from hf_galore import GaLoreAdamW, GaLoreAdamW8bit, make_optimizer
from hf_galore.backward.gradient import LowRankGradient
from hf_galore.backward.held import Held8bit
from hf_galore.lowrank.float8 import Dither, to_float8
from hf_galore.lowrank.projection import norm_of
from hf_galore.optim.optimizer import GaLoreOptimizer
from hf_galore.recipes.checks import galore_config
from tests.backward.test_gradient import (
    ALIASES,
    BUFFERS,
    LINEAR,
    NORMS,
    OTHER,
    PARAM,
    RANK,
    REFUSED,
    SHAPE,
    VERSION,
    G,
    project,
)
from tests.support.helpers import (
    LAYERWISE,
    OPTIM_ARGS,
    Counting,
    arguments,
    make_trainer,
    snapshot,
    target_of,
    tiny_llama,
    train,
)


def in_8_bits(gradient: Tensor, *, whole: bool = False) -> LowRankGradient:
    """A low-rank gradient as it is held. (These are too small for 8 bits, were they held by a window.)"""
    held = Held8bit(to_float8(project(gradient)), torch.float32, Dither(3))
    return LowRankGradient(PARAM, held, VERSION, norm=norm_of(gradient) if whole else None)


def as_it_is(gradient: LowRankGradient) -> LowRankGradient:
    """The same in no bits: what a gradient in 8 bits has been rounded to."""
    return LowRankGradient(PARAM, gradient.low_rank, VERSION, norm=gradient.norm_of_whole)


ADDING = ("add", "sub", "+=")


@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("other", ["low-rank", "held", "gradient"])
def test_what_is_linear_acts_as_on_an_exact_one(name: str, whole: bool, other: str) -> None:
    """Multiples are exact, sums are rounded: by no more than an eighth of each element."""
    gradient, second = in_8_bits(G, whole=whole), in_8_bits(OTHER, whole=whole)
    exact = {"low-rank": as_it_is(second), "held": as_it_is(second), "gradient": OTHER.clone()}[other]
    given = {"low-rank": as_it_is(second), "held": second, "gradient": OTHER.clone()}[other]
    expected = LINEAR[name](as_it_is(gradient), exact)
    found = LINEAR[name](gradient, given)
    if not isinstance(found, LowRankGradient):
        assert other == "gradient"
        torch.testing.assert_close(found, expected)
        return
    sums = any(word in name for word in ADDING) and "zero_" not in name
    rounded = sums or (name == "copy_" and other == "gradient")
    error = (found.low_rank - expected.low_rank).abs()
    allowed = expected.low_rank.abs() * (1 / 8 if rounded else 1e-6)
    assert (error <= allowed + 1e-4 * expected.low_rank.abs().max() * rounded).all()
    torch.testing.assert_close(found.norm(), expected.norm(), rtol=0.1 if rounded else 1e-6, atol=0)
    assert found.is_zero == expected.is_zero


@pytest.mark.parametrize("name", NORMS)
def test_norms_are_of_the_gradient_where_it_is_known(name: str) -> None:
    torch.testing.assert_close(NORMS[name](in_8_bits(G, whole=True)), norm_of(G))
    gradient = in_8_bits(G)
    torch.testing.assert_close(NORMS[name](gradient), norm_of(gradient.low_rank))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("how", ["held", "added", "multiplied", "added whole"])
def test_what_is_not_finite_stays_so(bad: float, how: str) -> None:
    """Codes have no infinity."""
    spoilt = G.clone()
    spoilt[0, 0] = bad
    gradient = in_8_bits(spoilt if how == "held" else G)
    if how != "held":
        assert torch.isfinite(gradient).all()
        assert not gradient.isnan().any()
    if how.startswith("added"):
        gradient.add_(spoilt if how == "added whole" else as_it_is(in_8_bits(spoilt)))
    elif how == "multiplied":
        gradient.mul_(bad)
    assert not torch.isfinite(gradient).all()
    assert torch.isinf(gradient).any() or gradient.isnan().any()
    assert not gradient.norm().isfinite()
    assert not gradient.low_rank.isfinite().all()
    for back in (gradient.clone(), gradient * 0.5, gradient.add_(as_it_is(in_8_bits(OTHER)))):
        assert not back.norm().isfinite()
    gradient.zero_()
    assert gradient.norm() == 0


@pytest.mark.parametrize("bad", [False, True])
def test_a_scaler_unscales_them(bad: bool) -> None:
    gradient = in_8_bits(G * (math.inf if bad else 8.0), whole=not bad)
    expected = gradient.low_rank / 8
    found_inf = torch.zeros(1)
    torch._amp_foreach_non_finite_check_and_unscale_([gradient, G.clone()], found_inf, torch.tensor(0.125))
    assert bool(found_inf) == bad
    if not bad:
        torch.testing.assert_close(gradient.low_rank, expected)
        torch.testing.assert_close(gradient.norm(), norm_of(G))


@pytest.mark.parametrize("name", REFUSED)
def test_what_needs_the_gradient_itself_is_refused(name: str) -> None:
    gradient: Any = in_8_bits(G)
    before = gradient.low_rank
    with pytest.raises((RuntimeError, TypeError)) as caught:
        REFUSED[name](gradient)
    if name not in ("numpy", "tolist", "save"):
        assert f"layer.weight.grad is a low-rank gradient, ({RANK}, {SHAPE[1]}) in place of" in str(caught.value)
    assert torch.equal(gradient.low_rank, before)


def test_it_says_what_is_in_memory() -> None:
    gradient = in_8_bits(G)
    assert gradient.nbytes == RANK * SHAPE[1] + 4
    assert repr(gradient) == "LowRankGradient(shape=(12, 8), dtype=torch.float32, holding (3, 8), (1,))"


@pytest.mark.parametrize("name", ALIASES)
def test_an_alias_is_the_gradient(name: str) -> None:
    gradient = in_8_bits(G)
    before = gradient.low_rank
    ALIASES[name](gradient).mul_(0.5)
    torch.testing.assert_close(gradient.low_rank, before / 2)
    ALIASES[name](gradient).zero_()
    assert gradient.is_zero
    assert gradient.norm() == 0


@pytest.mark.parametrize("name", BUFFERS)
def test_a_buffer_of_ones_own_is_not_the_gradient(name: str) -> None:
    gradient = in_8_bits(G)
    before = gradient.low_rank
    buffer = BUFFERS[name](gradient)
    assert torch.equal(buffer.low_rank, before)
    buffer.mul_(0.1)
    buffer.zero_()
    assert torch.equal(gradient.low_rank, before)
    assert not gradient.is_zero


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_in_another_dtype(dtype: torch.dtype) -> None:
    gradient = in_8_bits(G)
    cast = gradient.to(dtype)
    assert isinstance(cast, LowRankGradient)
    assert cast.dtype == cast.low_rank.dtype == dtype
    torch.testing.assert_close(cast.low_rank.float(), gradient.low_rank, rtol=2**-8, atol=0)


# ---- windows

BITS = f"{OPTIM_ARGS}, gradient_bits=8"


def held_by(trainer_or_optimizer: Any) -> dict[torch.dtype, int]:
    """The bytes that hold low-rank gradients, by dtype."""
    optimizer = trainer_or_optimizer
    assert isinstance(optimizer, GaLoreOptimizer)
    assert optimizer.hooks is not None
    found: dict[torch.dtype, int] = {}
    for tensor in optimizer.hooks.held():
        found[tensor.dtype] = found.get(tensor.dtype, 0) + tensor.nbytes
    return found


@pytest.mark.parametrize("name", ["galore_adamw_layerwise", "galore_adamw_8bit_layerwise", "galore_adamw"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_window_holds(name: str, dtype: torch.dtype) -> None:
    """Of 14 targets the 6 of the MLP have 4,096 elements and more; the others are too small."""
    model = tiny_llama().to(dtype)
    optim_args = BITS if name.endswith("layerwise") else f"{BITS}, projected_backward=true"
    optimizer = make_optimizer(model, ["attn", "mlp"], optim=name, optim_args=optim_args, lr=1e-3, hold_gradients=True)
    rows = torch.stack([Counting()[i]["input_ids"] for i in range(4)])
    columns = 16 + 8  # the rank, and norm probes
    small, codes = 8 * columns * 64 * dtype.itemsize, 6 * columns * 256
    scales = codes // 256 * 4
    expected = {torch.float8_e4m3fn: codes, torch.float32: scales}
    expected[dtype] = expected.get(dtype, 0) + small
    weights = [layer.mlp.up_proj.weight for layer in model.model.layers]
    for _ in range(3):
        model(input_ids=rows, labels=rows).loss.backward()
        assert held_by(optimizer) == expected
        # What autograd adds is added in 8 bits, in place: another sum rounds otherwise.
        assert all(isinstance(weight.grad.kept, Held8bit) for weight in weights)
    assert [weight.grad.kept._dither._count for weight in weights] == [2, 2]
    optimizer.clip_grad_norm_(1e-3)
    assert held_by(optimizer) == expected
    optimizer.step()
    optimizer.zero_grad()
    assert held_by(optimizer) == {}


def test_what_is_used_at_once_is_as_if_there_were_no_such_option(tmp_path: Path) -> None:
    ends = []
    for optim_args in (OPTIM_ARGS, BITS):
        trainer = train(tiny_llama(), tmp_path, "galore_adamw_layerwise", optim_args=optim_args)
        ends.append(snapshot(trainer.model))
    for name, weight in ends[0].items():
        assert torch.equal(ends[1][name], weight), name


@pytest.mark.parametrize("name", LAYERWISE)
@pytest.mark.parametrize(("parts", "most"), [(4, 0.06), (32, 0.12)])
def test_sums_of_a_window_are_near_those_of_whole_numbers(name: str, parts: int, most: float) -> None:
    """Off by some hundredths, by more where micro-batches cancel; and not off in one direction."""

    def window(optim_args: str) -> dict[str, Tensor]:
        model = tiny_llama()
        optimizer = make_optimizer(model, ["mlp"], optim=name, optim_args=optim_args, lr=1e-3, hold_gradients=True)
        data = Counting(64)
        for part in range(parts):
            rows = torch.stack([data[(2 * part + i) % 64]["input_ids"] for i in range(2)])
            (model(input_ids=rows, labels=rows).loss / parts).backward()
        targets = [(n, p) for n, p in model.named_parameters() if "mlp" in n]
        assert len(optimizer.targets()) == len(targets)
        return {n: p.grad.low_rank for n, p in targets}

    exact, found = window(OPTIM_ARGS), window(BITS)
    for key, expected in exact.items():
        error = found[key] - expected
        assert 0.01 < error.norm() / expected.norm() < most, key
        along = (found[key] * expected).sum() / expected.square().sum()
        assert abs(along - 1) < 0.03, key  # some dozen large elements make the sum, each off by a few hundredths


def test_sums_repeat_and_differ_by_seed_target_and_step() -> None:
    """What is added is the same each time: the thresholds alone differ."""

    def sums(seed: int, index: int = 0, steps: int = 0) -> Tensor:
        weights = [nn.Linear(64, 256, bias=False) for _ in range(2)]
        model = nn.ModuleList(weights)
        torch.manual_seed(seed)  # which the optimizer takes its own from
        optimizer = make_optimizer(
            model,
            "all-linear",
            optim="galore_adamw_layerwise",
            optim_args={"rank": 16, "gradient_bits": 8, "refresh": "svd"},
            lr=1e-9,
            hold_gradients=True,
        )
        assert [group["gradient_seed"] for group in optimizer.param_groups if "rank" in group] == [seed]
        generator = torch.Generator().manual_seed(0)
        first, more = (torch.randn(32, 64, generator=generator) for _ in range(2))
        towards = torch.randn(256, generator=generator)
        for _ in range(steps + 1):
            optimizer.zero_grad()
            for rows in (first, more, more):
                nn.functional.linear(rows, weights[index].weight).matmul(towards).sum().backward()
            gradient = weights[index].weight.grad
            assert isinstance(gradient, LowRankGradient)
            found = gradient.low_rank[:, :16]  # norm probes differ by target
            optimizer.step()
        return found

    once = sums(1)
    assert torch.equal(sums(1), once)
    for other in (sums(2), sums(1, index=1), sums(1, steps=1)):
        apart = ((other - once).norm() / once.norm()).item()
        assert 0.005 < apart < 0.1


# ---- what is refused


@pytest.mark.parametrize("cls", [GaLoreAdamW, GaLoreAdamW8bit])
def test_where_nothing_is_held_it_is_refused(cls: type[Any], tmp_path: Path) -> None:
    model = tiny_llama()
    weight = model.model.layers[0].mlp.up_proj.weight
    group = {"params": [weight], "rank": 16, "gradient_bits": 8}
    with pytest.raises(ValueError, match=r"gradient_bits=8 is for low-rank gradients that are held.*layerwise=True"):
        cls([group])
    optimizer = cls([{"params": [model.lm_head.weight]}])
    with pytest.raises(ValueError, match="gradient_bits=8 is for"):
        optimizer.add_param_group(group)
    assert len(optimizer.param_groups) == 1
    hooked = cls([group], module=model, layerwise=True)
    assert target_of(hooked, weight).group["gradient_bits"] == 8
    cls([{**group, "gradient_bits": 16}])
    with pytest.raises(ValueError, match=r"gradient_bits=8 is for.*projected_backward=true in optim_args"):
        train(model, tmp_path, "galore_adamw", optim_args=BITS)
    # By recipes before the model is loaded, with what is left to type again.
    with pytest.raises(ValueError, match=r'gradient_bits=8 is for.* Without it: --optim_args "rank=\d+[^"]*"\.$'):
        galore_config(arguments(tmp_path, "galore_adamw", optim_args=BITS))
    for name, optim_args in (("galore_adamw_layerwise", BITS), ("galore_adamw", f"{BITS}, projected_backward=true")):
        config = galore_config(arguments(tmp_path, name, optim_args=optim_args))
        assert config is not None
        assert config.gradient_bits == 8


def test_a_checkpoint_without_the_option_has_16() -> None:
    def optimizer(**options: Any) -> GaLoreAdamW:
        torch.manual_seed(0)
        net = nn.Linear(64, 256)
        options = {"rank": 16, **options}
        return GaLoreAdamW(net.parameters(), param_options={net.weight: options}, module=net, layerwise=True)

    saved = optimizer().state_dict()
    for group in saved["param_groups"]:
        group.pop("gradient_bits", None)
    loaded = optimizer()
    loaded.load_state_dict(saved)
    (target,) = loaded.targets()
    rows = torch.randn(8, 64)
    GradientState()._set_sync_gradients(False)
    try:
        nn.functional.linear(rows, target.param).square().sum().backward()
        assert target.param.grad.low_rank.dtype == torch.float32  # type: ignore[union-attr]
        assert held_by(loaded) == {torch.float32: 256 * (16 + 8) * 4}  # with norm probes, which it has none of either
    finally:
        GradientState()._set_sync_gradients(True)
    with pytest.raises(ValueError, match=r"gradient_bits=16.*gradient_bits=8"):
        optimizer(gradient_bits=8).load_state_dict(saved)
    assert "gradient_seed" not in saved["param_groups"][0]


def test_arguments_are_read(tmp_path: Path) -> None:
    args = arguments(tmp_path, "galore_adamw_layerwise", optim_args="rank=4, gradient_bits=4")
    with pytest.raises(ValueError, match="gradient_bits has to be one of 16, 8, but was given 4"):
        make_trainer(tiny_llama(), tmp_path, "galore_adamw_layerwise", optim_args=args.optim_args).train()
