"""The programs of docs/devices.md, in two processes."""

from __future__ import annotations

from pathlib import Path

from tests.support.pages import ROOT
from tests.support.snippets import snippets_of
from tests.support.warm import launch

PAGE = ROOT / "docs" / "devices.md"


def test_programs_of_the_page(tmp_path: Path) -> None:
    """Both processes have the weights that one would have, and those have moved."""
    programs = [one.text for one in snippets_of(PAGE) if one.kind == "python"]
    assert len(programs) == 2
    for number, program in enumerate(programs):
        (tmp_path / f"{number}.py").write_text(program, "utf-8")
    launch(2, "tests.support.page_script", str(tmp_path))
    assert sorted(path.name for path in tmp_path.glob("done-*")) == ["done-0", "done-1"]
