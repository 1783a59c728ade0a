"""All that a bench does, one process after the other: looks, plans, and measures by turns."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Protocol

from ..errors import UserError
from .jobs import ADAMW_8BIT, GALORE, ROUNDS, TRAINERS_OWN, Contender, Failed, Job, Look, Measured, Planned
from .processes import Result, run_all
from .report import Report, Row, name_of

_FEW_LAYERS = 2

RunAll = Callable[[Sequence[Job]], list[Result]]


class Say(Protocol):
    """Told what is being done."""

    def __call__(self, text: str, /) -> object: ...


def look_at(job: Job, run: RunAll = run_all) -> Look:
    """Look at the machine and the recipe.

    Args:
        job: the options of the bench, whatever its task.
        run: does jobs.

    Raises:
        UserError: the recipe is none that can be measured, or something that was given is wrong.
    """
    (found,) = run([dataclasses.replace(job, task="look")])
    if isinstance(found, Failed):
        raise UserError(f"{found.reason} {found.detail}" if not found.mistake else found.reason)
    assert isinstance(found, Look)
    return found


def would_measure(look: Look) -> str:
    """What a bench measures where there is a card, in words."""
    own = f", and the Trainer's own {look.optim} of galore_torch" if look.galore_torch else ""
    return (
        f"{look.optim} of {look.recipe} with all {look.layers} layers of {look.model} (random weights, {look.rows} × "
        f"{look.max_length} tokens, rank {look.rank}), and beside it, with as many layers as fit, bitsandbytes' "
        f"AdamW8bit{own}: seconds a step, tokens a second, memory allocated and reserved against the plan, the first "
        "step and refreshes"
    )


def measure(report: Report, job: Job, rounds: int = ROUNDS, run: RunAll = run_all, say: Say = print) -> None:
    """Measure, and put it into the report as it comes.

    Args:
        report: from `begin`; after Ctrl-C it has what was measured until then.
        job: the options of the bench.
        rounds: how often each contender has its turn.
        run: does jobs.
        say: told what is being done.

    Raises:
        KeyboardInterrupt: Ctrl-C.
    """
    alone = [row for row in report.rows if not any(row is one for one in report.compared)]
    for row in alone:
        say(f"{row.name}, all {row.layers} layers")
        _measure(row, job, run)
    for turn in range(rounds):
        # There and back: whatever changes evenly with time, such as heat, falls on all alike.
        for row in report.compared if turn % 2 == 0 else reversed(report.compared):
            say(f"{row.name}, {row.layers} layers, turn {turn + 1} of {rounds}")
            _measure(row, job, run)
    report.complete = True


def _measure(row: Row, job: Job, run: RunAll) -> None:
    (found,) = run([dataclasses.replace(job, task="train", contender=row.contender, layers=row.layers)])
    assert isinstance(found, (Measured, Failed))
    row.rounds.append(found)


def begin(look: Look, job: Job, vram: int | None = None, run: RunAll = run_all, say: Say = print) -> Report:
    """Decide what is measured with how many layers, by plans of their memory where there is a card.

    Args:
        look: at the machine and the recipe.
        job: the options of the bench; its `layers` are those of everything, where they are given.
        vram: the card that is pretended, in bytes.
        run: does jobs.
        say: told what is being done.

    Raises:
        UserError: more layers were asked for than the model has.
    """
    if job.layers is not None and job.layers > look.layers and look.device != "cpu":
        raise UserError(f"--layers {job.layers}: {look.model} has {look.layers}. Give at most that many.")
    whole = job.layers or look.layers
    plans: dict[tuple[Contender, int], Planned] = {}
    layers = whole
    if look.device == "cuda":
        say(f"planning the memory of {whole} layers")
        plans = _plans(job, [(GALORE, whole), (ADAMW_8BIT, whole), (ADAMW_8BIT, min(_FEW_LAYERS, whole))], run)
        if job.layers is None:
            layers = _layers_that_fit(plans, whole, min(size for size in (vram, look.free_bytes) if size is not None))
        if layers != whole:
            say(f"planning the memory of {layers} layers")
            plans.update(_plans(job, [(GALORE, layers), (ADAMW_8BIT, layers)], run))

    def row(contender: Contender, layers: int) -> Row:
        name = name_of(contender, look, svd=job.svd)
        return Row(contender, name, layers, planned=plans.get((contender, layers)))

    rows = [] if layers == whole else [row(GALORE, whole)]
    rows += [row(GALORE, layers), row(ADAMW_8BIT, layers)]
    if look.galore_torch is not None:
        rows.append(row(TRAINERS_OWN, layers))
    return Report(look, rows, job.arguments[2:], job.svd, vram, notes=_notes(look, job))


def _notes(look: Look, job: Job) -> list[str]:
    notes = []
    if look.weight_bits == 8:
        notes.append(
            "Weights of linear layers have 8 bits where GaLore trains them, and 16 beside it: updates of other "
            "optimizers are smaller than a step of 8 bits."
        )
    if look.galore_torch is None:
        notes.append(
            f"Not measured: the Trainer's own {look.optim}. It needs galore_torch, which is not installed: pip install "
            "galore-torch."
        )
    else:
        if not job.svd:
            notes.append(
                "The Trainer's own GaLore was spared its SVDs, which take minutes every update_proj_gap steps: random "
                "matrices took their place. Its first step and its memory are less than they would be; --svd has them."
            )
        if look.clips and look.optim.endswith("_layerwise"):
            notes.append(f"The Trainer's own {look.optim} does not clip, whatever max_grad_norm says.")
    return notes


def _plans(job: Job, wanted: Sequence[tuple[Contender, int]], run: RunAll) -> dict[tuple[Contender, int], Planned]:
    once = list(dict.fromkeys(wanted))
    jobs = [dataclasses.replace(job, task="plan", contender=contender, layers=layers) for contender, layers in once]
    found = zip(once, run(jobs), strict=True)
    return {key: plan for key, plan in found if isinstance(plan, Planned)}  # without a plan it is measured all the same


def _layers_that_fit(plans: dict[tuple[Contender, int], Planned], whole: int, memory: int) -> int:
    """How many layers AdamW8bit has room for, by plans of all and of few of them.

    Memory is the highest of several that grow evenly with layers, and so the true need between the two lies on the
    line between them or below it.
    """
    few = min(_FEW_LAYERS, whole)
    if (ADAMW_8BIT, whole) not in plans or (ADAMW_8BIT, few) not in plans:
        return whole
    most, least = (plans[ADAMW_8BIT, layers].needed_bytes for layers in (whole, few))
    if most <= memory or most == least:
        return whole
    each = (most - least) / (whole - few)
    return max(1, min(whole, math.floor(few + (memory - least) / each)))
