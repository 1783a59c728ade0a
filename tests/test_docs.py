"""README and the docs: what they have of the code is the code's, what they name exists, and the site is whole."""

from __future__ import annotations

import ast
import functools
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from hf_galore.cli.main import COMMANDS
from hf_galore.config import OPTIONS, GaLoreConfig
from hf_galore.optim.build import KINDS
from hf_galore.recipes.folders import known_recipes, recipes_folder
from tests.support.pages import (
    ARGUMENTS_PAGE,
    CHOOSING_PAGE,
    DOCS,
    LOSSES_BY_RANK,
    PARTS,
    README,
    ROOT,
    all_pages,
    arguments_table,
    drawn,
    losses_by_rank,
    quality_table,
    recipe_rows,
    rows_of_several_cards,
    with_part,
    written,
)

PAGES = [*all_pages(), ROOT / "CONTRIBUTING.md"]
# Which docs/site_hooks.py makes of files of the checkout.
MADE = {"changelog.md", "contributing.md"}


def test_readme_is_short() -> None:
    assert len(README.read_text("utf-8").splitlines()) <= 150


# ---- what is made


@pytest.mark.parametrize("path", list(PARTS), ids=lambda path: path.name)
def test_what_is_made_is_of_today(path: Path) -> None:
    assert path.read_text("utf-8") == written(path), "run python -m tests.support.pages"


def test_the_table_of_arguments_is_the_codes() -> None:
    rows = re.findall(r"^\| `(\w+)` \| .+ \| .+ \| \w.+ \|$", arguments_table(), re.MULTILINE)
    assert tuple(rows) == OPTIONS
    assert "| `128` | Columns r of a basis" in arguments_table()
    assert GaLoreConfig().rank == 128


def test_the_table_of_qualities_has_each_optimizer_with_its_loss() -> None:
    rows = re.findall(r"^\| (\w+).* \| (\d\.\d+) \| (\d+\.\d+) \|$", quality_table(), re.MULTILINE)
    assert [name for name, _, _ in rows] == ["AdamW", "AdamW", "GaLore", "GaLore", "GaLore", "LoRA"]
    assert all(3 < float(loss) < 8 for _, loss, _ in rows)


def test_every_optimizer_has_its_row() -> None:
    rows = re.findall(r"^\| `(galore_\w+)` \|", ARGUMENTS_PAGE.read_text("utf-8"), re.MULTILINE)
    assert set(rows) == set(KINDS)


def test_every_command_has_its_row() -> None:
    rows = re.findall(r"^\| `hf-galore (\w+)` \|", (DOCS / "commands.md").read_text("utf-8"), re.MULTILINE)
    assert set(rows) == set(COMMANDS)


def test_a_page_without_its_marks_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"needs .* once"):
        with_part("# Arguments\n", "rows")


def test_every_recipe_has_its_row() -> None:
    """What the rows say, tests/recipes/test_recipes.py holds against plans."""
    alike = {name for name in known_recipes() if name.startswith("glue/")}  # but for CoLA they are planned alike
    rows = recipe_rows() | rows_of_several_cards()
    assert set(known_recipes()) - {"quickstart.yaml"} - alike == set(rows) - alike
    assert set(rows) & alike == {"glue/roberta_base_mrpc.yaml", "glue/roberta_base_cola.yaml"}
    for name, row in rows.items():
        text = (recipes_folder() / name).read_text("utf-8")
        assert f"# peak: {row.peak} GiB" in text, name
        given = yaml.safe_load(text).get("optim_args")
        assert row.rank == ("" if given is None else str(GaLoreConfig.from_optim_args(given).rank)), name


def test_pictures_are_those_of_their_script() -> None:
    for name, text in drawn().items():
        assert (DOCS / "pictures" / name).read_text("utf-8") == text, f"{name}: run python -m tests.support.pages"
    shown = {name for path in PAGES for name in re.findall(r"pictures/(\w+\.svg)\)", path.read_text("utf-8"))}
    assert shown == set(drawn()) - {"favicon.svg"}


def test_the_picture_of_ranks_has_what_was_measured() -> None:
    assert json.loads(LOSSES_BY_RANK.read_text("utf-8")) == losses_by_rank()


def test_the_picture_of_memory_has_the_plans_of_the_recipes() -> None:
    plans = json.loads((DOCS / "pictures" / "plans.json").read_text("utf-8"))
    rows = recipe_rows()
    for plan in plans.values():
        name, *options = plan["command"].removeprefix("hf-galore plan --config ").removesuffix(" --json").split()
        assert plan["peak_bytes"] == sum(plan["breakdown"].values())
        if not options:
            assert float(rows[name].peak) == pytest.approx(plan["peak_bytes"] / 2**30, abs=0.006)
            assert float(rows[name].needs) == pytest.approx(plan["needed_bytes"] / 2**30, abs=0.006)


