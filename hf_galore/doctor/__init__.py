"""What stands in the way of a training on this machine: `hf-galore doctor`, and the first cell of a notebook.

    from hf_galore.doctor import report

    print(report("meta-llama/Llama-2-7b-hf"))  # the model's licence is looked at too
    print(report().short())  # what a notebook shows: the card, and what is to be done

Everything is looked at, whatever else is broken; nothing is installed, changed or downloaded. `need_model` raises an
error where a model cannot be downloaded by this account.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from ..version import __version__
from . import hub, machine, packages
from .findings import Finding, Report
from .hub import need_model
from .of_torch import look

__all__ = ["Finding", "Report", "need_model", "report"]


def report(model: str | None = None) -> Report:
    """Look at this machine: card, torch, releases, kernels, memory, disk, and the Hub.

    Takes some seconds, most of them for importing torch. The Hub is asked for at most a few, and not at all where
    HF_HUB_OFFLINE is set.

    Args:
        model: a model's name on the Hub, to find out whether its licence is accepted.
    """
    host = machine.hosted()
    wanted = packages.asked_for()
    found = packages.all_installed(wanted)
    findings = list(packages.releases(found, wanted, platform.python_version()))
    findings += packages.loaded_others(found)
    findings += packages.built_for_another_torch(found, packages.requirements_of_builds(found))
    first, of_torch = look(host)
    findings += of_torch
    findings.append(machine.segments())
    findings.append(machine.memory())
    findings += _guarded("disk", machine.disks)
    findings += _guarded("Hub", lambda: hub.hub(model))
    findings.insert(0, machine.system(host, first))
    where = machine.shown(Path(__file__).resolve().parents[1])
    return Report(f"hf_galore {__version__}, in {where}", tuple(findings))


def _guarded(topic: str, look: Callable[[], Iterable[Finding]]) -> Iterator[Finding]:
    """What was found, and where looking fails, that: the rest of the report is still to be had."""
    try:
        yield from look()
    except Exception as error:  # a broken library may raise anything
        yield Finding.of_error(topic, error)
