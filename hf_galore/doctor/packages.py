"""Which releases are installed, whether they are those that hf_galore asks for, and whether they fit each other."""

from __future__ import annotations

import importlib.metadata
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from packaging.requirements import Requirement
from packaging.version import InvalidVersion, Version

from .findings import Finding

_PACKAGE = "hf-galore"
SHOWN = ("torch", "transformers", "trl", "accelerate", "peft", "bitsandbytes", "datasets", "triton", "huggingface-hub")
"""Whose releases make a difference, in the order in which they are shown."""

# They are built for one release of torch, and importing transformers imports the first where it is there.
_BUILT_FOR_TORCH = ("torchvision", "torchaudio")

RESTART = "Restart the session (in Colab: Runtime > Restart session), and run the cells again from the first."


def installed(names: Iterable[str]) -> dict[str, str]:
    """The releases of those of the packages that are installed."""
    return {name: release for name in names if (release := _release(name)) is not None}


def _release(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def asked_for() -> dict[str, tuple[Requirement, bool]]:
    """What pyproject.toml asks for, by package: the range, and whether training needs it in any case.

    Empty where hf_galore is not installed but on the path: then nothing says what it asks for.
    """
    try:
        lines = importlib.metadata.requires(_PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    wanted: dict[str, tuple[Requirement, bool]] = {}
    for requirement in map(Requirement, lines):
        always = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if always or (requirement.marker is not None and requirement.marker.evaluate({"extra": "cli"})):
            wanted[requirement.name] = (requirement, always)
    return wanted


def releases(
    found: Mapping[str, str], wanted: Mapping[str, tuple[Requirement, bool]], python: str
) -> Iterator[Finding]:
    """Whether each package is there, in the range that is asked for.

    Args:
        found: the releases that are installed.
        wanted: as `asked_for` returns it.
        python: the version of Python.
    """
    yield Finding("python", "ok", python)
    if not wanted:
        yield Finding(
            "releases", "note", "hf_galore is on the path only, not installed: what it asks for is not known."
        )
    for name in [*SHOWN, *(name for name in wanted if name not in SHOWN)]:
        requirement, always = wanted.get(name, (None, False))
        specifier = "" if requirement is None else str(requirement.specifier)
        asks = f" (asked for: {specifier})" if specifier else ""
        if name not in found:
            if requirement is None:
                continue  # nothing asks for it
            yield Finding(
                name,
                "problem" if always else "note",
                f"not installed{asks}" + ("" if always else "; commands and recipes need it"),
                command=_pip(f"{name}{specifier}" if always else "hf-galore[cli]"),
            )
        elif requirement is not None and not requirement.specifier.contains(found[name], prereleases=True):
            yield Finding(
                name,
                "problem",
                f"{found[name]}, which is outside of what is asked for: {specifier}",
                command=_pip(f"{name}{specifier}"),
            )
        elif name in SHOWN:
            yield Finding(name, "ok", f"{found[name]}{asks}")


def _pip(requirement: str) -> str:
    return f'pip install "{requirement}"'


def loaded_others(found: Mapping[str, str], modules: Mapping[str, Any] = sys.modules) -> Iterator[Finding]:
    """Packages of which this process has loaded another release than is installed, as after an upgrade in a notebook.

    Args:
        found: the releases that are installed.
        modules: what is loaded.
    """
    for name, release in found.items():
        loaded = getattr(modules.get(name.replace("-", "_")), "__version__", None)
        if isinstance(loaded, str) and _differ(loaded, release):
            yield Finding(
                name, "problem", f"{loaded} is loaded, but {release} is installed: it was upgraded since.", RESTART
            )


def _differ(loaded: str, release: str) -> bool:
    """Whether two releases differ, of which one may leave out the local part (`+cu128`)."""
    try:
        return Version(loaded).public != Version(release).public
    except InvalidVersion:
        return loaded != release


def built_for_another_torch(found: Mapping[str, str], requires: Mapping[str, list[str]]) -> Iterator[Finding]:
    """Packages that were built for another release of torch, or for another kind of it, than the one that is there.

    Args:
        found: the releases that are installed, torch among them.
        requires: what `importlib.metadata.requires` says of torchvision and torchaudio, of those that are there.
    """
    torch = found.get("torch")
    if torch is None:
        return
    for name, lines in requires.items():
        wants = next((r for r in map(Requirement, lines) if r.name == "torch"), None)
        builds = [re.sub(r"^[^+]*\+?", "", release) for release in (torch, found[name])]
        other = "cpu" in builds and builds[0] != builds[1] and all(builds)
        if wants is not None and not wants.specifier.contains(Version(torch).public, prereleases=True):
            text = f"{found[name]} is built for torch{wants.specifier}, and torch is {torch}"
        elif other:
            text = f"{found[name]} and torch {torch} are builds for other hardware"
        else:
            yield Finding(name, "ok", f"{found[name]}, built for this torch")
            continue
        yield Finding(
            name,
            "problem",
            f'{text}: importing transformers ends in "operator torchvision::nms does not exist" and the like.',
            "Nothing here needs it; remove it, then restart the session.",
            f"pip uninstall -y {name}",
        )


def requirements_of_builds(found: Mapping[str, str]) -> dict[str, list[str]]:
    """What torchvision and torchaudio ask for, of those that are installed."""
    return {name: importlib.metadata.requires(name) or [] for name in _BUILT_FOR_TORCH if name in found}


def all_installed(wanted: Mapping[str, tuple[Requirement, bool]]) -> dict[str, str]:
    """The releases of everything that is looked at."""
    return installed(dict.fromkeys([*SHOWN, *wanted, *_BUILT_FOR_TORCH]))
