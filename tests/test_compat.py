"""The matrix of docs/versions.md, and what makes it: tests/compat."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.compat import __main__ as command
from tests.compat.environments import TESTS, all_environments, find_python, paths_of, read
from tests.compat.matrix import BEGIN, END, HEADING, Row, rows_of, with_rows

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # which pytest needs there

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "versions.md").read_text("utf-8")
ENVIRONMENTS = all_environments()


def bounds() -> list[Requirement]:
    """`name==version` of each lower bound that users meet; `dev` and `docs` are for us, with constraints.txt."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = (lines for name, lines in project["optional-dependencies"].items() if name not in ("dev", "docs"))
    wanted = (Requirement(line) for lines in (project["dependencies"], *extras) for line in lines)
    return [Requirement(line) for line in command.lower_bounds(wanted)]


def test_every_lower_bound_is_a_version_that_was_tried() -> None:
    wanted = bounds()
    assert {"torch", "transformers", "trl", "accelerate", "matplotlib"} <= {each.name for each in wanted}
    tried = [row.versions for row in rows_of(TEXT)]
    missing = [
        str(each)
        for each in wanted
        if not any(each.specifier.contains(versions.get(canonicalize_name(each.name), "0")) for versions in tried)
    ]
    assert not missing, "run make test-compat ONLY=oldest WRITE=1"


def test_the_matrix_is_what_the_script_writes() -> None:
    rows = rows_of(TEXT)
    assert with_rows(TEXT, rows, ENVIRONMENTS) == TEXT
    assert [row.name for row in rows] == [name for name in ENVIRONMENTS if name in {row.name for row in rows}]
    for row in rows:
        assert row.python.startswith(f"{ENVIRONMENTS[row.name].python}."), row.name
        assert all((ROOT / path).exists() for path in paths_of(row.tests.split())), row.name
        assert " passed" in row.result, row.name
        assert "failed" not in row.result, row.name


def test_rows_are_written_beside_and_instead_of_others() -> None:
    old, new = (
        Row("b", "3.11.1", {"torch": "2", "rich": "1"}, "core", "1 passed"),
        Row("a", "3.10.1", {}, "x", "2 passed"),
    )
    text = with_rows(f"before {BEGIN}{END} after", [old], ["a", "b"])
    assert rows_of(text) == [old]
    newer = old._replace(result="3 passed", versions={"torch": "3", "my-lib": "2+cpu"})
    text = with_rows(text, [new, newer], ["a", "b"])
    assert rows_of(text) == [new, newer]
    assert text.startswith(f"before {BEGIN}\n\n| {' | '.join(HEADING)} |\n")
    assert "| b | 3.11.1 | 3 | – | – | – | – | – | core | 3 passed |\n" in text
    assert "\n- b: my-lib 2+cpu\n" in text
    assert rows_of(with_rows(text, [], ["b"])) == [newer], "an environment that is no more"


def test_a_table_with_other_columns_is_an_error() -> None:
    text = with_rows(f"{BEGIN}{END}", [], []).replace("TRL", "Trainer")
    with pytest.raises(ValueError, match="has the columns"):
        rows_of(text)


def test_all_environments_can_be_read_and_name_tests_that_there_are() -> None:
    assert {"oldest", "newest", "axolotl", "llamafactory", "unsloth", "ms-swift"} <= set(ENVIRONMENTS)
    assert next(iter(ENVIRONMENTS)) == "oldest"
    assert ENVIRONMENTS["oldest"].lowest
    for environment in ENVIRONMENTS.values():
        for path in paths_of(environment.tests):
            assert (ROOT / path).exists(), f"{environment.name}: {path}"
    assert all((ROOT / path).exists() for paths in TESTS.values() for path in paths)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("# python: 3.11\n", "needs a line"),
        ("# tests: core\n", "needs a line"),
        ("# tests: core\n# python: 3.11\n# python: 3.12\n", "each setting once"),
        ("# tests: core\n# python: 3.11\n# lowest: true\n", "lowest: true; it is 'yes'"),
    ],
)
def test_a_file_that_says_too_little_or_too_much_is_an_error(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text(text)
    with pytest.raises(ValueError, match=words):
        read(tmp_path / "x.txt")


def test_a_python_is_found_on_the_path_and_of_pyenv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def executable(path: Path) -> str:
        path.parent.mkdir(parents=True)
        path.touch()
        path.chmod(0o755)
        return str(path)

    root = tmp_path / "pyenv"
    executable(root / "shims" / "python3.7")
    monkeypatch.setenv("PYENV_ROOT", str(root))
    monkeypatch.setenv("PATH", os.pathsep.join([str(root / "shims"), str(tmp_path / "bin")]))
    assert find_python("3.7") is None, "pyenv's command, which fails for most versions"
    in_pyenv = executable(root / "versions" / "3.7.9" / "bin" / "python")
    executable(root / "versions" / "3.70.1" / "bin" / "python")
    assert find_python("3.7") == in_pyenv
    assert find_python("3.7") != (on_path := executable(tmp_path / "bin" / "python3.7"))
    assert find_python("3.7") == on_path


def test_a_python_that_is_not_there_fails_the_run_unless_it_is_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "find_python", lambda version: None if version == "3.10" else "python")
    monkeypatch.setattr(command, "_copied", lambda folder: folder)
    monkeypatch.setattr(command, "_wheel", lambda folder: folder)
    row = Row("newest", "3.11.1", {"torch": "2"}, "core", "1 passed")
    monkeypatch.setattr(command, "_row", lambda environment, *_: (row, environment.name == "newest"))
    assert command.main([]) == 1
    assert "There is no Python 3.10" in capsys.readouterr().out
    assert command.main(["--only", "newest"]) == 0
    assert "| newest | 3.11.1 | 2 |" in capsys.readouterr().out
    assert command.main(["--only", "newest,unsloth"]) == 1
    assert "unsloth (Python 3.11, torch 2): 1 passed" in capsys.readouterr().out


def test_a_failure_says_what_the_environment_stands_for() -> None:
    versions = {"transformers": "5.25.0", "torch": "2.13.0", "rich": "1"}
    assert command.told(ENVIRONMENTS["newest"], versions) == (
        "newest allowed (Python 3.11, torch 2.13.0, transformers 5.25.0)"
    )


def test_results_are_counted(tmp_path: Path) -> None:
    results = tmp_path / "results.xml"
    suite = '<testsuite tests="1010" failures="1" errors="1" skipped="3"/>'
    results.write_text(f"<testsuites>{suite}</testsuites>")
    assert command.counted(results) == "1,005 passed, 2 failed, 3 skipped"
    results.write_text('<testsuites><testsuite tests="2" failures="0" errors="0" skipped="0"/></testsuites>')
    assert command.counted(results) == "2 passed"


def test_a_name_that_is_no_environment_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["--only", "newest,older"])
    assert "--only older: there is no such environment, but oldest," in capsys.readouterr().err
