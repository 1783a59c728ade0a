"""The tests marked `arithmetic` pass on other machines than this one: with smaller vector units and with two threads.

Torch, MKL and oneDNN choose their kernels at a process's start, by the processor or by their environment variables:
so each machine is a process. This one, with one thread, is what the tests run on anyway.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).parent
# As threads and what the libraries are told. Sums are in another order on each.
MACHINES: dict[str, tuple[int, dict[str, str]]] = {
    "its own": (2, {}),
    "AVX2": (2, {"ATEN_CPU_CAPABILITY": "avx2", "MKL_CBWR": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"}),
    "no vectors": (1, {"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE", "ONEDNN_MAX_CPU_ISA": "SSE41"}),
}


def arithmetic() -> list[str]:
    """The files with such tests, by their text: collecting the others would take longer than the tests."""
    others = sorted(TESTS.rglob("test_*.py"))
    return [str(path) for path in others if path != Path(__file__) and "mark.arithmetic" in path.read_text("utf-8")]


@pytest.mark.slow
@pytest.mark.parametrize("machine", MACHINES)
def test_arithmetic_holds_on(machine: str) -> None:
    threads, told = MACHINES[machine]
    if machine == "AVX2" and not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        pytest.skip("this processor has no AVX2")
    # Threads that wait for each other by spinning take minutes for what takes seconds, where others use the cores too.
    told = {**told, "OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": str(threads)}
    here = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", "-m", "arithmetic"]
    run = subprocess.run(
        [*command, *arithmetic()],
        cwd=TESTS.parent,
        env={**here, **told, "HF_GALORE_TEST_THREADS": str(threads)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    assert " passed" in run.stdout


def test_the_files_are_found() -> None:
    assert {"test_bitsandbytes.py", "test_classes.py", "test_windows.py"} <= {Path(path).name for path in arithmetic()}
