"""The picture of README: which learning rate each optimizer has in it."""

from __future__ import annotations

from pathlib import Path

import pytest

from hf_galore.compare.reading import read_run
from hf_galore.compare.runs import Run
from tests.benchmarks.comparison import best_rate
from tests.support.written_runs import write_run


def swept(folder: Path, losses: dict[str, list[float]]) -> dict[str, Run]:
    return {
        rate: read_run(write_run(folder / rate, [1.0] * len(found), held_out=found), rate)
        for rate, found in losses.items()
    }


def test_the_best_rate_has_the_lowest_loss_whenever_that_was(tmp_path: Path) -> None:
    assert best_rate(swept(tmp_path, {"1": [3.0, 2.0], "2": [1.0, 2.5], "4": [3.0, 1.5]})) == "2"


def test_a_rate_at_an_end_is_not_taken(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"the best rate, 4, is at an end of those that were tried: 1, 2, 4\."):
        best_rate(swept(tmp_path, {"1": [3.0], "2": [2.0], "4": [1.0]}))
