"""`--help` of the commands that take recipes: what its screens say, that it is so, and that nobody waits for it."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from hf_galore.cli import help_options
from hf_galore.cli.bench import _SWITCHES as BENCH_SWITCHES
from hf_galore.cli.bench import _VALUES as BENCH_VALUES
from hf_galore.cli.help import explanation, topic_of
from hf_galore.cli.help_screens import SCREENS
from hf_galore.cli.main import COMMANDS, main
from hf_galore.cli.plan import _SWITCHES, _VALUES
from hf_galore.config import OPTIONS, GaLoreConfig, keys
from hf_galore.errors import UserError
from hf_galore.recipes.folders import find_recipe, recipes_folder
from hf_galore.recipes.parser import RecipeParser
from hf_galore.recipes.sft import DATACLASSES

ROOT = Path(__file__).parents[2]


# ---- the first screen


@pytest.mark.parametrize("command", SCREENS)
def test_the_first_screen_fits_a_terminal_and_has_galores_keys(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--config", "nowhere.yaml", "--help"])
    assert stop.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert len(lines) <= 52  # 19 of them GaLore's keys
    assert lines[0].startswith(f"usage: hf-galore {command} ")
    first_words = {re.split(r"[ =]", line.strip())[0] for line in lines if line.startswith("  ")}
    assert first_words >= set(OPTIONS)
    assert {"--optim", "--optim_args", "--optim_target_modules"} <= first_words


@pytest.mark.parametrize("command", ["sft", "dpo", "pretrain", "glue", "plan", "bench"])
def test_its_options_exist_and_have_the_defaults_that_it_shows(command: str) -> None:
    parser = help_options.parser_of(command)
    for option in SCREENS[command].keys:
        assert option.name in parser.known_keys()
        if option.default:
            default = parser.get_default(option.name)
            assert str(default) == option.default or float(default) == float(option.default), option.name


def test_the_quickstarts_screen_shows_what_its_recipe_says() -> None:
    recipe = yaml.safe_load((recipes_folder() / "quickstart.yaml").read_text(encoding="utf-8"))
    for option in SCREENS["quickstart"].keys:
        if option.name == "overwrite_output_dir":
            continue  # of the command line
        value = recipe[option.name]
        shown = option.default or option.text.strip("'")
        if isinstance(value, list):
            assert shown.split() == value
        else:
            assert shown == str(value) or float(shown) == float(value), option.name


def test_a_commands_own_options_are_those_that_it_takes() -> None:
    for command, values, switches in (("plan", _VALUES, _SWITCHES), ("bench", BENCH_VALUES, BENCH_SWITCHES)):
        own = SCREENS[command].own
        assert {f"--{option.name}" for option in own} == {*values, *switches}
        assert {f"--{option.name}" for option in own if option.default} == set(values)


@pytest.mark.parametrize("command", SCREENS)
def test_its_examples_are_command_lines(command: str) -> None:
    lines = " ".join(line.rstrip("\\").partition("#")[0] for line in SCREENS[command].examples)
    examples = [text.split() for text in lines.split("hf-galore ")[1:]]
    known = {*help_options.parser_of(command).known_keys(), *(option.name for option in SCREENS[command].own)}
    for words in examples:
        assert words[0] == command
        assert {word[2:] for word in words if word.startswith("--")} <= {*known, "config"}
        if "--config" in words:
            assert find_recipe(words[words.index("--config") + 1]).is_file()


def test_the_commands_are_listed_for_who_gives_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "usage: hf-galore COMMAND [--key value ...]"
    listed = [line.split()[0] for line in said[said.index("commands:") + 1 :] if line.startswith("  ")]
    assert listed == list(COMMANDS)
    assert max(map(len, said)) <= 80


# ---- all options, and one


def test_all_options_are_listed_on_request(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["sft", "--config", "nowhere.yaml", "--help", "all"])
    shown = capsys.readouterr().out
    missing = [key for key in RecipeParser(DATACLASSES, prog="").known_keys() if f"--{key}" not in shown]
    assert missing == []


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("rank", "rank, in --optim_args 'rank=..., ...': integer ≥ 1; by default 128."),
        ("rank", "A matrix whose smaller side is at most r is not projected."),
        ("galore_rank", "rank, in --optim_args"),
        ("--update-proj-gap", "update_proj_gap, in --optim_args"),
        ("rule", "adam, adafactor, lion, muon; by default as optim says."),
        ("optim_args", "  rank=128                   integer ≥ 1: columns of a basis"),
        ("optim_target_modules", "--optim_target_modules attn mlp"),
        ("vram", "--vram CARD: name, label (24GB) or memory (23.5GiB)"),
        ("learning_rate", "--learning_rate: a number; by default 2e-05."),
        ("lr", "--learning_rate: a number; by default 2e-05."),
        ("eval_strategy", "--eval_strategy: one of no, steps, epoch; by default no."),
        ("packing", "--packing: true or false; by default False."),
    ],
)
def test_one_option_is_explained(name: str, words: str) -> None:
    shown = explanation("plan", name)
    assert words in shown or words in " ".join(shown.split())
    assert max(map(len, shown.splitlines())) <= 80


def test_each_of_galores_keys_is_explained_by_its_documentation() -> None:
    for key in keys():
        text = explanation("sft", key.name).split(".\n", 1)[1]
        assert len(text) > len(key.meaning), key.name
        assert not re.search(r"^\w+: ", text, re.MULTILINE), f"more than {key.name}"


@pytest.mark.parametrize(
    ("name", "advice"), [("learning_rat", "learning_rate"), ("al", "all"), ("optim_arg", "optim_args")]
)
def test_a_name_that_is_misspelt(name: str, advice: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pretrain", "--help", name]) == 2
    assert capsys.readouterr().err == (f"hf-galore pretrain: there is no option {name}. Did you mean '{advice}'?\n")


def test_a_key_that_another_command_has() -> None:
    with pytest.raises(UserError, match="there is no option task_name"):
        explanation("sft", "task_name")
    assert "Task of GLUE." in explanation("glue", "task_name")


@pytest.mark.parametrize(
    ("arguments", "topic"),
    [
        (["--config", "a.yaml"], None),
        (["-h"], ""),
        (["--help", "--config", "a.yaml"], ""),
        (["--config", "a.yaml", "--help", "rank"], "rank"),
        (["--help=all"], "all"),
    ],
)
def test_what_help_is_wanted_with(arguments: list[str], topic: str | None) -> None:
    assert topic_of(arguments) == topic


@pytest.mark.parametrize("arguments", [["sft", "--help"], ["plan", "-h"], ["glue", "--help", "rank"]])
def test_nobody_waits_for_torch(arguments: list[str]) -> None:
    code = (
        "import atexit, sys; atexit.register(lambda: print(*sys.modules)); from hf_galore.cli.main import main; main()"
    )
    run = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in run.stdout.splitlines()[-1].split()}
    assert "hf_galore" in loaded
    assert loaded.isdisjoint({"torch", "numpy", "transformers", "trl", "rich", "yaml"})


# ---- the table of GaLore's keys


def test_the_documentations_table_has_the_same_keys_values_and_defaults() -> None:
    head = "| key | values | default | meaning |"
    pages = [path for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")) if head in path.read_text("utf-8")]
    assert pages
    for page in pages:
        table = page.read_text("utf-8").partition(head)[2].split("\n\n")[0]
        rows = [
            [cell.strip() for cell in line.strip("|").split("|")]
            for line in table.splitlines()
            if line.startswith("| `")
        ]
        found = {row[0].strip("`"): (row[1].replace("`", ""), row[2].replace("`", "")) for row in rows}
        assert found == {key.name: (", ".join(key.values), key.default) for key in keys()}, page


def test_a_default_that_is_shown_is_the_default() -> None:
    for key in keys():
        default = getattr(GaLoreConfig(), key.name)
        assert key.is_set == (default is not None)
        if key.is_set:
            assert GaLoreConfig.from_optim_args(f"{key.name}={key.default}") == GaLoreConfig()
    assert [key.name for key in keys()] == [field.name for field in dataclasses.fields(GaLoreConfig)]
