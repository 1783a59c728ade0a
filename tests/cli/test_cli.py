"""`hf-galore`'s smaller promises: what it says of mistakes before anything is loaded, and how it says to go on.

Whole runs are in test_commands.py.
"""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hf_galore.cli.main import main
from hf_galore.recipes import training
from tests.support.commands import command_line, recipe_on_cpu, write_checkpoint


def test_a_recipe_for_another_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sft", "--config", "pretrain/llama_60m_c4.yaml"]) == 2
    assert "there is no option 'config_name'. It is one of hf-galore pretrain." in capsys.readouterr().err


@pytest.mark.parametrize("module", ["main", "compare", "run_script"])
def test_what_needs_no_recipe_imports_nothing_that_reads_one(module: str) -> None:
    """TRL and what imports it take seconds: `hf-galore --help` and a comparison do without."""
    code = f"import sys, hf_galore.cli.{module}; print(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = run.stdout.split()
    assert "hf_galore" in loaded
    assert "trl" not in loaded


@pytest.mark.parametrize("arguments", [["--version"], ["--help"], ["trian"]])
def test_what_says_a_line_imports_nothing_heavy(arguments: list[str]) -> None:
    """torch takes over a second, transformers another. (Seconds would be those of a busy machine.)"""
    code = """
import sys
from hf_galore.cli.main import main
try:
    main(sys.argv[1:])
except SystemExit:
    pass
print(*sorted({name.partition(".")[0] for name in sys.modules}))
"""
    run = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    loaded = set(run.stdout.splitlines()[-1].split())
    assert "hf_galore" in loaded
    assert loaded.isdisjoint({"torch", "numpy", "transformers", "accelerate", "rich", "yaml"})


def test_a_warning_of_bitsandbytes_that_is_of_no_use_here(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Others of its warnings are shown."""
    assert main(["plan", "--vram"]) == 2
    theirs = logging.getLogger("bitsandbytes.backends.cpu.ops")
    theirs.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s.", "No module named 'kernels'")
    theirs.warning("Something else.")
    assert [message for message in caplog.messages if message != "Something else."] == []
    assert "Something else." in caplog.messages


# ---- errors


def test_optim_args_are_checked_before_a_model_is_looked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = recipe_on_cpu(tmp_path, model_name_or_path="nowhere/nothing", optim="galore_adamw", optim_args="rank=0")
    assert main(["sft", "--config", path]) == 2
    assert "GaLore's rank has to be an integer of at least 1" in capsys.readouterr().err


def test_a_folder_that_nothing_can_be_written_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if not Path("/proc/self").exists():
        pytest.skip("/proc is the one folder that not even root can write to")
    path = recipe_on_cpu(tmp_path, model_name_or_path="m", dataset_name="d", output_dir="/proc/out")
    assert main(["sft", "--config", path]) == 2
    assert "output_dir /proc/out cannot be written to" in capsys.readouterr().err


# ---- checkpoints


def test_resume_from_a_folder_that_is_no_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = recipe_on_cpu(tmp_path, model_name_or_path="m", dataset_name="d")
    assert main(["sft", "--config", path, "--resume_from_checkpoint", str(tmp_path)]) == 2
    assert f"{tmp_path} is no checkpoint" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_finished_runs_folder_is_no_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It has the Trainer's log, but no optimizer."""
    path = recipe_on_cpu(tmp_path, model_name_or_path="m", dataset_name="d")
    finished = write_checkpoint(tmp_path / "finished")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        (finished / name).unlink()
    assert main(["sft", "--config", path, "--resume_from_checkpoint", str(finished)]) == 2
    said = capsys.readouterr().err
    assert (
        "it holds no optimizer.pt, scheduler.pt and rng_state.pth, only the model, as a finished run's folder" in said
    )


@pytest.mark.parametrize("resumed", [[], ["--resume_from_checkpoint"], ["--resume_from_checkpoint", "before"]])
def test_the_command_to_go_on_with_asks_to_resume_once(
    resumed: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*args: Any, **kwargs: Any) -> None:
        write_checkpoint(tmp_path / "out" / "checkpoint-4")
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "run", interrupted)
    path = recipe_on_cpu(tmp_path)
    assert main(["sft", "--config", path, *resumed, "--max_steps", "9"]) == 130
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.endswith(f": hf-galore sft --config {path} --max_steps 9 --resume_from_checkpoint")


def test_a_reader_that_has_read_enough_is_no_error() -> None:
    """`hf-galore sft --help | head -1`: the rest goes nowhere, without a traceback."""
    process = subprocess.Popen(command_line("sft", "--help"), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.close()  # before anything is printed
    assert process.wait(timeout=60) == 141
    assert process.stderr is not None
    assert process.stderr.read() == b""
    process.stderr.close()
