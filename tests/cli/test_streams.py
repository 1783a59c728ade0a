"""What is printed to where nobody reads: a training goes on, and other commands end as others in a pipe do."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hf_galore.recipes.embedded_model import Embedded
from tests.support.commands import command_line, options, short_run, weights

POSIX = pytest.mark.skipif(sys.platform == "win32", reason="Windows has neither these pipes nor these devices")
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}


def unread(arguments: list[str], **kwargs: Any) -> subprocess.CompletedProcess[str]:
    """Run a command whose stdout is a pipe that nobody reads any more."""
    reads, writes = os.pipe()
    os.close(reads)
    try:
        return subprocess.run(
            command_line(*arguments),
            stdout=writes,
            stderr=kwargs.get("stderr", subprocess.PIPE) or writes,
            env=ENVIRONMENT,
            text=True,
            timeout=120,
            check=False,
        )
    finally:
        os.close(writes)


@POSIX
@pytest.mark.parametrize("arguments", [["recipes"], ["--help"], ["sft", "--help"]], ids=" ".join)
def test_a_reader_who_has_enough_ends_a_command_without_a_word(arguments: list[str]) -> None:
    ended = unread(arguments)
    assert (ended.returncode, ended.stderr) == (141, "")


@POSIX
def test_a_training_outlasts_its_readers(small: Embedded, tmp_path: Path) -> None:
    """Ctrl-C ends `tee` too: of both streams then, before the checkpoint is written."""
    ended = unread(["sft", *options(short_run(small.model, small.data, tmp_path / "out"))], stderr=None)
    assert ended.returncode == 0
    assert weights(tmp_path / "out")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no such device here")
def test_a_full_disk_is_named() -> None:
    with open("/dev/full", "w") as full:
        ended = subprocess.run(
            command_line("recipes"), stdout=full, stderr=subprocess.PIPE, env=ENVIRONMENT, text=True, check=False
        )
    assert ended.returncode == 2
    assert ended.stderr == "hf-galore recipes: stdout cannot be written to: No space left on device.\n"


def test_where_signs_have_no_letter_the_rest_is_shown() -> None:
    """As in a file in Windows' code page, which has no ≥."""
    ended = subprocess.run(
        command_line("sft", "--help"),
        capture_output=True,
        env={**ENVIRONMENT, "PYTHONIOENCODING": "ascii"},
        text=True,
        check=False,
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "--help all lists every option" in ended.stdout


@POSIX
def test_what_was_closed_from_the_start_is_no_mistake() -> None:
    closed = subprocess.run(
        ["sh", "-c", '"$@" <&- >&- 2>&-', "sh", *command_line("recipes")], env=ENVIRONMENT, check=False
    )
    assert closed.returncode == 0
