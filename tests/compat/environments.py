"""The environments of `python -m tests.compat`: one file `<name>.txt` each, requirements with settings in comments."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).parent

# What a file may say of its tests in a word; what is no word is a path.
TESTS: Mapping[str, tuple[str, ...]] = {
    "core": (
        *("tests/optim", "tests/backward", "tests/integrations"),
        *("tests/test_config.py", "tests/test_import_cost.py"),
    ),
    # Of other libraries it stands on torch alone.
    "arithmetic": ("tests/lowrank", "tests/rules", "tests/kernels"),
    "commands": ("tests/cli", "tests/plan", "tests/recipes", "tests/compare"),
    # What finds moved names and changed signatures in a few minutes.
    "quick": (
        *("tests/integrations", "tests/backward/test_windows.py", "tests/optim/test_build.py"),
        *("tests/test_import_cost.py", "tests/plan/test_fakes.py", "tests/recipes/test_parser.py"),
        *("tests/recipes/test_sft_loading.py", "tests/cli/test_commands.py"),
    ),
}

# What the matrix has a column for. All that an environment's wheel asks for is listed below the matrix.
COLUMNS: Mapping[str, str] = {
    "torch": "torch",
    "transformers": "transformers",
    "trl": "TRL",
    "accelerate": "accelerate",
    "datasets": "datasets",
    "peft": "PEFT",
}


class Environment(NamedTuple):
    """What is installed, on which Python, and what is run there."""

    name: str
    python: str
    """`3.11`."""
    tests: tuple[str, ...]
    """Words of `TESTS`, and paths."""
    extras: tuple[str, ...] = ()
    """Of hf-galore."""
    alone: tuple[str, ...] = ()
    """Requirements that are installed last, without what they ask for."""
    beside: tuple[str, ...] = ()
    """Requirements that have to be installable together with all that is: they are not installed."""
    variables: tuple[str, ...] = ()
    """`NAME=value` for the processes that run tests."""
    lowest: bool = False
    """Whether everything that pyproject.toml has a lower bound for is installed at that."""

    @property
    def requirements(self) -> Path:
        """The file, which pip and uv read too."""
        return FOLDER / f"{self.name}.txt"


_SETTINGS = ("python", "tests", "extras", "alone", "beside", "variables", "lowest")


def read(path: Path) -> Environment:
    """The environment of a file.

    A comment such as `# python: 3.11` is a setting. `tests`, `extras`, `alone`, `beside` and `variables` are words with
    spaces between.

    Raises:
        ValueError: a setting is missing, given twice, or `lowest` is another word than `yes`.
    """
    pattern = rf"^# ({'|'.join(_SETTINGS)}): (.+)$"
    found = re.findall(pattern, path.read_text("utf-8"), re.MULTILINE)
    settings = dict(found)
    if len(settings) != len(found) or not {"python", "tests"} <= set(settings):
        raise ValueError(f"{path} needs a line '# python: 3.11' and one '# tests: core', and each setting once.")
    if settings.get("lowest", "yes") != "yes":
        raise ValueError(f"{path} has lowest: {settings['lowest']}; it is 'yes', or the line is left out.")
    return Environment(
        name=path.stem,
        python=settings["python"],
        tests=tuple(settings["tests"].split()),
        extras=tuple(settings.get("extras", "").split()),
        alone=tuple(settings.get("alone", "").split()),
        beside=tuple(settings.get("beside", "").split()),
        variables=tuple(settings.get("variables", "").split()),
        lowest="lowest" in settings,
    )


def all_environments() -> dict[str, Environment]:
    """The environments by name: the oldest first, then by name."""
    found = sorted(map(read, FOLDER.glob("*.txt")), key=lambda each: (not each.lowest, each.name))
    return {each.name: each for each in found}


def paths_of(tests: Iterable[str]) -> list[str]:
    """The paths that words of `TESTS` stand for; what is no word stays."""
    return [path for test in tests for path in TESTS.get(test, (test,))]


def find_python(version: str) -> str | None:
    """The path of an interpreter, on the PATH or one of pyenv's; `None` where there is none.

    pyenv's command on the PATH is passed over: it is there for every Python, and fails for most.
    """
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    folders = [folder for folder in os.get_exec_path() if Path(folder) != pyenv / "shims"]
    found = shutil.which(f"python{version}", path=os.pathsep.join(folders))
    if found is not None:
        return found
    candidates = sorted((pyenv / "versions").glob(f"{version}.*/bin/python"))
    return str(candidates[-1]) if candidates else None
