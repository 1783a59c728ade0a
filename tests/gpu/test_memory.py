"""The 7B recipe under the memory of a card of 24 GB, beside its plan. Each run has a process to itself."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import subprocess
import sys
from typing import Any

import pytest

pytest.importorskip("trl", reason="the recipes are for TRL")

import hf_galore
from hf_galore import MemoryPlan
from hf_galore.bench.jobs import WARM_UP, Job, Measured
from hf_galore.bench.processes import run
from hf_galore.expandable_segments import SETTING, VARIABLE
from tests.support.card import CAP, ON_CARD, RECIPE, ROOT, sized

LAYERS = int(os.environ.get("HF_GALORE_CARD_LAYERS", sized("32", "2")))
STEPS = 4
TRAINING = ("forward", "backward", "update")
# For each of two threads cuBLAS takes 32 MiB on cards of compute capability 9 and 10; a plan counts 8, as on others.
LARGER_WORK_SPACES = 48 * 2**20

SITUATIONS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "clipped": {"max_grad_norm": 1},
    "accumulated": {"gradient_accumulation_steps": 4},
    "accumulated parts": {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 4},
}


def words(overrides: dict[str, Any]) -> list[str]:
    return [word for key, value in overrides.items() for word in (f"--{key}", str(value))]


def trained(overrides: dict[str, Any]) -> Measured:
    """What a run of four steps, with random weights, had to give."""
    job = Job(
        task="train",
        arguments=("--config", str(RECIPE), *words(overrides)),
        layers=LAYERS,
        steps=STEPS - WARM_UP,
        small=not ON_CARD,
        limit_bytes=int(CAP),
    )
    found = run(job)
    assert isinstance(found, Measured), found
    return found


def planned(overrides: dict[str, Any]) -> MemoryPlan:
    return hf_galore.plan(RECIPE, overrides=words(overrides), layers=LAYERS)


def peak_of_training(plan: MemoryPlan) -> int:
    """Without evaluations, of which there are none here."""
    return max(plan.phase_peaks[phase] for phase in TRAINING)


@pytest.mark.parametrize("situation", SITUATIONS)
def test_a_recipe_takes_what_its_plan_says(
    situation: str, record_property: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, SETTING)
    overrides = SITUATIONS[situation]
    plan, found = planned(overrides), trained(overrides)
    say(situation, plan, found, record_property)
    assert len(found.seconds) == len(found.losses) == STEPS
    assert all(loss < 20 for loss in found.losses)
    assert not [message for message in found.warnings if "plain torch is used" in message]
    if ON_CARD:
        assert found.allocated == pytest.approx(peak_of_training(plan), rel=0.03)
        assert found.reserved is not None
        assert found.reserved <= plan.expandable_bytes + LARGER_WORK_SPACES
        assert found.seconds[0] < 60


def test_without_expandable_segments_it_still_fits(record_property: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "expandable_segments:False")
    plan, found = planned({}), trained({})
    say("without expandable segments", plan, found, record_property)
    if ON_CARD:
        assert found.reserved is not None
        assert found.reserved <= plan.segmented_bytes + LARGER_WORK_SPACES


def say(situation: str, plan: MemoryPlan, found: Measured, record_property: Any) -> None:
    """For the reader of a run with `-rA` or `--junit-xml`."""
    figures = dataclasses.asdict(found)
    for key, value in {"plan": plan.as_dict(), **figures}.items():
        record_property(key, value)
    logging.getLogger(__name__).info("%s: planned %d, %s", situation, peak_of_training(plan), json.dumps(figures))


def test_a_plan_needs_no_card() -> None:
    """That of a process that sees no card stands for the same one."""
    script = "import hf_galore, sys; print(hf_galore.plan(sys.argv[1], layers=2).peak_bytes)"
    without = subprocess.run(
        [sys.executable, "-c", script, str(RECIPE)],
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert without.returncode == 0, without.stderr[-3000:]
    here = hf_galore.plan(RECIPE, layers=2)
    assert int(without.stdout.splitlines()[-1]) == pytest.approx(here.peak_bytes, rel=0.01)
    if ON_CARD:
        assert here.vram_bytes is not None
