"""The list of the recipes says what the recipes say, and copies of them run."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from hf_galore.errors import UserError
from hf_galore.recipes import any_recipe
from hf_galore.recipes.catalog import catalog, copy, find, listed, next_commands, of_others
from hf_galore.recipes.config_file import read
from hf_galore.recipes.folders import known_recipes, recipes_folder

EVERY = {recipe.name: recipe for recipe in catalog()}


def test_every_recipe_is_listed_once_and_by_command() -> None:
    assert sorted(EVERY) == known_recipes()
    commands = [recipe.command for recipe in catalog()]
    assert [command for i, command in enumerate(commands) if command not in commands[:i]] == [
        command for command in ("quickstart", "sft", "dpo", "pretrain", "glue") if command in commands
    ]


@pytest.mark.parametrize("name", EVERY)
def test_the_header_has_the_one_line_that_the_list_is_made_of(name: str) -> None:
    text = (recipes_folder() / name).read_text(encoding="utf-8")
    several = r"(?:--num_processes (\d+) --sharded )?"
    options = rf"{several}(?:--vram (\S+) )? *# peak: (\S+) GiB$"
    line = re.compile(rf"^#   hf-galore plan --config {re.escape(name)} {options}", re.M)
    ((cards, card, peak),) = line.findall(text)
    recipe = EVERY[name]
    assert (recipe.card or "", recipe.cards, recipe.peak_gib) == (card, int(cards or 1), float(peak))
    keys = read(recipes_folder() / name)
    assert recipe.model == keys.get("model_name_or_path", keys.get("config_name"))
    assert text.replace("\n# ", " ").startswith(f"# {recipe.about}")
    assert (recipe.licence is not None) == ("Needs access to" in text)


def test_a_recipe_for_several_cards_is_started_by_accelerate() -> None:
    recipe = EVERY["llama3_70b_oasst2.yaml"]
    assert (recipe.cards, recipe.card) == (8, "80GB")
    copied, planned, started = next_commands(recipe, Path("a b.yaml"))
    assert find(copied.removeprefix("hf-galore recipes --copy ")) == recipes_folder() / "accelerate" / "fsdp2.yaml"
    assert planned == "hf-galore plan --config 'a b.yaml' --num_processes 8 --sharded --vram 80GB"
    assert started.startswith("accelerate launch --config_file fsdp2.yaml --num_processes 8 ")
    assert started.endswith(" -m hf_galore sft --config 'a b.yaml'")


def test_those_of_other_programs_are_apart() -> None:
    others = {recipe.name: recipe for recipe in of_others()}
    assert not set(others) & set(EVERY)
    axolotl = others["axolotl/llama3_8b_oasst2.yaml"]
    assert (axolotl.command, axolotl.model, axolotl.card) == ("axolotl train", "meta-llama/Meta-Llama-3-8B", "24GB")
    assert axolotl.peak_gib == 20.73
    assert next_commands(axolotl, Path("a b.yaml"))[-1] == "axolotl train 'a b.yaml' --launcher python"
    assert "lm_eval" not in {Path(name).parts[0] for name in others}


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("llama2_7b_oasst2", "llama2_7b_oasst2.yaml"),
        ("recipes/llama2_7b_oasst2.yaml", "llama2_7b_oasst2.yaml"),
        ("llama3_8b_oasst2", "llama3_8b_oasst2.yaml"),  # and not axolotl's
        ("axolotl/llama3_8b_oasst2", "axolotl/llama3_8b_oasst2.yaml"),
        ("roberta_base_cola", "glue/roberta_base_cola.yaml"),
    ],
)
def test_a_recipe_is_found_by_what_people_write(name: str, found: str) -> None:
    assert find(name) == recipes_folder() / found


@pytest.mark.parametrize(
    ("name", "hint"),
    [("llama2_7b_oast2", "Did you mean 'llama2_7b_oasst2.yaml'?"), ("cola", "Is it glue/roberta_base_cola.yaml?")],
)
def test_a_name_that_is_not_there(name: str, hint: str) -> None:
    with pytest.raises(UserError, match=re.escape(f"is called {name}. {hint}")):
        find(name)


@pytest.mark.parametrize("name", ["llama2_7b_oasst2.yaml", "pretrain/llama_60m_c4.yaml", "glue/roberta_base_cola.yaml"])
def test_a_copy_runs_from_where_it_is(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the command that is said, in the folder that it was copied from: template and config are found."""
    monkeypatch.chdir(tmp_path)
    path = copy(name, Path("mine here"), overwrite=False)
    *_, command = next_commands(listed(name), path)
    program, kind, *arguments = shlex.split(command)
    assert (program, kind) == ("hf-galore", EVERY[name].command)
    theirs = any_recipe.parse(["--config", name], "", "")
    mine = any_recipe.parse(arguments, "", "")
    assert mine.recipe == path
    assert mine.training.to_dict() == theirs.training.to_dict()
    template = getattr(mine.training, "chat_template_path", None)
    assert template is None or (Path(template) / "chat_template.jinja").is_file()
    assert mine.model_name == theirs.model_name


def test_a_copy_replaces_nothing_unless_told_to(tmp_path: Path) -> None:
    path = copy("quickstart", tmp_path, overwrite=False)
    path.write_text("mine")
    with pytest.raises(UserError, match=r"quickstart\.yaml is there already\. .* --overwrite"):
        copy("quickstart", tmp_path, overwrite=False)
    assert path.read_text() == "mine"
    copy("quickstart", tmp_path, overwrite=True)
    assert path.read_bytes() == find("quickstart").read_bytes()
    with pytest.raises(UserError, match="cannot be written"):
        copy("quickstart", path / "below", overwrite=False)
