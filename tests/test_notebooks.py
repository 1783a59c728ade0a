"""The notebooks run from top to bottom, and what is committed is such a run."""

from __future__ import annotations

import ast
import base64
import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from hf_galore import GaLoreConfig
from hf_galore.recipes import configs_folder, recipes_folder
from hf_galore.recipes.catalog import catalog
from tests.support.installing import PUBLISHED, notebook_line
from tests.support.notebooks import FOLDER, NAMES, execute, read

BADGE = "https://colab.research.google.com/github/hf-galore/hf_galore/blob/main/notebooks/{name}"
# Of the machine that made the outputs: home folders, checkouts, Pythons, temporary files.
PATHS = re.compile(r"/(?:work|root|home|Users|tmp|usr|opt)/[\w.-]+")
CARDS = ("cpu", "t4", "24gb")

every_notebook = pytest.mark.parametrize("name", NAMES)


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(notebook: Any) -> list[Any]:
    return [output for cell in code_cells(notebook) for output in cell.outputs]


def pictures(notebook: Any) -> list[bytes]:
    return [base64.b64decode(o.data["image/png"]) for o in outputs(notebook) if "image/png" in o.get("data", {})]


def kinds(notebook: Any) -> list[list[tuple[str, ...]]]:
    """What each cell put out, by kind: what two runs have in common. Not what it wrote to stderr."""
    return [
        [(o.output_type, *sorted(o.get("data", {}))) for o in cell.outputs if o.get("name") != "stderr"]
        for cell in code_cells(notebook)
    ]


def parsed(source: str) -> ast.Module:
    """The cell without lines that are IPython's."""
    return ast.parse("\n".join(re.sub(r"^( *)[%!].*", r"\1pass", line) for line in source.splitlines()))


def assigned(source: str) -> set[str]:
    """The names in capitals that `source` assigns."""
    targets = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name))
    return {node.id for node in targets if isinstance(node.ctx, ast.Store) and node.id.isupper()}


def test_there_are_notebooks() -> None:
    assert NAMES
    assert [name[:3] for name in NAMES] == [f"{number:02}_" for number in range(1, len(NAMES) + 1)]


@every_notebook
def test_imports_what_is_public(name: str) -> None:
    """Names that a package lists in its `__all__`, so that a notebook goes on to run when files move."""
    nodes = [node for cell in code_cells(read(FOLDER / name)) for node in ast.walk(parsed(cell.source))]
    imported = [node for node in nodes if isinstance(node, ast.ImportFrom) and str(node.module).startswith("hf_galore")]
    assert any(isinstance(node, ast.Import) and "hf_galore" in {a.name for a in node.names} for node in nodes)
    for node in imported:
        package = importlib.import_module(str(node.module))
        assert package.__spec__ is not None
        assert package.__spec__.submodule_search_locations is not None, f"{node.module} is a file of a package"
        assert {alias.name for alias in node.names} <= set(package.__all__)


@pytest.mark.slow
@every_notebook
def test_runs_from_top_to_bottom(name: str, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in FOLDER.iterdir()}
    executed = execute(FOLDER / name, tmp_path)
    assert [cell.execution_count for cell in code_cells(executed)] == list(range(1, len(code_cells(executed)) + 1))
    # The outputs that are committed are of these very cells.
    assert kinds(read(FOLDER / name)) == kinds(executed)
    assert {path: path.stat().st_mtime_ns for path in FOLDER.iterdir()} == before


@every_notebook
def test_committed_outputs_are_a_whole_run(name: str) -> None:
    notebook = read(FOLDER / name)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), "run make notebooks"
    assert "error" not in {output.output_type for output in outputs(notebook)}
    assert all(picture.startswith(b"\x89PNG") for picture in pictures(notebook))
    if any("plt.show()" in cell.source for cell in cells):
        drawn = [cell for cell in cells if "plt.show()" in cell.source]
        assert len(pictures(notebook)) >= len(drawn)


@every_notebook
def test_committed_outputs_have_no_noise(name: str) -> None:
    notebook = read(FOLDER / name)
    text = "\n".join(str(output) for output in outputs(notebook))
    assert not PATHS.findall(text)
    for noise in ("Warning", "it/s]", "widget-view", "Failed to load"):
        assert noise not in text
    assert notebook.metadata.kernelspec.name == "python3"


@every_notebook
def test_begins_with_badge_and_installation(name: str) -> None:
    notebook = read(FOLDER / name)
    first, second = notebook.cells[:2]
    assert first.cell_type == "markdown"
    assert first.source.startswith("# ")
    assert f"]({BADGE.format(name=name)})" in first.source
    assert second.cell_type == "code"
    condition, installation = second.source.rsplit(":\n", 1)
    assert condition.endswith('if importlib.util.find_spec("hf_galore") is None')
    assert installation.strip() == notebook_line()
    # Nowhere else is anything installed.
    assert sum("%pip" in cell.source for cell in code_cells(notebook)) == 1


