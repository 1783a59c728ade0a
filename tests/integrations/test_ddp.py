"""Two processes (gloo, CPU) and one on the same global batch give the same weights, by the plain names."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import accelerate
import pytest
import torch
from packaging.version import parse
from torch import Tensor

from tests.support.helpers import PLAIN, assert_same_but_for_rounding, snapshot, tiny_llama


def launch(processes: int, *command: str) -> None:
    """Run a module of the tests in several processes of this machine."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    subprocess.run(
        [*launcher, "-m", *command],
        check=True,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=300,
    )


def weights_of(processes: int, folder: Path) -> dict[str, dict[str, dict[str, Tensor]]]:
    folder.mkdir()
    launch(processes, "tests.support.ddp_script", str(folder), str(processes))
    weights: dict[str, dict[str, dict[str, Tensor]]] = torch.load(folder / "weights.pt")
    return weights


def test_two_processes_are_one(tmp_path: Path) -> None:
    one, two = (weights_of(processes, tmp_path / str(processes)) for processes in (1, 2))
    for name in PLAIN:
        found, expected, nearby = two[name]["whole"], one[name]["whole"], one[name]["nearby"]
        assert_same_but_for_rounding(found, expected, nearby, snapshot(tiny_llama()))  # sums in another order


@pytest.mark.skipif(
    parse(accelerate.__version__) < parse("1.13"),  # 1.12 has not been tried
    reason="accelerate 1.10 and 1.11 themselves refuse FSDP where there is no device",
)
def test_fsdp_is_refused_on_cpus_too(tmp_path: Path) -> None:
    """Before: accelerate, which has no FSDP on CPUs, trained under DDP without a word."""
    launch(2, "tests.support.fsdp_script", str(tmp_path))
    assert sorted(file.name for file in tmp_path.glob("refused-*")) == ["refused-0", "refused-1"]


def test_hooks_are_refused_without_a_trainer_too(tmp_path: Path) -> None:
    """Before: the two processes' weights drifted apart at the first step."""
    launch(2, "tests.support.own_loop_script", str(tmp_path))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["refused-0", "refused-1"]
