"""Figures that a card should reach, recorded for whoever reads a run with `--junit-xml`: times, launches, plans.

On a CPU the same code runs small, and no figure is looked at.
"""

from __future__ import annotations

import statistics
from typing import Any

import pytest
import torch
from torch import nn
from transformers import TrainingArguments

pytest.importorskip("trl", reason="the benchmarks import what trains recipes")

import hf_galore
from hf_galore.integrations.devices import keep_to_one_gpu
from hf_galore.lowrank.projection import side_of
from hf_galore.lowrank.refresh import new_bases
from tests.benchmarks import gpu as benchmark
from tests.support.card import DEVICE, ON_CARD, RECIPE, seconds_of, sized

LAYERS = sized(8, 2)


@pytest.mark.parametrize("shape", benchmark.MATRICES)
def test_a_refresh_is_quick(shape: tuple[int, int], record_property: Any) -> None:
    """An SVD of the first takes a second."""
    gradient = torch.randn(shape, device=DEVICE).bfloat16()
    side = side_of(shape, "std")
    old = new_bases(gradient, side, benchmark.RANK, "subspace", None)
    found = benchmark.milliseconds(lambda: new_bases(gradient, side, benchmark.RANK, "subspace", old))
    record_property("refresh_ms", found)
    if ON_CARD:
        assert found < 30


def test_a_step_takes_less_time_than_adamw_8bits(record_property: Any) -> None:
    seconds: dict[str, list[float]] = {"adamw": [], "galore": []}
    trainings = {
        "adamw": benchmark.Training(LAYERS, benchmark.adamw_8bit),
        "galore": benchmark.Training(LAYERS, benchmark.galore(gap=benchmark.NEVER)),
    }
    for _ in range(sized(8, 2)):
        for name, training in trainings.items():
            seconds[name].append(seconds_of(training.step))
    steady = {name: times[sized(3, 0) :] for name, times in seconds.items()}
    ratio = statistics.median(a / b for a, b in zip(steady["galore"], steady["adamw"], strict=True))
    record_property("seconds", steady)
    record_property("ratio", ratio)
    record_property("tokens_per_second", benchmark.ROWS * benchmark.LENGTH / statistics.median(steady["galore"]))
    if ON_CARD:
        assert ratio < 1


def test_launches_of_a_layer(record_property: Any) -> None:
    """Beside those of the model: five for a target, two for a norm, and one or two that some operations take more."""
    found: dict[str, list[int]] = {}
    builds: dict[str, Any] = {
        "alone": lambda model: torch.optim.SGD([nn.Parameter(torch.zeros(1, device=DEVICE))]),
        "galore": benchmark.galore(gap=benchmark.NEVER),
    }
    for name, build in builds.items():
        for layers in (1, 3):
            training = benchmark.Training(layers, build)
            for _ in range(3):
                training.step()
            found.setdefault(name, []).append(benchmark.counted_kernels(training)[0])
            del training
            benchmark.freed()
    alone, galore = ((more - few) / 2 for few, more in found.values())
    record_property("launches", found)
    if ON_CARD:
        # 64 on an H200: 8 or 9 a matrix (a product of each gradient with norm probes), and 2 or 3 a norm's weight.
        assert galore - alone <= 7 * 9 + 2 * 3


def test_the_host_keeps_ahead_of_the_card(record_property: Any) -> None:
    """Above 1 the card waits for the host, and launches are what a step's time is."""
    training = benchmark.Training(LAYERS, benchmark.galore(gap=benchmark.NEVER))
    for _ in range(3):
        training.step()
    _, device_ms = benchmark.counted_kernels(training)
    narrow = benchmark.host_ms_a_layer(benchmark.galore(rank=sized(64, 16), gap=benchmark.NEVER), rounds=sized(5, 1))
    share = narrow * LAYERS / device_ms if device_ms else float("nan")
    record_property("host_ms_a_layer", narrow)
    record_property("host_over_device", share)
    if ON_CARD:
        assert share < 1


def test_a_plan_is_the_same_with_two_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = hf_galore.plan(RECIPE, layers=1).peak_bytes
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert hf_galore.plan(RECIPE, layers=1).peak_bytes == alone


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_with_two_gpus_a_command_trains_on_one() -> None:
    args = TrainingArguments(output_dir="unused", report_to="none")
    assert args.n_gpu > 1
    keep_to_one_gpu(args)
    assert args.n_gpu == 1
