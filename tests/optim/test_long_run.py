"""The long run of `tests.benchmarks.long`, short: what it looks at, what it calls a fault, and that it goes on."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from hf_galore import GaLoreAdamW
from tests.benchmarks import long
from tests.support import warm
from tests.support.helpers import assert_identical

STEPS = 60
ROWS = [row for row in long.TABLE if row.cls is GaLoreAdamW or row.layerwise]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_nothing_grows_drifts_or_is_not_finite(row: long.Row, tmp_path: Path) -> None:
    # In a process that has done nothing else: what tests before it have freed would be its resident memory too.
    ended = warm.ran(long.run, row, STEPS, tmp_path)
    assert ended.returncode == 0, ended.stderr
    figures = long.Figures.of(long.run(row, STEPS, tmp_path))  # as that process has left them
    assert dataclasses.replace(figures, times_new=1.0).faults() == []
    assert 0.1 < figures.times_new < 10  # 1.0, but for what else the machine does, which has made 2 of it
    assert figures.losses[-1] < 3 < 5 < figures.losses[0]  # of 5.5 for bytes that are all as likely
    assert figures.refreshes >= 7 * (STEPS // 10)
    assert {16: 1e-7, 8: 1e-3, 4: 2e-2}[row.proj_bits] < figures.defect < {16: 1e-5, 8: 1e-2, 4: 0.2}[row.proj_bits]
    assert figures.state[0] < 2**20
    assert row.name in long.markdown([(row, figures)])


def test_a_tensor_kept_of_every_step_is_a_fault(tmp_path: Path) -> None:
    ended = warm.ran(leaking_run, ROWS[2], STEPS, tmp_path)
    assert ended.returncode == 0, ended.stderr
    faults = long.Figures.of(long.run(ROWS[2], STEPS, tmp_path)).faults()
    assert any("resident memory grows" in fault for fault in faults), faults


def leaking_run(row: long.Row, steps: int, folder: Path) -> None:
    """The run, of which a quarter of a MiB is never freed in each step."""
    take_step = long.take_step
    kept = []

    def leaking(model: Any, optimizer: Any, step: int) -> Any:
        kept.append(torch.ones(2**16))
        return take_step(model, optimizer, step)

    with mock.patch.object(long, "take_step", leaking):
        long.run(row, steps, folder)


def test_a_run_that_was_interrupted_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row, steps = ROWS[-1], 20
    whole = long.run(row, steps, tmp_path / "whole")
    take_step = long.take_step

    def interrupted(model: Any, optimizer: Any, step: int) -> Any:
        if step == 7:
            raise KeyboardInterrupt
        return take_step(model, optimizer, step)

    with monkeypatch.context() as patch:
        patch.setattr(long, "take_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            long.run(row, steps, tmp_path / "parts")
    parts = long.run(row, steps, tmp_path / "parts")
    assert parts["resumed"] == [7]
    for what in ("losses", "defect", "looks", "bytes", "refreshes"):
        assert_identical(parts[what], whole[what])
    assert (parts["cpu"] > 0).all()
    assert_identical(long.run(row, steps, tmp_path / "parts"), parts)  # is finished, and not run again


def test_what_is_a_fault() -> None:
    sound = long.Figures(
        losses=(5.0, 3.0, 2.0, 1.5),
        nonfinite=0,
        cpu=(0.01, 0.01),
        wall=(0.01, 0.03),
        resident=(1000, 1010),
        state=(100, 100),
        defect=0.1,
        random=0.09,
        refreshes=10,
        times_new=1.02,
    )
    assert sound.faults() == []
    faults: dict[str, dict[str, Any]] = {
        "not finite": {"losses": (5.0, 3.0, float("nan"), 1.5)},
        "2 steps with a number": {"nonfinite": 2},
        "does not fall": {"losses": (5.0, 3.0, 2.0, 2.1)},
        "bytes change": {"state": (100, 101)},
        "memory grows": {"resident": (1000, 1100)},
        "a basis is off": {"defect": 0.2},
        "1.30 times": {"times_new": 1.3},
    }
    for words, change in faults.items():
        assert any(words in fault for fault in dataclasses.replace(sound, **change).faults()), words


def test_the_defect_of_a_basis() -> None:
    basis = torch.eye(8)[:, :3]
    assert long.basis_defect(basis) == 0
    basis[0, 0] = 0.9
    assert long.basis_defect(basis) == pytest.approx(0.19)
    assert long.random_defect([(64, 16)], 16) < 1e-6 < 1e-3 < long.random_defect([(64, 16)], 4)
