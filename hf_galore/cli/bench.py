"""`hf-galore bench`: what this machine's card makes of a recipe, beside other optimizers."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..bench import markdown
from ..bench.jobs import ROUNDS, STEPS, WARM_UP, Job, Measured
from ..bench.others import ANCHORS
from ..bench.report import Report, short_name
from ..bench.session import Say, begin, look_at, measure, would_measure
from ..errors import UserError
from ..recipes.config_file import keys_given, take_config
from ..recipes.writable import check_file
from .interrupts import Stopped
from .options import take_options
from .spinner import spinner

PROG = "hf-galore bench"
DEFAULT = "llama2_7b_oasst2.yaml"
ABOUT = f"""Measure what this machine's GPU makes of a recipe, with random weights and tokens: seconds a step, tokens a
second, memory beside its plan, the first step and refreshes; and beside it, by turns, bitsandbytes' AdamW8bit and the
Trainer's own GaLore, with as many layers as AdamW8bit has room for. Nothing is downloaded or saved but a model's
config that is not there. --config takes a recipe of hf-galore sft with a galore_* optim, by default {DEFAULT}. Options
of its own: --layers N, for everything with so many layers; --rank N; --steps N, timed steps a run (by default {STEPS},
after {WARM_UP} that warm up); --rounds N, turns of each ({ROUNDS}); --vram 24GiB, a smaller card than there is;
--svd, the Trainer's own GaLore with its SVDs, which take minutes; --json FILE, all figures; --markdown, rows for
docs/cards.md in place of the tables; --small, a tiny model on the CPU, to try the command without a card. All other
options are those of hf-galore sft, below, and override what the recipe says."""

_VALUES = {
    "--layers": "a number, as --layers 8",
    "--steps": "a number, as --steps 20",
    "--rounds": "a number, as --rounds 3",
    "--rank": "a number, as --rank 512",
    "--vram": "a size, as --vram 24GiB",
    "--json": "a file, as --json figures.json",
}
_SWITCHES = ("--markdown", "--small", "--svd")
# What a measurement decides, or has no use for.
_DECIDED = (
    *("max_steps", "num_train_epochs", "output_dir", "overwrite_output_dir", "resume_from_checkpoint", "disable_tqdm"),
    *("eval_strategy", "save_strategy", "report_to", "push_to_hub", "logging_steps", "use_cpu"),
    *("dataset_name", "dataset_config", "datasets", "dataset_train_split", "dataset_test_split", "chat_template_path"),
)


class _Own(NamedTuple):
    """The options that only a bench has, read."""

    job: Job
    rounds: int
    vram: int | None
    json: Path | None
    markdown: bool


def run(arguments: Sequence[str]) -> int:
    """`hf-galore bench [--config FILE] [--layers N] [--json FILE] [--markdown] [--small] ... [--key value ...]`.

    Raises:
        UserError: something that was given is wrong, or there is no GPU.
        Stopped: Ctrl-C; what was measured until then has been shown.
        SystemExit: `--help` was among the arguments and has been shown.
    """
    if not {"-h", "--help"}.isdisjoint(arguments):
        from ..recipes import sft  # takes seconds, and only help needs it in this process

        sft.parse(["--help"], PROG, ABOUT)
    own = _read(arguments)
    report = None
    try:
        with _saying() as say:
            say("looking at the recipe and the card")
            look = look_at(own.job)
            if look.device is None:
                raise UserError(
                    f"torch {look.versions['torch']} sees no GPU here, and there is nothing to measure. Where there is "
                    f"one, this measures {would_measure(look)}. To see how it works without one: {PROG} --small."
                )
            report = begin(look, own.job, own.vram, say=say)
            measure(report, own.job, own.rounds, say=say)
    except KeyboardInterrupt:
        if report is None or not any(row.rounds for row in report.rows):
            raise Stopped("interrupted; nothing was measured yet.") from None
        _hand_out(report, own)
        raise Stopped("interrupted; what was measured until then is above.") from None
    _hand_out(report, own)
    return 0


# ---- what was given


def _read(arguments: Sequence[str]) -> _Own:
    given, rest = take_options(arguments, _VALUES, _SWITCHES)
    name, overrides = take_config(rest)
    decided = [key for key in _DECIDED if key in keys_given(overrides)]
    if decided:
        raise UserError(
            f"--{decided[0]} has no meaning for a measurement, which has random tokens, its own number of steps, and "
            "saves nothing. Leave it out."
        )
    values = {flag: given[flag][0] if flag in given else None for flag in _VALUES}
    layers, steps, rounds, rank = (_count(flag, values[flag]) for flag in ("--layers", "--steps", "--rounds", "--rank"))
    small = "--small" in given
    if small and values["--vram"] is not None:
        raise UserError("--vram is about a card, and --small measures on the CPU. Leave out one of them.")
    file = None if values["--json"] is None else Path(values["--json"]).expanduser()
    if file is not None:
        check_file("--json", file)  # now, and not after minutes
    job = Job(
        task="look",
        arguments=("--config", name or DEFAULT, *overrides),
        layers=layers,
        rank=rank,
        steps=steps or STEPS,
        small=small,
        svd="--svd" in given,
    )
    vram = None if values["--vram"] is None else _size(values["--vram"])
    return _Own(_limited(job, vram), rounds or ROUNDS, vram, file, "--markdown" in given)


def _count(flag: str, text: str | None) -> int | None:
    if text is None:
        return None
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"{flag} has to be an integer of at least 1, but is {text!r}.")
    return int(text)


def _size(text: str) -> int:
    from ..plan.cards import parse_size

    try:
        return parse_size(text)
    except ValueError as error:
        raise UserError(f"--vram: {error}") from error


def _limited(job: Job, vram: int | None) -> Job:
    """The job with the memory that torch has on a card of that size."""
    if vram is None:
        return job
    from ..plan.needs import OUTSIDE_BYTES

    return dataclasses.replace(job, limit_bytes=vram - OUTSIDE_BYTES)


# ---- while it runs


@contextlib.contextmanager
def _saying() -> Iterator[Say]:
    with spinner("starting") as say:
        yield say or (lambda text: print(f"{PROG}: {text}", file=sys.stderr, flush=True))


# ---- what came of it


def _hand_out(report: Report, own: _Own) -> None:
    if own.markdown:
        print(*markdown.rows(report), sep="\n")
    else:
        show(report, Console(highlight=False))
    if own.json is not None:
        from ..recipes.whole_files import write_whole  # takes seconds

        write_whole(own.json, json.dumps(report.as_dict(), indent=2) + "\n")
        print(f"All figures are in {own.json}.", file=sys.stderr)


def show(report: Report, console: Console) -> None:
    """Print a report: the machine, the table, what there is to know of it, others' figures."""

    def say(text: str) -> None:
        console.print(Text(text), soft_wrap=True)

    look = report.look
    driver = [f"driver {look.driver}"] if look.driver else []
    power = [f"power limit {look.power_limit}"] if look.power_limit else []
    allocator = [look.allocator] if look.allocator and look.device == "cuda" else []
    say(", ".join([markdown.card(report), *driver, *power]))
    versions = [f"{name} {version}" for name, version in look.versions.items() if version != "not installed"]
    say(", ".join([*versions, *allocator]))
    accumulated = f", {look.micro_batches} times a step" if look.micro_batches > 1 else ""
    say(f"{report.recipe}: {look.optim}, rank {look.rank}, of {look.model} with random weights")
    say(f"{look.rows} × {look.max_length} tokens{accumulated}; {_turns(report)}")
    console.print(_table(report))
    for note in [*_failures(report), *_warnings(report), *report.notes]:
        say(note)
    if look.device == "cpu":
        say("Measured on CPU, a tiny model in float32: times that say nothing about a card, and nothing of memory.")
        return
    say("Not ours, and measured elsewhere, to compare with:")
    for anchor in ANCHORS:
        peak = "" if anchor.peak_gib is None else f", {anchor.peak_gib} GiB"
        say(f"  {anchor.what}; {anchor.card}: {anchor.tokens_per_second:,.0f} tokens/s{peak} ({anchor.source})")


def _table(report: Report) -> Table:
    """A column for each contender: there are few of them, and terminals are narrow."""
    table = Table("")
    for row in report.rows:
        table.add_column(short_name(row.contender, svd=report.svd), justify="right")
    columns = [markdown.cells(report, row) for row in report.rows]
    for name, *cells in zip(markdown.COLUMNS[2:-1], *columns, strict=True):
        if any(cells) and name != "tokens a step":
            table.add_row(name, *map(Text, cells))
    return table


def _turns(report: Report) -> str:
    turns = max(len(row.rounds) for row in report.compared)
    return f"a process for each run, {turns} turns each" if turns > 1 else "a process for each run"


def _failures(report: Report) -> Iterator[str]:
    for row in report.rows:
        for turn, run in enumerate(row.rounds, start=1):
            if isinstance(run, Measured):
                if not all(map(math.isfinite, run.losses)):
                    yield f"{row.name}, turn {turn}: the loss was not finite."
            else:
                yield f"{row.name}, turn {turn}: {run.reason}. {run.detail}".strip()


def _warnings(report: Report) -> list[str]:
    said = [message for row in report.rows for run in row.runs for message in run.warnings]
    return [f"Warned: {message}" for message in dict.fromkeys(said)]