@every_notebook
def test_says_what_it_needs_and_looks_whether_that_is_there(name: str) -> None:
    """In words at its head, and by the doctor before transformers is imported, which a wrong torchvision breaks."""
    title, _, check = read(FOLDER / name).cells[:3]
    assert [f'`"{card}"`' in title.source for card in CARDS] == [True, True, True]
    # Opened alone, a notebook has no folder above it to install.
    cloned = all(words in title.source for words in ("`!git clone https:", "`%cd hf_galore/notebooks`"))
    assert cloned != PUBLISHED
    for word in ("Runtime > Change runtime type > T4 GPU", "L4 or A100", "Restart session", "torchvision", "licence"):
        assert word in title.source, word
    modules = {node.module for node in ast.walk(parsed(check.source)) if isinstance(node, ast.ImportFrom)}
    assert modules == {"hf_galore.doctor"}
    assert "print(report().short())" in check.source
    (shown,) = check.outputs
    assert "Nothing stops a training here" in shown.text


def settings(name: str) -> ast.Module:
    """The cell with the settings."""
    (source,) = (cell.source for cell in code_cells(read(FOLDER / name)) if cell.get("id") == "settings")
    tree: ast.Module = ast.parse(str(source))
    return tree


def of_card(name: str, card: str) -> str:
    """The settings of one card: what runs if that is chosen."""
    cell = settings(name)
    (choice, branches) = cell.body
    assert ast.unparse(choice) == "CARD = 'cpu'"
    found: dict[str, str] = {}
    branch: ast.stmt = branches
    while isinstance(branch, ast.If):
        assert isinstance(branch.test, ast.Compare)
        assert ast.unparse(branch.test.left) == "CARD"
        found[str(ast.literal_eval(branch.test.comparators[0]))] = "\n".join(map(ast.unparse, branch.body))
        branch = branch.orelse[0] if branch.orelse else ast.Pass()
    assert tuple(found) == CARDS
    return found[card]


@every_notebook
def test_a_card_changes_one_word(name: str) -> None:
    """Each card gives a value to the same names."""
    names = [assigned(of_card(name, card)) for card in CARDS]
    assert names[0]
    assert names[0] == names[1] == names[2]


def values(name: str, card: str) -> dict[str, Any]:
    """What the settings of a card, not those of the CPU, give to each name; and `asked`, the models that are needed."""
    asked: list[str] = []
    known: dict[str, Any] = {"recipes_folder": recipes_folder, "configs_folder": configs_folder}
    found: dict[str, Any] = {}
    exec(of_card(name, card), {**known, "need_model": asked.append}, found)
    return {**found, "asked": asked}


@every_notebook
def test_what_a_card_needs(name: str) -> None:
    """A T4 has no bfloat16, and its model is open; a model with a licence is asked for before anything is loaded."""
    small, large = values(name, "t4"), values(name, "24gb")
    assert small["asked"] == []
    assert "meta-llama" not in str(small)
    assert small.get("DTYPE", "float32") == "float32"
    assert not small.get("BF16", False)
    assert large["asked"] == [large["MODEL"] for _ in range(1) if "meta-llama" in str(large)]
    for found in (small, large):
        template = found.get("CHAT_TEMPLATE")
        assert template is None or (Path(template) / "chat_template.jinja").is_file()
        config = found.get("CONFIG")
        assert config is None or (config / "config.json").is_file()


@every_notebook
def test_on_a_card_progress_is_shown_and_what_came_of_it_is_saved(name: str) -> None:
    code = "\n".join(cell.source for cell in code_cells(read(FOLDER / name)))
    assert ("trainer.train(" in code) == ('disable_tqdm=CARD == "cpu"' in code)
    assert "disable_tqdm=True" not in code
    assert "save_strategy=SAVE" in code or '.to_csv("' in code
    if "save_strategy=SAVE" in code:
        assert [values(name, card)["SAVE"] for card in CARDS[1:]] == ["steps", "steps"]
        assert "resume_from_checkpoint=checkpoint" in code


OF_RECIPES = {"t4": "qwen3_0.6b_oasst2_t4.yaml", "24gb": "llama2_7b_oasst2.yaml"}


@pytest.mark.parametrize("card", OF_RECIPES)
def test_the_quickstart_trains_on_a_card_as_a_recipe_does(card: str) -> None:
    """So that the recipe's plan, which the notebook gives, is its own too."""
    peaks = {recipe.name: recipe.peak_gib for recipe in catalog()}
    recipe = yaml.safe_load((recipes_folder() / OF_RECIPES[card]).read_text(encoding="utf-8"))
    found = values("01_quickstart.ipynb", card)
    options = GaLoreConfig.from_optim_args(recipe["optim_args"])
    assert found["MODEL"] == recipe["model_name_or_path"]
    assert found["DATA"] == recipe["dataset_name"]
    assert (found["OPTIM"], found["TARGETS"]) == (recipe["optim"], recipe["optim_target_modules"])
    assert (found["RANK"], found["GAP"], found["SCALE"]) == (options.rank, options.update_proj_gap, options.scale)
    assert (found["DTYPE"], found["FP16"]) == (recipe.get("dtype", "float32"), recipe.get("fp16", False))
    assert (found["BATCH"], found["MAX_LENGTH"]) == (recipe["per_device_train_batch_size"], recipe["max_length"])
    assert found["LEARNING_RATE"] == recipe["learning_rate"]
    row = next(line for line in read(FOLDER / "01_quickstart.ipynb").cells[-1].source.splitlines() if "peak" in line)
    assert row.split("|")[3 if card == "t4" else 4].strip() == f"{peaks[OF_RECIPES[card]]:.1f} GiB"
