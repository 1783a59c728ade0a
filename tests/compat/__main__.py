"""Run the tests on other versions of Python and of the libraries that we stand on, and print a matrix.

`python -m tests.compat` makes the environments of this folder, a virtual environment each, from the wheel and away from
the checkout; `--only oldest,newest` some of them, `--write` puts their rows into docs/versions.md, `--list` names them.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from email import message_from_bytes
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from rich.console import Console
from uv import find_uv_bin

from .environments import COLUMNS, Environment, all_environments, find_python, paths_of
from .matrix import Row, markdown, with_rows

ROOT = Path(__file__).parents[2]
ENVIRONMENTS = ROOT / ".compat"
DOCS = ROOT / "docs" / "versions.md"
# A checkout, but for the package: tests would take that instead of the one that is installed.
COPIED = (
    *("tests", "recipes", "docs", "notebooks", "hatch_build.py", "pyproject.toml", "constraints.txt", "Makefile"),
    "mkdocs.yml",
    *("README.md", "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "SECURITY.md", "LICENSE"),
)
# What runs the tests is everywhere what constraints.txt has: its versions say nothing of ours.
TOOLS = ("pytest", "pytest-xdist", "hypothesis", "galore-torch")
CONSTRAINTS = ROOT / "constraints.txt"
# uv reads none of pip's settings.
SETTINGS = {
    "PIP_INDEX_URL": "UV_DEFAULT_INDEX",
    "PIP_EXTRA_INDEX_URL": "UV_INDEX",
    "PIP_FIND_LINKS": "UV_FIND_LINKS",
    "PIP_CERT": "SSL_CERT_FILE",
}

console = Console(soft_wrap=True, highlight=False, markup=False)


class CouldNotBeMadeError(Exception):
    """An environment that could not be made, in words."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Make environments and run their tests; return 0 where all passed, and 1 otherwise."""
    known = all_environments()
    parser = argparse.ArgumentParser(prog="python -m tests.compat", description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join(known), help="names of environments, with commas between")
    parser.add_argument("--tests", nargs="+", help="run these, words or paths, instead of those that the files name")
    parser.add_argument("--write", action="store_true", help="write the rows into docs/versions.md")
    parser.add_argument("--list", action="store_true", help="print the environments and end")
    parser.add_argument("--workers", default="auto", help="processes that run tests (default: as many as cores)")
    chosen = parser.parse_args(arguments)
    names = chosen.only.split(",")
    unknown = sorted(set(names) - set(known))
    if unknown:
        parser.error(f"--only {','.join(unknown)}: there is no such environment, but {', '.join(known)}")
    environments = [known[name] for name in names]
    if chosen.list:
        for each in environments:
            console.print(
                f"{each.name}: Python {each.python} ({find_python(each.python) or 'not found'}), {each.tests}"
            )
        return 0
    rows, failed = _run(environments, chosen.tests, chosen.workers)
    if chosen.write:
        DOCS.write_text(with_rows(DOCS.read_text("utf-8"), rows, known), "utf-8")
    console.print("\n".join(["", *markdown(rows), "", *failed]))
    return 1 if failed else 0


def _run(environments: Sequence[Environment], tests: Sequence[str] | None, workers: str) -> tuple[list[Row], list[str]]:
    """The rows of the environments, and what failed."""
    missing = sorted({each.python for each in environments if find_python(each.python) is None})
    if missing:
        # At once: the others take an hour, and would be no answer.
        needed = ", ".join(missing)
        return [], [f"There is no Python {needed}, neither on the PATH nor of pyenv. Install it, or use --only."]
    rows, failed = [], []
    with tempfile.TemporaryDirectory() as folder:
        checkout = _copied(Path(folder))
        wheel = _wheel(Path(folder))
        for each in environments:
            console.rule(each.name)
            try:
                row, passed = _row(each, tests or each.tests, wheel, checkout, workers)
            except CouldNotBeMadeError as error:
                failed.append(f"{each.name}: {error}")
                continue
            rows.append(row)
            if not passed:
                failed.append(f"{told(each, row.versions)}: {row.result}")
    return rows, failed


def told(environment: Environment, versions: Mapping[str, str]) -> str:
    """An environment in words that say what it stands for, as a failure begins."""
    allowed = {"newest": "newest allowed", "oldest": "oldest allowed"}.get(environment.name, environment.name)
    found = ", ".join(f"{name} {versions[name]}" for name in COLUMNS if name in versions)
    return f"{allowed} (Python {environment.python}, {found})"


def _row(environment: Environment, tests: Sequence[str], wheel: Path, checkout: Path, workers: str) -> tuple[Row, bool]:
    python = _made(environment, wheel)
    versions = _versions(python, wheel, environment)
    console.print(told(environment, versions))
    results = checkout / "results.xml"
    results.unlink(missing_ok=True)
    command = [str(python), "-m", "pytest", "-q", "-n", workers, "--dist", "worksteal", "-m", "not gpu"]
    run = subprocess.run(
        [*command, "--junitxml", str(results), *paths_of(tests)],
        cwd=checkout,
        # One thread each, as many processes as cores; the package that is installed, not a checkout's; and bytecode is
        # written, whatever the machine says: uv leaves that to the first import, and each process would compile anew.
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": "",
            "PYTHONDONTWRITEBYTECODE": "",
            **_variables(environment),
        },
        check=False,
    )
    result = counted(results) if results.exists() else f"pytest ended with {run.returncode} and no results"
    full = _says(python, "import platform; print(platform.python_version())")
    return Row(environment.name, full, versions, " ".join(tests), result), run.returncode == 0


