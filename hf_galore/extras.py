"""Extras: what `pip install "hf-galore[cli]"` installs beyond the optimizers, and which of it is not there.

What an extra is made of is read from the metadata of the installed package, so pyproject.toml is the only list of it.
"""

from __future__ import annotations

import functools
import importlib.metadata

from packaging.requirements import Requirement

_PACKAGE = "hf-galore"


class MissingExtraError(ImportError):
    """An extra is not installed, or an older release of a part of it is."""


def require(extra: str, what: str) -> None:
    """Check that all is installed that an extra brings.

    Args:
        extra: its name in pyproject.toml.
        what: what needs it, to begin the error with.

    Raises:
        MissingExtraError: something is not there, or is not the release that is needed.
    """
    absent, others = [], []
    for requirement in _requirements(extra):
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            absent.append(requirement.name)
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            others.append(f"{requirement.name} is {version} and not {requirement.specifier}")
    if absent:
        *most, last = absent
        others.insert(0, f"{', '.join(most)} and {last} are not installed" if most else f"{last} is not installed")
    if others:
        raise MissingExtraError(
            f'{what} needs the extra {extra!r} ({"; ".join(others)}): pip install "{_PACKAGE}[{extra}]".'
        )


@functools.cache
def _requirements(extra: str) -> tuple[Requirement, ...]:
    """All that an extra brings. (hatchling writes there what the extras bring that one names.)

    Empty where the package is not installed, as with its folder on PYTHONPATH: then nothing says what belongs to it.
    """
    try:
        written = importlib.metadata.requires(_PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        written = []
    found = [Requirement(line) for line in written]
    return tuple(
        requirement
        for requirement in found
        if requirement.marker is not None
        and not requirement.marker.evaluate({"extra": ""})
        and requirement.marker.evaluate({"extra": extra})
    )