def test_ranks_for_a_share_of_the_energy_are_those_that_the_notebook_ends_with() -> None:
    cells = json.loads((ROOT / "notebooks" / "02_is_the_gradient_low_rank.ipynb").read_text("utf-8"))["cells"]
    outputs = [output.get("data", {}) for cell in cells for output in cell.get("outputs", [])]
    shown = "".join("".join(data.get("text/html", [])) for data in outputs)
    found = set(re.findall(r">\s*([\d.,]+)\s*</td>", shown))
    table = CHOOSING_PAGE.read_text("utf-8").split("\n| captured energy |")[1].split("\n\n")[0]
    figures = [cell.strip() for row in table.splitlines()[2:] for cell in row.strip("|").split("|")[1:]]
    assert len(figures) == 20
    assert set(figures) <= found


def test_shares_of_energy_by_kind_are_those_that_the_notebook_ends_with() -> None:
    cells = json.loads((ROOT / "notebooks" / "05_other_architectures.ipynb").read_text("utf-8"))["cells"]
    (cell,) = (cell for cell in cells if cell["id"] == "energy")
    html = "".join("".join(output.get("data", {}).get("text/html", [])) for output in cell["outputs"])
    body = html.split("<tbody>")[1]
    shown = [re.findall(r">\s*([^<>\n]+?)\s*</t[dh]>", row) for row in body.split("</tr>")[:-1]]
    table = (DOCS / "how-it-works.md").read_text("utf-8").split("\n| kind |")[1].split("\n\n")[0]
    written_there = [[cell.strip() for cell in row.strip("|").split("|")] for row in table.splitlines()[2:]]
    assert len(shown) == 8
    assert [[cell.replace(" %", "%") for cell in row] for row in written_there] == shown


# ---- what is named


@functools.cache
def functions_of(path: str) -> set[str]:
    """The names of a file's functions."""
    tree = ast.parse((ROOT / path).read_text("utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_tests_and_benchmarks_that_are_named_exist(path: Path) -> None:
    text = path.read_text("utf-8")
    for file, name in re.findall(r"(tests/[\w/]+\.py)::(\w+)", text):
        assert name in functions_of(file), f"{path.name}: {file}::{name}"
    for file in re.findall(r"\b(tests/[\w/.-]+)", text):
        assert (ROOT / file.rstrip(".")).exists(), f"{path.name}: {file}"
    for module in re.findall(r"python -m (tests[\w.]+)", text):
        assert importlib.util.find_spec(module.rstrip(".")) is not None, f"{path.name}: {module}"


def test_every_fault_of_others_has_a_test() -> None:
    rows = [line for line in (DOCS / "faults.md").read_text("utf-8").splitlines() if line.startswith("| ")]
    named = [row for row in rows if "::test_" in row]
    others = [row for row in rows if row not in named]
    assert len(named) > 40
    assert len(others) == 6  # headings of the tables, and a release that pyproject.toml excludes


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_recipes_and_keys_that_are_named_exist(path: Path) -> None:
    text = path.read_text("utf-8")
    for name in re.findall(r"--config ([\w/]+\.yaml)", text):
        below = name.removeprefix("recipes/")
        assert name in ("recipe.yaml", "mine.yaml") or (recipes_folder() / below).is_file(), f"{path.name}: {name}"
    for given in re.findall(r'optim_args[=:] ?"([^"{}…]*)"', text):
        if "rnak" not in given:  # which is told of as a mistake
            GaLoreConfig.from_optim_args(given)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    for target, anchor in re.findall(r"\]\((?!https?:|mailto:)([^)#]*)#?([^)]*)\)", path.read_text("utf-8")):
        file = path.parent / target if target else path
        assert file.exists(), f"{path.name}: {target}"
        if anchor:
            assert anchor in anchors(file), f"{path.name}: {target}#{anchor}"


@functools.cache
def anchors(path: Path) -> set[str]:
    """Those that GitHub, and the site, give to a page's headings."""
    headings = re.findall(r"^#+ (.+)$", path.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


# ---- the site


class _Loader(yaml.SafeLoader):
    """A loader that passes over what only MkDocs knows."""


_Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: None)


def test_every_page_is_in_the_navigation() -> None:
    settings = yaml.load((ROOT / "mkdocs.yml").read_text("utf-8"), Loader=_Loader)
    named: list[str] = []
    for entry in settings["nav"]:
        (value,) = entry.values()
        named += [value] if isinstance(value, str) else [name for one in value for name in one.values()]
    assert sorted(named) == sorted({path.name for path in DOCS.glob("*.md")} | MADE)
    assert settings["theme"]["font"] is False


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="needs the extra docs")
def test_the_site_is_built_without_a_warning_and_fetches_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr  # also after a warning
    pages = list((tmp_path / "site").glob("*.html"))
    assert {page.stem for page in pages} >= {path.stem for path in DOCS.glob("*.md")} | {"changelog", "contributing"}
    for page in pages:
        text = page.read_text("utf-8")
        fetched = re.findall(r"<(?:script|img|iframe|source)[^>]* src=\"?(https?:[^\"\s>]*)", text)
        fetched += re.findall(r"<link[^>]* href=\"?(https?:[^\"\s>]*)", text)
        assert fetched == [], page.name
    assert (tmp_path / "site" / "recipes" / "llama2_7b_oasst2.yaml").is_file()
    made_optimizer = (tmp_path / "site" / "api.html").read_text("utf-8")
    assert "Make an optimizer for a training loop" in made_optimizer
