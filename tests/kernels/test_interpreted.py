"""Our kernels in Triton's interpreter, in a process of their own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(("tests", "more_than"), [("interpreted_kernels", 100), ("interpreted_int8", 60)])
def test_kernels_are_right_in_the_interpreter(tests: str, more_than: int) -> None:
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", f"tests/support/{tests}.py", "-q", "-p", "no:cacheprovider"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed is not None
    assert int(passed.group(1)) > more_than
