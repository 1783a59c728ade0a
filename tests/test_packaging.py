"""What installs put where: a wheel brings the recipes along, and an editable install ends with its checkout."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from hf_galore.recipes import known_recipes

ROOT = Path(__file__).parents[1]
PARTS = ("hf_galore", "recipes", "tests", "pyproject.toml", "hatch_build.py", "README.md", "CHANGELOG.md", "LICENSE")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    folder = tmp_path / "checkout"
    folder.mkdir()
    for name in PARTS:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, folder)
    return folder


def built(kind: str, source: Path, into: Path) -> Path:
    """What pip would make of a source tree: `wheel`, `editable` or `sdist`."""
    into.mkdir(exist_ok=True)
    code = "import sys; from hatchling import build; print(getattr(build, sys.argv[1])(sys.argv[2]))"
    command = [sys.executable, "-c", code, f"build_{kind}", str(into)]
    run = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return into / run.stdout.splitlines()[-1]


def files_of(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_an_editable_install_whose_checkout_is_gone_is_gone_too(checkout: Path, tmp_path: Path) -> None:
    """A folder that was left would be an empty package: `import hf_galore`, the whole switch, would succeed, and the
    Trainer would train with its own optimizers."""
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=False)
    python = str(environment / ("Scripts" if os.name == "nt" else "bin") / "python")
    wheel = built("editable", checkout, tmp_path / "built")
    install = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*install, "--disable-pip-version-check", str(wheel)], check=True)

    def python_says(code: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([python, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)

    origin = python_says("import importlib.util; print(importlib.util.find_spec('hf_galore').origin)")
    assert origin.stdout.strip() == str(checkout / "hf_galore" / "__init__.py")
    shutil.rmtree(checkout)
    imported = python_says("import hf_galore")
    assert imported.returncode == 1
    assert imported.stderr.splitlines()[-1] == "ModuleNotFoundError: No module named 'hf_galore'"


def test_a_wheel_brings_the_recipes_along(checkout: Path, tmp_path: Path) -> None:
    """Of a checkout, and of the sdist of one."""
    expected = files_of(ROOT / "recipes")
    assert "quickstart.yaml" in expected
    with tarfile.open(built("sdist", checkout, tmp_path / "built")) as archive:
        archive.extractall(tmp_path / "sdist", filter="data")
    (unpacked,) = (tmp_path / "sdist").iterdir()
    for source in (checkout, unpacked):
        with zipfile.ZipFile(built("wheel", source, tmp_path / "built")) as wheel:
            wheel.extractall(tmp_path / source.name / "installed")
        assert files_of(tmp_path / source.name / "installed" / "hf_galore" / "recipes" / "bundled") == expected


@pytest.mark.slow
def test_an_installed_package_finds_them(checkout: Path, tmp_path: Path) -> None:
    installed = tmp_path / "installed"
    with zipfile.ZipFile(built("wheel", checkout, tmp_path / "built")) as wheel:
        wheel.extractall(installed)
    found = "str(recipes_folder()), known_recipes()"
    code = f"import json; from hf_galore.recipes import *; print(json.dumps([{found}]))"
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(run.stdout) == [str(installed / "hf_galore" / "recipes" / "bundled"), known_recipes()]
