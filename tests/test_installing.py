"""The lines by which README and the notebooks install hf_galore: from one constant, and pip can do what they say."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.installing import (
    NOTEBOOK_EXTRAS,
    PUBLISHED,
    README,
    README_EXTRAS,
    notebook_line,
    readme_line,
    with_notebook_line,
    with_readme_line,
)
from tests.support.notebooks import FOLDER, NAMES, ROOT

README_TEXT = README.read_text("utf-8")
NOTEBOOK_TEXTS = {name: (FOLDER / name).read_text("utf-8") for name in NAMES}


def test_readme_and_notebooks_say_what_the_constant_does() -> None:
    assert with_readme_line(README_TEXT) == README_TEXT
    for name, text in NOTEBOOK_TEXTS.items():
        assert with_notebook_line(text) == text, f"{name}: run python -m tests.support.installing"


def test_once_published_they_say_the_name() -> None:
    published = with_readme_line(README_TEXT, published=True)
    line = r"^\$ pip install 'hf-galore\[cli\]' +# or, in a checkout: pip install '\.\[cli\]'$"
    assert re.search(line, published, re.MULTILINE)
    assert with_readme_line(published, published=False) == with_readme_line(README_TEXT, published=False)
    for text in NOTEBOOK_TEXTS.values():
        published = with_notebook_line(text, published=True)
        cell = next(cell for cell in json.loads(published)["cells"] if cell["cell_type"] == "code")
        assert cell["source"][-1].strip() == '%pip install --quiet "hf-galore[notebooks]"'
        assert with_notebook_line(published, published=False) == with_notebook_line(text, published=False)


def test_a_text_without_the_line_or_with_two_is_an_error() -> None:
    for text in ("# hf_galore\n", f"{readme_line()}\n{readme_line()}\n"):
        with pytest.raises(ValueError, match=rf"README has {text.count('$')} lines that install hf_galore"):
            with_readme_line(text)


@pytest.mark.skipif(PUBLISHED, reason="there is a name to install it by")
def test_nothing_else_installs_by_a_name_that_is_not_published() -> None:
    """With extras it may: that is for where hf_galore is installed, which is what pip takes then."""
    texts = [README, *(ROOT / "docs").rglob("*.md"), *(ROOT / "recipes").rglob("*.yaml"), *FOLDER.glob("*.ipynb")]
    by_name = re.compile(r"pip install [^\n#`]*\bhf[-_]galore(?!\[)\b.*")
    assert not {path.name: found for path in texts if (found := by_name.findall(path.read_text("utf-8")))}


@pytest.mark.skipif(PUBLISHED, reason="then it takes an index")
@pytest.mark.parametrize(
    ("line", "folder", "extras"),
    [(readme_line(), ROOT, README_EXTRAS), (notebook_line(), FOLDER, NOTEBOOK_EXTRAS)],
    ids=["README", "notebook"],
)
def test_pip_takes_this_checkout_by_them(line: str, folder: Path, extras: str) -> None:
    given = shlex.split(line, comments=True)[-1]
    options = ["--dry-run", "--ignore-installed", "--no-deps", "--no-index", "--no-build-isolation", "--quiet"]
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", *options, "--report", "-", given]
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    (found,) = json.loads(run.stdout)["install"]
    assert found["metadata"]["name"] == "hf-galore"
    assert found["download_info"]["url"] == ROOT.as_uri()
    assert found.get("requested_extras", []) == ([extras] if extras else [])
