"""What needs torch and the card is looked at in a process of its own.

So a library that crashes takes nothing down with it, nothing waits for long, and the process that asks (a notebook that
is to train) has not started CUDA, which would fix the settings of torch's allocator, and holds nothing of the card.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys

from .cards import build, cards, torch_facts
from .findings import Finding
from .kernels import kernels

TIMEOUT = 300.0  # seconds; a second or two for torch, and where Triton's kernels are compiled, half a minute
_MARK = "hf_galore's doctor: "


def look(hosted: str | None, timeout: float = TIMEOUT) -> tuple[str | None, list[Finding]]:
    """Look in a process of its own.

    Args:
        hosted: Colab or Kaggle, if this is one.
        timeout: seconds.

    Returns:
        The name of the first card, and what was found.
    """
    code = f"import sys; sys.path[:] = {sys.path!r}; from hf_galore.doctor.of_torch import main; main({hosted!r})"
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=timeout, errors="replace"
        )
    except subprocess.TimeoutExpired:
        return None, [Finding("torch", "problem", f"looking at torch and the card took more than {timeout:g} seconds.")]
    for line in done.stdout.splitlines():
        if line.startswith(_MARK):
            answer = json.loads(line.removeprefix(_MARK))
            return answer["card"], [Finding(**finding) for finding in answer["findings"]]
    last = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), f"status {done.returncode}")
    return None, [Finding("torch", "problem", f"cannot be used: {last.strip()}")]


def main(hosted: str | None) -> None:
    """Look, and write what was found into a line of stdout; called in the process of its own."""
    first: str | None = None
    try:
        facts = torch_facts(os.environ.get("CUDA_VISIBLE_DEVICES"))
    except Exception as error:  # a broken library may raise anything
        findings = [Finding.of_error("torch", error)]
    else:
        first = facts.cards[0].name if facts.cards else None
        findings = [*build(facts, hosted=hosted), *cards(facts)]
        try:
            findings += kernels("cuda" if facts.cards else "cpu")
        except Exception as error:
            findings.append(Finding.of_error("kernels", error))
    answer = {"card": first, "findings": [dataclasses.asdict(finding) for finding in findings]}
    sys.stdout.write(f"\n{_MARK}{json.dumps(answer)}\n")
