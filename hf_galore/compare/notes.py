"""What a reader of a comparison has to know to read its tables rightly."""

from __future__ import annotations

from collections.abc import Sequence

from .differences import other_work
from .progress import tokens
from .quantities import equal_tokens
from .runs import HELD_OUT_LOSS, PEAK_MEMORY, STEP_SECONDS, TOKENS_PER_SECOND, TRAINING_LOSS, Run
from .seeds import Compared, Seeds
from .tables import steps_of_all
from .words import listed, short_count

_MEASURED = {
    "training loss": TRAINING_LOSS,
    "held-out loss": HELD_OUT_LOSS,
    "learning rate": "learning_rate",
    "step time": STEP_SECONDS,
    "tokens per second": TOKENS_PER_SECOND,
    "peak memory": PEAK_MEMORY,
}


def notes(compared: Sequence[Compared]) -> list[str]:
    """Notes that are needed to read the tables rightly, one sentence or two each."""
    runs = [run for one in compared for run in one.runs]
    return [
        *map(_broken, (run for run in runs if run.broken is not None)),
        *(
            f"{run.name} was interrupted, or is running: its figures are those of its last checkpoint, step "
            f"{steps_of_all(run)}."
            for run in runs
            if not run.finished
        ),
        *_of_seeds(compared),
        *_of_work(compared),
        *_of_logs(runs),
        *_of_memory(runs),
    ]


def _broken(run: Run) -> str:
    assert run.broken is not None
    key, step = run.broken
    label = {TRAINING_LOSS: "the training loss", HELD_OUT_LOSS: "the held-out loss"}.get(key, key)
    return f"{run.name} is broken: {label} is not finite, first at step {step:,}. It is best at nothing."


def _of_seeds(compared: Sequence[Compared]) -> list[str]:
    several = [one for one in compared if isinstance(one, Seeds)]
    if not several:
        return []
    found = [
        "± is the standard deviation over seeds (of a sample, n − 1): "
        + "; ".join(f"{one.name}: {', '.join(one.seeds)}" for one in several)
        + "."
    ]
    for one in several:
        lost = len(one.runs) - len(one.sound)
        if lost:
            found.append(f"{one.name}: its means are of {len(one.sound)} of {len(one.runs)} seeds; {lost} broke.")
    return found


def _of_work(compared: Sequence[Compared]) -> list[str]:
    found = []
    work = other_work(compared)
    if work:
        found.append(
            f"The runs did not do the same work: {', '.join(work)} differ{'s' if len(work) == 1 else ''}. A lower loss "
            "or a shorter time may come of that."
        )
    fewest = equal_tokens(compared)
    if fewest is not None:
        most = max(tokens(run) or 0 for one in compared for run in one.runs)
        found.append(
            f"Some runs saw {short_count(fewest)} tokens and some up to {short_count(most)}: the held-out loss at "
            f"{short_count(fewest)} compares them at equal tokens, between two evaluations in proportion. The learning "
            "rates of the longer ones had not come to their end there."
        )
    return found


def _of_logs(runs: Sequence[Run]) -> list[str]:
    found = []
    others = [run.name for run in runs if run.facts is None]
    if others:
        by = "by another program" if len(others) == 1 else "by other programs"
        found.append(f"{_were(others)} made {by}: what is not in a log is not known.")
    timed = [run.name for run in runs if run.times_whole_training and run.step_seconds is not None]
    if timed:
        whose = "its" if len(timed) == 1 else "their"
        found.append(
            f"{listed(timed)}: step time and tokens per second are those of all {whose} time, evaluations included."
        )
    resumed = [run.name for run in runs if run.training_seconds is None and run.last("train_runtime") is not None]
    if resumed:
        found.append(f"{_were(resumed)} resumed: the training time is known of the last part only, and left out.")
    untold = [run.name for run in runs if tokens(run) is None]
    if untold and len(untold) < len(runs):
        found.append(f"No log tells the tokens of {listed(untold)}: over tokens there is no curve.")
    missing = [label for label, key in _MEASURED.items() if not any(run.series(key) for run in runs)]
    if missing:
        found.append(f"Logged by no run: {', '.join(missing)}.")
    return found


def _of_memory(runs: Sequence[Run]) -> list[str]:
    measured = {run.facts.device == "cpu" for run in runs if run.peak_memory_gib is not None and run.facts is not None}
    if measured == {True}:
        return ["Peak memory is of the whole process, Python and libraries included: it ran on a CPU."]
    if len(measured) == 2:
        return ["Peak memory is of tensors on a GPU, but of the whole process on a CPU: do not compare those."]
    return []


def _were(names: Sequence[str]) -> str:
    return f"{listed(names)} {'was' if len(names) == 1 else 'were'}"
