"""`hf-galore recipes`, `doctor` and `completion`, as a person meets them."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hf_galore.cli import doctor
from hf_galore.cli.completion import SHELLS, words
from hf_galore.cli.completion_scripts import Words
from hf_galore.cli.main import COMMANDS, main
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
from hf_galore.cli.completion import SHELLS, words
from hf_galore.cli.completion_scripts import Words
from hf_galore.cli.main import COMMANDS, main
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


# ---- completion


@pytest.fixture(scope="module")
def every() -> Words:
    """What is completed, of the releases that are here."""
    return words()


def with_tools(names: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(shutil.which(names) is None, reason=f"{names} is not installed")


def test_what_is_completed(every: Words) -> None:
    assert every.options.keys() | {"completion"} == COMMANDS.keys()
    for command in ("sft", "pretrain", "glue", "quickstart", "plan", "bench", "compare"):
        assert {"optim", "optim_args", "optim_target_modules", "max_steps"} <= set(every.options[command]), command
        assert not [name for name in every.options[command] if "-" in name]
    assert "config_name" in every.options["pretrain"]
    assert {"vram", "suggest", "plot", "json", "task_name"} <= set(every.options["plan"])
    assert {"sweep", "names", "output"} <= set(every.options["compare"])
    assert {"copy", "to", "show", "overwrite"} <= set(every.options["recipes"])
    assert every.values["optim"][0] == "galore_adamw_8bit_layerwise"
    assert {"adamw_torch", "galore_adafactor"} <= set(every.values["optim"])
    assert every.values["bf16"] == ("true", "false")
    assert set(every.values["config"]) == set(known_recipes())
    assert "learning_rate" not in every.values


# A line as it is typed, and what it may go on with: all of that, or some of it.
LINES = [
    ("hf-galore ch", {"chat"}, True),
    ("hf-galore sft --optim galore_ada", {"galore_adamw", "galore_adafactor"}, False),
    ("hf-galore sft --optim=galore_adaf", {"galore_adafactor", "galore_adafactor_layerwise"}, True),
    ("hf-galore plan --config llama2_7b_oasst2_l", {"llama2_7b_oasst2_lora.yaml"}, True),
    ("hf-galore sft --config mi", {"mine.yaml"}, False),
    ("hf-galore sft --learning_r", {"--learning_rate"}, True),
    ("hf-galore sft --bf16 ", {"true", "false"}, True),
    ("hf-galore plan --vram 409", {"4090"}, True),
    ("hf-galore chat ou", {"out"}, True),
    ("hf-galore chat --sys", {"--system"}, True),
    ("hf-galore recipes --copy axolotl/", {"axolotl/llama3_8b_oasst2.yaml"}, True),
    ("hf-galore completion z", {"zsh"}, True),
]

IN_BASH = r"""
source "$1"
cd "$2"
while read -r line; do
    COMP_LINE=$line
    COMP_WORDS=(${line//=/ = })
    [[ $line == *"|" ]] && COMP_WORDS[${#COMP_WORDS[@]}-1]=
    COMP_CWORD=$(( ${#COMP_WORDS[@]} - 1 ))
    COMPREPLY=()
    _hf_galore
    printf '%s\t' "${COMPREPLY[@]}"
    echo
done
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a recipe, a run and something else."""
    (tmp_path / "mine.yaml").touch()
    (tmp_path / "mixed.txt").touch()
    (tmp_path / "out").mkdir()
    return tmp_path


@with_tools("bash")
def test_bash_completes(every: Words, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    script = tmp_path_factory.mktemp("bash") / "script"
    script.write_text(SHELLS["bash"](every))
    # A bar stands for the empty word that bash has behind a space.
    typed = "".join(f"{line}|\n" if line.endswith(" ") else f"{line}\n" for line, *_ in LINES)
    run = subprocess.run(
        ["bash", "-c", IN_BASH, "bash", str(script), str(folder)],
        input=typed,
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stderr == ""
    answers = [set(line.strip("\t").split("\t")) for line in run.stdout.splitlines()]
    check(answers)
    assert not any("mixed.txt" in answer for answer in answers), "it is no recipe"


@with_tools("fish")
def test_fish_completes(every: Words, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    script = tmp_path_factory.mktemp("fish") / "script"
    script.write_text(SHELLS["fish"](every))
    asked = "; ".join(f"complete -C {shlex.quote(line)}; echo END" for line, *_ in LINES)
    run = subprocess.run(
        ["fish", "--no-config", "-c", f"source {script}; cd {folder}; {asked}"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stderr == ""
    answers = run.stdout.split("END\n")[:-1]
    check([{line.split("\t")[0].rstrip("/") for line in answer.splitlines()} for answer in answers])


def check(answers: list[set[str]]) -> None:
    assert len(answers) == len(LINES)
    for (line, expected, is_all), found in zip(LINES, answers, strict=True):
        completed = {word.partition("=")[2] or word for word in found}
        assert completed == expected if is_all else expected <= completed, line


@with_tools("zsh")
def test_zsh_reads_its_script(every: Words, tmp_path: Path) -> None:
    script = tmp_path / "_hf-galore"
    script.write_text(SHELLS["zsh"](every))
    for arguments in (["-n", str(script)], ["-f", "-c", f"autoload -Uz compinit; compinit -u -D; source {script}"]):
        run = subprocess.run(["zsh", *arguments], capture_output=True, text=True, check=True)
        assert run.stderr == ""


def test_a_shell_that_there_is_no_script_for(capsys: pytest.CaptureFixture[str]) -> None:
    said = said_of_mistake("completion", ["powershell"], capsys)
    assert "invalid choice: 'powershell' (choose from" in said
