"""`hf-galore recipes`, `doctor` and `completion`, as a person meets them."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from hf_galore.cli import doctor
from hf_galore.cli.main import main
from hf_galore.doctor import Finding, Report
from hf_galore.recipes.folders import known_recipes, recipes_folder
from tests.support.commands import said_of_mistake

# ---- recipes


def test_the_list_fits_a_terminal_and_has_every_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    names = [line.split(" ")[0] for line in lines]
    assert set(known_recipes()) <= set(names)
    llama = next(line for line in lines if line.startswith("llama2_7b_oasst2.yaml "))
    assert llama.split() == ["llama2_7b_oasst2.yaml", "sft", "Llama-2-7b-hf", "24GB", "18.5", "GiB"]


def test_a_list_imports_nothing_that_takes_long() -> None:
    code = """
import sys
from hf_galore.cli.main import main
main(["recipes"])
print(*sorted({name.partition(".")[0] for name in sys.modules}))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(run.stdout.splitlines()[-1].split())
    assert "hf_galore" in loaded
    assert loaded.isdisjoint({"torch", "numpy", "transformers", "trl", "rich"})


def test_copying_says_the_next_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["recipes", "--copy", "llama2_7b_oasst2", "--to", "mine"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "mine/llama2_7b_oasst2.yaml is a copy of llama2_7b_oasst2.yaml. Now"
    assert [shlex.split(line) for line in said[1:3]] == [
        ["hf-galore", "plan", "--config", "mine/llama2_7b_oasst2.yaml", "--vram", "24GB"],
        ["hf-galore", "sft", "--config", "mine/llama2_7b_oasst2.yaml"],
    ]
    assert " ".join(said[3:]).startswith("Needs access to meta-llama/Llama-2-7b-hf (accept its licence")
    assert main(["recipes", "--show", "llama2_7b_oasst2"]) == 0
    assert capsys.readouterr().out == (recipes_folder() / "llama2_7b_oasst2.yaml").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--copy", "quickstart", "--show", "quickstart"], "--copy and --show are both given. Give one."),
        (["--to", "here"], "--to and --overwrite belong to --copy NAME, which is missing."),
        (["--coppy", "quickstart"], "there is no option --coppy, only --help, --copy"),
        (["quickstart"], "'quickstart' is too much. See hf-galore recipes --help."),
        (["--copy"], "argument --copy: expected one argument. See hf-galore recipes --help."),
    ],
)
def test_mistakes(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert said in said_of_mistake("recipes", arguments, capsys)


# ---- doctor


@pytest.mark.parametrize(("status", "code"), [("ok", 0), ("note", 0), ("problem", 1)])
def test_the_doctors_status_says_whether_a_training_would_stop(
    status: str, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []

    def report(model: str | None) -> Report:
        asked.append(model)
        return Report("here", (Finding("torch", status, "found"),))  # type: ignore[arg-type]

    monkeypatch.setattr(doctor, "report", report)
    assert main(["doctor", "--model", "some/model"]) == code
    assert "torch" in capsys.readouterr().out
    assert main(["doctor", "--json"]) == code
    found = json.loads(capsys.readouterr().out)
    assert found["fine"] is (code == 0)
    assert found["findings"][0]["status"] == status
    assert asked == ["some/model", None]
