"""Kernels that are written in Triton do nothing in a plan, whoever launches them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hf_galore.integrations.triton_launches import LAUNCHERS, without_launches
from hf_galore.plan import planner
from hf_galore.plan.fakes import fake_training
from tests.support.planning import sft

triton: Any = pytest.importorskip("triton")
tl: Any = pytest.importorskip("triton.language")


def _add_one(x_ptr, n, BLOCK: tl.constexpr) -> None:  # type: ignore[no-untyped-def]  # noqa: N803
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x_ptr + at, tl.load(x_ptr + at, mask=at < n) + 1, mask=at < n)


KERNEL = triton.jit(_add_one)
TUNED = triton.autotune([triton.Config({"BLOCK": 16})], key=["n"])(KERNEL)


def launch(x: torch.Tensor) -> None:
    """By both of the ways that libraries have."""
    KERNEL[(1,)](x, x.numel(), BLOCK=16)
    TUNED[(1,)](x, x.numel())


def test_triton_is_as_we_need_it() -> None:
    """Where this fails, launches go another way, and a plan on a card would launch kernels on addresses of nothing."""
    for module, name in LAUNCHERS:
        launcher = getattr(pytest.importorskip(module), name)
        assert "run" in vars(launcher)
    assert isinstance(KERNEL, tuple(getattr(pytest.importorskip(module), name) for module, name in LAUNCHERS))


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a card they are launched")
def test_within_they_do_nothing_and_then_they_are_launched_again() -> None:
    x = torch.zeros(8)
    with without_launches():
        launch(x)
        with without_launches():
            launch(x)
        launch(x)
    assert not x.any()
    with pytest.raises(RuntimeError, match="driver"):
        launch(x)


@pytest.mark.parametrize("target", ["cuda", "cpu"])
def test_a_plan_launches_none(target: Any) -> None:
    with fake_training(target):
        launch(torch.zeros(8))


def test_ligers_kernels_can_be_planned(tmp_path: Path) -> None:
    """A layer's kernels keep less for the backward pass than transformers' own. (Not in the test requirements.)"""
    pytest.importorskip("liger_kernel")
    plans = [
        planner.plan(sft(tmp_path, "galore_adamw_8bit_layerwise", use_liger_kernel=used), target="cpu")
        for used in (True, False)
    ]
    assert plans[0].phase_peaks["forward"] < plans[1].phase_peaks["forward"]
