"""Two processes (gloo, CPU) and one on the same global batch give the same weights, by the plain names."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor

from tests.helpers import PLAIN, assert_same_but_for_rounding, snapshot, tiny_llama


def weights_of(processes: int, folder: Path) -> dict[str, dict[str, dict[str, Tensor]]]:
    folder.mkdir()
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    subprocess.run(
        [*launcher, "-m", "tests.ddp_script", str(folder), str(processes)],
        check=True,
        cwd=Path(__file__).parents[1],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    weights: dict[str, dict[str, dict[str, Tensor]]] = torch.load(folder / "weights.pt")
    return weights


def test_two_processes_are_one(tmp_path: Path) -> None:
    one, two = (weights_of(processes, tmp_path / str(processes)) for processes in (1, 2))
    for name in PLAIN:
        found, expected, nearby = two[name]["whole"], one[name]["whole"], one[name]["nearby"]
        assert_same_but_for_rounding(found, expected, nearby, snapshot(tiny_llama()))  # sums in another order
