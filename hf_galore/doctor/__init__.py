"""What stands in the way of a training on this machine: `hf-galore doctor`, and the first cell of a notebook.

    from hf_galore.doctor import report

    print(report("meta-llama/Llama-2-7b-hf"))  # the model's licence is looked at too

Everything is looked at, whatever else is broken; nothing is installed, changed or downloaded.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from ..version import __version__
from . import cards, hub, machine, packages
from .findings import Finding, Report
from .kernels import kernels

__all__ = ["Finding", "Report", "report"]


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
    first: str | None = None
    try:
        facts = cards.torch_facts(os.environ.get("CUDA_VISIBLE_DEVICES"))
    except Exception as error:  # a broken library may raise anything
        findings.append(_failed("torch", error))
    else:
        first = facts.cards[0].name if facts.cards else None
        findings += cards.build(facts, hosted=host)
        findings += cards.cards(facts)
        device = "cuda" if facts.cards else "cpu"
        findings += _guarded("kernels", lambda: kernels(device))
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
        yield _failed(topic, error)


def _failed(topic: str, error: Exception) -> Finding:
    return Finding(topic, "problem", f"cannot be used: {type(error).__name__}: {' '.join(str(error).split())}")
