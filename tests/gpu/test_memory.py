"""The 7B recipe under the memory of a card of 24 GB, beside its plan. Each run has a process to itself."""

from __future__ import annotations

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
from tests.support.card import CAP, GIB, ON_CARD, RECIPE, ROOT, sized

LAYERS = int(os.environ.get("HF_GALORE_CARD_LAYERS", sized("32", "2")))
EXPANDABLE = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
TRAINING = ("forward", "backward", "update")
# For each of two threads cuBLAS takes 32 MiB on cards of compute capability 9 and 10; a plan counts 8, as on others.
LARGER_WORK_SPACES = 48 * 2**20

SITUATIONS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "clipped": {"max_grad_norm": 1},
    "accumulated": {"gradient_accumulation_steps": 4},
    "accumulated parts": {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 4},
}


def started(overrides: dict[str, Any], environment: dict[str, str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.support.card_run", "--layers", str(LAYERS), "--cap", str(CAP / GIB)]
    return subprocess.Popen(
        [*command, *(f"{key}={value}" for key, value in overrides.items())],
        cwd=ROOT,
        env={**{k: v for k, v in os.environ.items() if k != "PYTORCH_ALLOC_CONF"}, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def figures_of(process: subprocess.Popen[str]) -> dict[str, Any]:
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err[-3000:]
    figures: dict[str, Any] = json.loads(out.splitlines()[-1])
    return figures


def planned(overrides: dict[str, Any]) -> MemoryPlan:
    words = [word for key, value in overrides.items() for word in (f"--{key}", str(value))]
    return hf_galore.plan(RECIPE, overrides=words, layers=LAYERS)


def peak_of_training(plan: MemoryPlan) -> int:
    """Without evaluations, of which there are none here."""
    return max(plan.phase_peaks[phase] for phase in TRAINING)


@pytest.mark.parametrize("situation", SITUATIONS)
def test_a_recipe_takes_what_its_plan_says(situation: str, record_property: Any) -> None:
    overrides = SITUATIONS[situation]
    process = started(overrides, EXPANDABLE)
    plan = planned(overrides)
    found = figures_of(process)
    say(situation, plan, found, record_property)
    assert len(found["seconds"]) == len(found["losses"]) == 4
    assert all(loss < 20 for loss in found["losses"])
    assert not [message for message in found["warnings"] if "plain torch is used" in message]
    if ON_CARD:
        assert found["allocated"] == pytest.approx(peak_of_training(plan), rel=0.03)
        assert found["reserved"] <= plan.expandable_bytes + LARGER_WORK_SPACES
        assert found["seconds"][0] < 60


def test_without_expandable_segments_it_still_fits(record_property: Any) -> None:
    process = started({}, {})
    plan = planned({})
    found = figures_of(process)
    say("without expandable segments", plan, found, record_property)
    if ON_CARD:
        assert found["reserved"] <= plan.segmented_bytes + LARGER_WORK_SPACES


def say(situation: str, plan: MemoryPlan, found: dict[str, Any], record_property: Any) -> None:
    """For the reader of a run with `-rA` or `--junit-xml`."""
    for key, value in {"plan": plan.as_dict(), **found}.items():
        record_property(key, value)
    logging.getLogger(__name__).info("%s: planned %d, %s", situation, peak_of_training(plan), json.dumps(found))


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
