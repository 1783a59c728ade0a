"""The notebooks run from top to bottom, and what is committed is such a run."""

from __future__ import annotations

import ast
import base64
import importlib
import re
from pathlib import Path
from typing import Any

import pytest

from tests.support.installing import notebook_line
from tests.support.notebooks import FOLDER, NAMES, execute, read

BADGE = "https://colab.research.google.com/github/hf-galore/hf_galore/blob/main/notebooks/{name}"
# Of the machine that made the outputs: home folders, checkouts, Pythons, temporary files.
PATHS = re.compile(r"/(?:work|root|home|Users|tmp|usr|opt)/[\w.-]+")
COMMENTED = re.compile(r"^# ([A-Z][A-Z0-9_]*(?:, [A-Z][A-Z0-9_]*)* = .*)$", re.MULTILINE)

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
    for noise in ("Warning", "it/s]", "widget-view"):
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
def test_a_card_changes_one_cell(name: str) -> None:
    """The settings of a card, taken out of their comments, are Python and give new values to names that are there."""
    cells = [cell for cell in code_cells(read(FOLDER / name)) if cell.metadata.get("id", cell.id) == "settings"]
    assert len(cells) == 1
    source = cells[0].source
    of_card = "\n".join(match[1] for match in COMMENTED.finditer(source))
    assert assigned(of_card)
    assert assigned(of_card) <= assigned(source)