def _variables(environment: Environment) -> dict[str, str]:
    return dict(each.split("=", 1) for each in environment.variables)


def counted(results: Path) -> str:
    """What a JUnit file of pytest says: `3 passed, 1 failed, 2 skipped`."""
    (suite,) = ElementTree.parse(results).getroot().iter("testsuite")
    count = {name: int(suite.attrib[name]) for name in ("tests", "failures", "errors", "skipped")}
    failed = count["failures"] + count["errors"]
    parts = {"passed": count["tests"] - failed - count["skipped"], "failed": failed, "skipped": count["skipped"]}
    return ", ".join(f"{number:,} {word}" for word, number in parts.items() if number or word == "passed")


def _copied(folder: Path) -> Path:
    """A copy of the checkout without the package."""
    copy = folder / "checkout"
    copy.mkdir()
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, copy / name)
    return copy


def _wheel(folder: Path) -> Path:
    # Elsewhere than in the checkout, where a folder named build would be taken for the module.
    _quietly([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)], folder)
    (wheel,) = folder.glob("*.whl")
    return wheel


def _made(environment: Environment, wheel: Path) -> Path:
    """The interpreter of a new virtual environment with the wheel and what runs the tests in it."""
    folder = ENVIRONMENTS / environment.name
    interpreter = find_python(environment.python)
    assert interpreter is not None
    _uv("venv", "--clear", "--python", interpreter, str(folder))
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    install = ("pip", "install", "--python", str(python))
    extras = f"[{','.join(environment.extras)}]" if environment.extras else ""
    tools = [line for line in CONSTRAINTS.read_text("utf-8").splitlines() if line.partition("==")[0] in TOOLS]
    bounds = lower_bounds(_wanted_by(wheel, environment)) if environment.lowest else ()
    # In one call: so it is said where they cannot be together.
    wanted = ("-r", str(environment.requirements), f"hf-galore{extras} @ {wheel.as_uri()}", *bounds)
    _uv(*install, *wanted, *tools)
    if environment.beside:
        _uv(*install, "--dry-run", *wanted, *environment.beside)
    if environment.alone:
        _uv(*install, "--no-deps", *environment.alone)
    found = Path(_says(python, "import hf_galore; print(hf_galore.__file__)"))
    if folder not in found.parents:
        raise CouldNotBeMadeError(f"hf_galore is {found}, which is not in {folder}.")
    return python


def _wanted_by(wheel: Path, environment: Environment) -> list[Requirement]:
    """What a wheel asks for with the environment's extras."""
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        written = message_from_bytes(archive.read(metadata)).get_all("Requires-Dist", [])
    extras = ("", *environment.extras)
    found = map(Requirement, written)
    return [
        each for each in found if each.marker is None or any(each.marker.evaluate({"extra": extra}) for extra in extras)
    ]


def lower_bounds(wanted: Iterable[Requirement]) -> list[str]:
    """Requirements of the lower bounds: `name==version`, of each that has one."""
    return [
        f"{each.name}=={specifier.version}"
        for each in wanted
        for specifier in each.specifier
        if specifier.operator == ">="
    ]


def _versions(python: Path, wheel: Path, environment: Environment) -> dict[str, str]:
    """The versions of what the wheel asks for there and of what the environment's file names, by normalized names."""
    pinned = environment.requirements.read_text("utf-8").splitlines()
    wanted = [*map(Requirement, (line for line in pinned if line and not line.startswith("#")))]
    wanted += [*map(Requirement, environment.alone), *_wanted_by(wheel, environment)]
    installed = json.loads(_uv("pip", "list", "--format", "json", "--python", str(python)))
    found: dict[str, str] = {canonicalize_name(each["name"]): each["version"] for each in installed}
    names = sorted({canonicalize_name(each.name) for each in wanted} - {canonicalize_name("hf-galore")})
    return {name: found[name] for name in names if name in found}


def _says(python: Path, code: str) -> str:
    # From a folder that has no modules: neither those of a checkout nor of the folder that this runs in.
    return _quietly([str(python), "-I", "-c", code], ENVIRONMENTS).strip()


def _uv(*arguments: str) -> str:
    settings = {theirs: os.environ[ours] for ours, theirs in SETTINGS.items() if ours in os.environ}
    # What is on this process' path is nothing for those that uv starts, to build what has no wheel.
    return _quietly([find_uv_bin(), *arguments], ROOT, {**settings, **os.environ, "PYTHONPATH": ""})


def _quietly(command: Sequence[str], folder: Path, env: Mapping[str, str] | None = None) -> str:
    folder.mkdir(exist_ok=True)
    run = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
    if run.returncode:
        raise CouldNotBeMadeError(f"{' '.join(command)} ended with {run.returncode}:\n{run.stdout}{run.stderr}")
    return run.stdout


if __name__ == "__main__":
    sys.exit(main())
