"""What installs put where: a wheel brings the recipes along, and an editable install ends with its checkout. What
would be published is made as `make dist` makes it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from email import message_from_bytes
from email.message import Message
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from hf_galore import __version__
from hf_galore.recipes import known_recipes

ROOT = Path(__file__).parents[1]
PARTS = (
    "hf_galore",
    "recipes",
    "tests",
    "docs",
    "notebooks/*.ipynb",
    "notebooks/pictures",
    "pyproject.toml",
    "constraints.txt",
    "hatch_build.py",
    "mkdocs.yml",
    "Makefile",
    "README.md",
    "CHANGELOG.md",
    "CITATION.cff",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "LICENSE",
)


class Published(NamedTuple):
    """What would be published of a checkout."""

    checkout: Path
    sdist: Path
    wheel: Path

    def metadata(self) -> Message:
        """What the wheel says of itself."""
        with zipfile.ZipFile(self.wheel) as wheel:
            return message_from_bytes(wheel.read(f"hf_galore-{__version__}.dist-info/METADATA"))


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    return copied_checkout(tmp_path)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Published:
    """The sdist, and the wheel that is made of it."""
    folder = tmp_path_factory.mktemp("published")
    source = copied_checkout(folder)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder / "dist"), str(source)]
    # Elsewhere than in a checkout, where a folder named build would be taken for the module.
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    sdist, wheel = sorted((folder / "dist").iterdir(), key=lambda path: path.suffix)
    return Published(source, sdist, wheel)


def copied_checkout(into: Path) -> Path:
    folder = into / "checkout"
    for path in (path for name in PARTS for path in ROOT.glob(name)):
        copy = folder / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            shutil.copytree(path, copy, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(path, copy)
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
    found = (path for path in folder.rglob("*") if path.is_file() and path.parent.name != "__pycache__")
    return sorted(path.relative_to(folder).as_posix() for path in found)


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
    template = "any_recipe.parse(['--config', 'llama2_7b_oasst2.yaml'], '', '').training.chat_template_path"
    found = f"str(recipes_folder()), known_recipes(), {template}"
    code = (
        "import json; from hf_galore.recipes import *; from hf_galore.recipes import any_recipe; "
        f"print(json.dumps([{found}]))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        check=True,
    )
    folder = installed / "hf_galore" / "recipes" / "bundled"
    # The recipe names it as in a checkout, where the folder is `recipes`.
    assert json.loads(run.stdout) == [str(folder), known_recipes(), str(folder / "chatml")]


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_an_index_would_take_what_is_published(published: Published) -> None:
    command = [sys.executable, "-m", "twine", "check", "--strict", str(published.sdist), str(published.wheel)]
    run = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "NO_COLOR": "1"})
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.count("PASSED") == 2


def test_a_wheel_is_the_package_and_the_recipes_and_no_tests(published: Published) -> None:
    package = [f"hf_galore/{name}" for name in files_of(published.checkout / "hf_galore")]
    recipes = [f"hf_galore/recipes/bundled/{name}" for name in files_of(ROOT / "recipes")]
    assert "hf_galore/py.typed" in package
    information = ("METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE")
    of_the_wheel = [f"hf_galore-{__version__}.dist-info/{name}" for name in information]
    assert sorted(contents(published.wheel)) == sorted([*package, *recipes, *of_the_wheel])


def test_a_wheel_brings_a_command_to_axolotl(published: Published) -> None:
    """By the entry point that axolotl asks for; `tests/beside` runs it."""
    points = contents(published.wheel)[f"hf_galore-{__version__}.dist-info/entry_points.txt"].decode()
    assert "[axolotl.cli_commands]\ngalore-plan = hf_galore.cli.axolotl_plan:command" in points


def test_an_sdist_is_the_checkout(published: Published, tmp_path: Path) -> None:
    with tarfile.open(published.sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    held = set(files_of(tmp_path / f"hf_galore-{__version__}"))
    assert held - {"PKG-INFO"} == set(files_of(published.checkout))


def test_an_sdist_makes_the_wheel_of_its_checkout(published: Published, tmp_path: Path) -> None:
    of_checkout = built("wheel", published.checkout, tmp_path / "built")
    assert of_checkout.name == published.wheel.name
    assert contents(of_checkout) == contents(published.wheel)


def test_metadata(published: Published) -> None:
    metadata = published.metadata()
    assert metadata["Name"] == "hf-galore"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert "Typing :: Typed" in metadata.get_all("Classifier", [])
    # No address of a repository until there is one.
    assert metadata.get_all("Project-URL") == ["Paper, https://arxiv.org/abs/2403.03507"]
    payload = metadata.get_payload(decode=True)
    assert isinstance(payload, bytes)
    assert payload.decode().strip() == (ROOT / "README.md").read_text("utf-8").strip()


def test_the_version_is_in_one_place(checkout: Path, tmp_path: Path) -> None:
    assert released(ROOT / "CHANGELOG.md") == ["Unreleased", __version__]
    for name in ("pyproject.toml", "CITATION.cff", "README.md", "CONTRIBUTING.md", "SECURITY.md"):
        assert not re.search(rf"(?<![\d.=]){re.escape(__version__)}(?![\d.])", (ROOT / name).read_text("utf-8")), name
    version = checkout / "hf_galore" / "version.py"
    version.write_text(version.read_text("utf-8").replace(__version__, "9.8.7"), "utf-8")
    assert built("wheel", checkout, tmp_path / "built").name == "hf_galore-9.8.7-py3-none-any.whl"


def released(changelog: Path) -> list[str]:
    """The first two headings of a changelog, without what follows the version."""
    return [heading.split()[0] for heading in re.findall(r"^## (.+)$", changelog.read_text("utf-8"), re.MULTILINE)[:2]]


def test_a_citation_is_of_this_software_and_of_the_paper(published: Published) -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    metadata = published.metadata()
    assert citation["cff-version"] == "1.2.0"
    assert citation["type"] == "software"
    assert citation["license"] == metadata["License-Expression"]
    assert [author["name"] for author in citation["authors"]] == [metadata["Author"]]
    (paper,) = citation["references"]
    assert f"Paper, {paper['url']}" in metadata.get_all("Project-URL", [])
    assert len(paper["authors"]) == 6
    arxiv = paper["url"].rpartition("/")[2]
    assert paper["identifiers"] == [{"type": "doi", "value": f"10.48550/arXiv.{arxiv}"}]
