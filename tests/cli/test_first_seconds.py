"""Ctrl-C while a command imports its libraries: one line and status 130, whatever the import makes of an exception."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hf_galore.cli.first_seconds import leaving_at_once
from tests.support.signals import of_a_terminal

# Stands for a library: it gets Ctrl-C in the middle, and clears the exception, as extension modules do.
LIBRARY = """
import os, signal
try:
    os.kill(os.getpid(), signal.SIGINT)
    for _ in range(1000):
        pass
except BaseException:
    pass
def run(arguments):
    print("went on")
    return 0
"""
COMMAND = """
import sys
from hf_galore.cli import main
main.COMMANDS["slow"] = "is slow"
main.EXTRAS["slow"] = "cli"
main.require = lambda *given: None
sys.modules["hf_galore.cli"].__path__.append(sys.argv[1])
sys.exit(main.main(["slow"]))
"""


def test_ctrl_c_amid_imports(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(LIBRARY)
    command = [sys.executable, "-c", COMMAND, str(tmp_path)]
    with of_a_terminal():
        ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 130
    assert ended.stdout == ""
    assert ended.stderr.strip() == "hf-galore slow: interrupted before training began; run the same command again."


def test_ctrl_c_means_afterwards_what_it_meant_before(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGINT)
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with leaving_at_once("hf-galore: interrupted"):
            assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # somebody else's business
        with leaving_at_once("hf-galore: interrupted"):
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
