"""What is said of a mistake in one line and what is a bug; what a run that fails leaves."""

from __future__ import annotations

from pathlib import Path

import pytest

from hf_galore import GaLoreConfig
from hf_galore.errors import UserError
from hf_galore.recipes import errors


def test_a_bug_keeps_its_traceback(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a bug"), errors.reporting_errors(str(tmp_path / "out")):
        raise ValueError("a bug")  # this module is none that checks arguments
    with pytest.raises(ValueError, match="unpack"), errors.reporting_errors(str(tmp_path / "out")):
        _, _ = (1,)  # type: ignore[misc]
    with pytest.raises(FileNotFoundError), errors.reporting_errors(str(tmp_path / "out")):
        (tmp_path / "missing").read_text()  # the operating system's own
    with pytest.raises(UserError, match="rank"), errors.reporting_errors(str(tmp_path / "out")):
        GaLoreConfig(rank=0)


def test_only_empty_folders_of_a_failed_run_are_removed(tmp_path: Path) -> None:
    for leaves_a_file in (False, True):
        out = tmp_path / "new" / "out"

        def fails(out: Path = out, leaves_a_file: bool = leaves_a_file) -> None:
            with errors.reporting_errors(str(out)):
                out.mkdir(parents=True)
                if leaves_a_file:
                    (out / "weights").touch()
                GaLoreConfig(rank=0)

        with pytest.raises(UserError):
            fails()
        assert (tmp_path / "new").exists() == leaves_a_file
