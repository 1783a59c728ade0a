"""Commands ask for expandable segments where they work, and leave alone what the user has set."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest
import torch

from hf_galore import expandable_segments
from hf_galore.cli import main as command
from hf_galore.expandable_segments import OLDER_VARIABLE, VARIABLE, in_use, supported, use_expandable_segments

LINUX, WSL = "6.8.0-48-generic", "5.15.167.4-microsoft-standard-WSL2"


@pytest.fixture(autouse=True)
def _on_linux(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(platform, "release", lambda: LINUX)
    for name in (VARIABLE, OLDER_VARIABLE):
        monkeypatch.delenv(name, raising=False)


def test_they_are_asked_for_where_nothing_is_set() -> None:
    environ = {"PATH": "/bin"}
    assert in_use(environ)
    assert use_expandable_segments(environ) is None
    assert environ == {"PATH": "/bin", "PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    assert in_use(environ)
    assert use_expandable_segments(environ) is None  # a second time


@pytest.mark.parametrize(
    ("system", "release"),
    [("win32", "11"), ("darwin", "24.1.0"), ("linux", WSL), ("linux", "5.15.148-tegra")],
)
def test_not_where_they_do_not_work(system: str, release: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(platform, "release", lambda: release)
    environ: dict[str, str] = {}
    assert not supported()
    assert not in_use(environ)
    assert use_expandable_segments(environ) is None
    assert environ == {}
    # Whoever asks for them there has none.
    assert not in_use({VARIABLE: "expandable_segments:True"})


@pytest.mark.parametrize("name", [VARIABLE, OLDER_VARIABLE])
@pytest.mark.parametrize(
    ("value", "advised"),
    [
        ("max_split_size_mb:128", "max_split_size_mb:128,expandable_segments:True"),
        ("expandable_segments:False", "expandable_segments:True"),
        ("expandable_segments:False,max_split_size_mb:128", "max_split_size_mb:128,expandable_segments:True"),
        ("backend:native, expandable_segments : False", "backend:native,expandable_segments:True"),
    ],
)
def test_settings_of_the_users_own_are_kept_and_it_is_said_what_they_leave_off(
    name: str, value: str, advised: str
) -> None:
    environ = {name: value}
    assert not in_use(environ)
    advice = use_expandable_segments(environ)
    assert environ == {name: value}
    assert advice is not None
    assert f"{name}={value} leaves expandable segments off" in advice
    assert f"{name}={advised} has them" in advice
    assert in_use({name: advised})


@pytest.mark.parametrize("value", ["backend:cudaMallocAsync", "expandable_segments:True,backend : cudaMallocAsync"])
def test_another_allocator_has_none_whatever_is_asked_for(value: str) -> None:
    environ = {VARIABLE: value}
    assert not in_use(environ)
    advice = use_expandable_segments(environ)
    assert environ == {VARIABLE: value}
    assert advice is not None
    assert "asks for CUDA's own allocator, which has no expandable segments" in advice
    assert advice.endswith(f"{VARIABLE}=expandable_segments:True has torch's.")


@pytest.mark.parametrize(
    "environ",
    [{OLDER_VARIABLE: "max_split_size_mb:128,expandable_segments:True"}, {VARIABLE: "expandable_segments: True"}],
)
def test_settings_of_the_users_own_that_have_them_are_nothing_to_speak_of(environ: dict[str, str]) -> None:
    before = dict(environ)
    assert use_expandable_segments(environ) is None
    assert environ == before
    assert in_use(environ)


def test_the_newer_variable_goes_first_as_in_torch() -> None:
    assert not in_use({VARIABLE: "expandable_segments:False", OLDER_VARIABLE: "expandable_segments:True"})
    assert in_use({VARIABLE: "", OLDER_VARIABLE: "expandable_segments:True"})


def test_torch_reads_the_variable_after_it_has_been_imported() -> None:
    """When CUDA starts: so a command may set it then, and the variable has the name that torch reads."""
    script = (
        "import torch, hf_galore, os; from hf_galore import expandable_segments as e; "
        "assert 'PYTORCH_ALLOC_CONF' not in os.environ, 'the import has set it'; "
        "os.environ[e.VARIABLE] = e.SETTING; print(torch._C._accelerator_getAllocatorSettings())"
    )
    environ = {name: value for name, value in os.environ.items() if name not in (VARIABLE, OLDER_VARIABLE)}
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environ, check=True)
    assert run.stdout.splitlines()[-1] == expandable_segments.SETTING


# ---- commands


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """What the variable is when a command begins."""
    found: list[str | None] = []

    class Module:
        @staticmethod
        def run(arguments: list[str]) -> int:
            found.append(os.environ.get(VARIABLE))
            return 0

    monkeypatch.setattr("hf_galore.cli.main.importlib.import_module", lambda name: Module)
    monkeypatch.setenv(VARIABLE, "")  # so that it is put back
    return found


@pytest.mark.parametrize("name", command.COMMANDS)
def test_a_command_that_uses_a_card_asks_for_them(
    name: str, seen: list[str | None], capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main([name]) == 0
    without_card = ("plan", "recipes", "doctor", "completion")
    assert seen == ["" if name in without_card else "expandable_segments:True"]
    assert capsys.readouterr().err == ""
    assert not torch.cuda.is_initialized()


def test_a_command_says_once_that_they_are_off(
    seen: list[str | None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(VARIABLE, "max_split_size_mb:128")
    assert command.main(["sft"]) == 0
    assert seen == ["max_split_size_mb:128"]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("hf-galore sft: PYTORCH_ALLOC_CONF=max_split_size_mb:128 leaves expandable segments off")
