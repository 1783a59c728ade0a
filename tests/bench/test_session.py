"""What a bench decides, in which order it measures, and what comes of it: with results that nobody had to measure."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from hf_galore.bench import markdown
from hf_galore.bench.jobs import (
    ADAMW_8BIT,
    GALORE,
    OUT_OF_MEMORY,
    TRAINERS_OWN,
    WARM_UP,
    Failed,
    Job,
    Look,
    Measured,
    Planned,
)
from hf_galore.bench.others import ANCHORS
from hf_galore.bench.processes import Result
from hf_galore.bench.report import GIB, Report, Row, ratio
from hf_galore.bench.session import begin, look_at, measure
from hf_galore.cli import bench as command
from hf_galore.cli.main import main
from hf_galore.errors import UserError
from hf_galore.plan.needs import OUTSIDE_BYTES

DOCS = Path(__file__).parents[2] / "docs" / "cards.md"
JOB = Job(task="look", arguments=("--config", "llama2_7b_oasst2.yaml"))
# A card of 24 GB: AdamW8bit has room for some of the layers, the recipe for all.
LOOK = Look(
    device="cuda",
    card="NVIDIA GeForce RTX 4090",
    memory_bytes=int(23.6 * GIB),
    free_bytes=int(23.2 * GIB),
    driver="580.1",
    power_limit="450.00 W",
    versions=dict.fromkeys(("python", "torch", "transformers", "bitsandbytes", "hf-galore", "triton"), "1.0"),
    allocator="expandable_segments:True",
    model="meta-llama/Llama-2-7b-hf",
    recipe="llama2_7b_oasst2.yaml",
    optim="galore_adamw_8bit_layerwise",
    rank=1024,
    layers=32,
    rows=16,
    max_length=256,
    micro_batches=1,
    clips=False,
    galore_torch="1.0",
)
NO_CARD = dataclasses.replace(LOOK, device=None, card="CPU, x86_64", memory_bytes=None, free_bytes=None, driver=None)


def run_of(*seconds: float) -> Measured:
    """A run of such timed steps, after slow ones that warm up."""
    return Measured(
        seconds=[9.0] * WARM_UP + list(seconds),
        tokens_per_step=4096,
        parameters=10,
        losses=[10.0],
        allocated=18 * GIB,
        reserved=19 * GIB,
        resident=17 * GIB,
        outside_torch=GIB,
        first_refreshes=5.0,
        refreshes=4,
        refresh_seconds=0.06,
    )


class Machine:
    """Stands in for the processes: plans and times are arithmetic, and every job is noted."""

    def __init__(self, look: Look = LOOK, fails: Callable[[Job], bool] = lambda job: False) -> None:
        self.look, self.fails = look, fails
        self.trained: list[Job] = []

    def __call__(self, jobs: Sequence[Job]) -> list[Result]:
        return [self._one(job) for job in jobs]

    def _one(self, job: Job) -> Result:
        if job.task == "look":
            return self.look
        layers = job.layers or 32
        if job.task == "plan":
            # The head's own peak, or that of the layers: the higher one.
            peak = max(3, 1 + layers * (1.15 if job.contender == ADAMW_8BIT else 0.5))
            return Planned(int(peak * GIB), int((peak + 0.5) * GIB))
        self.trained.append(job)
        if self.fails(job):
            return Failed(OUT_OF_MEMORY, "Tried to allocate 12 MiB")
        # A card that gets slower with every run.
        slower = 1 + 0.1 * len(self.trained)
        return run_of(*[slower * {GALORE: 0.8, ADAMW_8BIT: 1.0, TRAINERS_OWN: 0.9}[job.contender]] * 3)


def quiet(text: str, /) -> None:
    """Nobody looks on."""


def report_of(machine: Machine, job: Job = JOB, rounds: int = 2, **options: Any) -> Report:
    report = begin(look_at(job, machine), job, run=machine, say=quiet, **options)
    measure(report, job, rounds, machine, quiet)
    return report


# ---- what is measured


def test_the_recipe_is_measured_whole_and_the_others_with_what_fits() -> None:
    machine = Machine()
    report = report_of(machine)
    first, *compared = [(row.contender, row.layers) for row in report.rows]
    assert first == (GALORE, 32)
    (fitting,) = {layers for _, layers in compared}
    assert [contender for contender, _ in compared] == [GALORE, ADAMW_8BIT, TRAINERS_OWN]
    # 1.5 GiB and 1.15 a layer; the true need of few layers is the head's, so that a few less than possible are taken.
    assert 16 <= fitting <= (23.2 - 1.5) / 1.15
    # There and back.
    order = [GALORE, ADAMW_8BIT, TRAINERS_OWN]
    assert [(job.contender, job.layers) for job in machine.trained] == [
        (GALORE, 32),
        *[(contender, fitting) for contender in [*order, *reversed(order)]],
    ]
    assert report.complete
    assert report.rows[0].planned == Planned(17 * GIB, int(17.5 * GIB))
    assert report.rows[-1].planned is None


def test_where_all_fits_all_are_whole_and_compared() -> None:
    machine = Machine(dataclasses.replace(LOOK, memory_bytes=80 * GIB, free_bytes=79 * GIB))
    assert [row.layers for row in report_of(machine).rows] == [32, 32, 32]


def test_a_card_that_is_pretended_decides_what_fits() -> None:
    machine = Machine(dataclasses.replace(LOOK, memory_bytes=80 * GIB, free_bytes=79 * GIB))
    assert report_of(machine, vram=24 * GIB).rows[-1].layers < 20


def test_layers_that_are_asked_for_hold_for_everything() -> None:
    report = report_of(Machine(), dataclasses.replace(JOB, layers=4))
    assert [row.layers for row in report.rows] == [4, 4, 4]
    with pytest.raises(UserError, match="--layers 33: meta-llama/Llama-2-7b-hf has 32"):
        begin(LOOK, dataclasses.replace(JOB, layers=33), run=Machine(), say=quiet)


def test_what_is_not_installed_is_said_and_not_measured() -> None:
    report = report_of(Machine(dataclasses.replace(LOOK, galore_torch=None)))
    assert {row.contender for row in report.rows} == {GALORE, ADAMW_8BIT}
    assert any("pip install galore-torch" in note for note in report.notes)


# ---- what comes of it


def test_ratios_are_of_the_same_turn() -> None:
    """Else a card that was fast in one turn of the one, and in the other turn of the other, decides them."""
    one, other = Row(GALORE, "", 4), Row(ADAMW_8BIT, "", 4)
    one.rounds = [run_of(1, 1, 50), run_of(4, 4, 4)]
    other.rounds = [run_of(2, 2, 2), run_of(8, 8, 1)]
    assert ratio(one, other) == 0.5
    other.rounds = [Failed(OUT_OF_MEMORY), run_of(16)]
    assert ratio(one, other) == 0.25
    other.rounds = [run_of(1), Failed(OUT_OF_MEMORY)]
    one.rounds = [Failed(OUT_OF_MEMORY), run_of(1)]
    assert ratio(one, other) is None


def test_a_steady_drift_of_the_card_is_nobodys() -> None:
    """Runs get slower by 0.1 each: there and back, each contender's two take as much more as the others'."""
    report = report_of(Machine())
    galore, adamw, own = report.compared
    assert (galore.seconds, adamw.seconds, own.seconds) == pytest.approx((0.8 * 1.45, 1.45, 0.9 * 1.45))
    assert report.ratio(adamw) == 1
    assert report.ratio(galore) == pytest.approx(0.8, rel=0.02)
    assert report.ratio(report.rows[0]) is None  # of other layers, and not by turns


def test_figures_of_a_row() -> None:
    row = Row(GALORE, "", 4, [run_of(1, 2, 3), run_of(5, 6, 7)])
    assert row.seconds == 4
    assert row.tokens_per_second == 1024
    assert row.first_seconds == 9
    assert row.refresh_seconds == pytest.approx(0.015)
    assert row.most("allocated") == 18 * GIB
    assert Row(GALORE, "", 4).failed is None


def test_one_that_runs_out_of_memory_says_so_and_the_others_go_on(capsys: pytest.CaptureFixture[str]) -> None:
    report = report_of(Machine(fails=lambda job: job.contender == ADAMW_8BIT))
    galore, adamw, own = report.compared
    assert (galore.failed, adamw.failed, own.failed) == (None, OUT_OF_MEMORY, None)
    assert report.ratio(galore) is None
    command.show(report, Console(width=140))
    said = capsys.readouterr().out
    assert re.search(r"s / step +│ +0\.880 │ +1\.160 │ out of memory │ +1\.305 │", said)
    assert "turn 1: out of memory. Tried to allocate 12 MiB" in said
    assert "out of memory" in next(line for line in markdown.rows(report) if "bitsandbytes AdamW8bit" in line)


def test_a_mistake_in_the_recipe_ends_it() -> None:
    def run(jobs: Sequence[Job]) -> list[Result]:
        return [Failed("there is no option 'optin'.", mistake=True)]

    with pytest.raises(UserError, match="there is no option 'optin'"):
        look_at(JOB, run)


def test_rows_are_those_of_the_docs_table() -> None:
    """Which grows by pasting them."""
    lines = DOCS.read_text(encoding="utf-8").splitlines()
    header = "| " + " | ".join(markdown.COLUMNS) + " |"
    assert header in lines
    below = lines[lines.index(header) + 2 :]
    pasted = below[: next(place for place, line in enumerate(below) if not line.startswith("|"))]
    for line in [*pasted, *markdown.rows(report_of(Machine()))]:
        assert line.count("|") == len(markdown.COLUMNS) + 1
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert cells[0]
        assert int(cells[2]) > 0
        assert cells[4] == OUT_OF_MEMORY or float(cells[4]) > 0
    whole = markdown.rows(report_of(Machine()))[0]
    assert whole.startswith(
        "| NVIDIA GeForce RTX 4090 (23.60 GiB) | llama2_7b_oasst2.yaml: galore_adamw_8bit_layerwise"
    )
    assert "| 18.00 | 19.00 | 17.00 | 9.00 | 15.0 |" in whole


# ---- the command


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """In place of the processes of the command."""
    made = Machine()
    monkeypatch.setattr(command, "look_at", lambda job: look_at(job, made))
    monkeypatch.setattr(command, "begin", lambda look, job, vram, say: begin(look, job, vram, made, say))
    monkeypatch.setattr(command, "measure", lambda report, job, rounds, say: measure(report, job, rounds, made, say))
    return made


def test_it_prints_the_card_and_what_it_is_compared_with(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--max_grad_norm", "1"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    for words in ("NVIDIA GeForce RTX 4090 (23.60 GiB), driver 580.1", "torch 1.0", "--max_grad_norm 1"):
        assert words in said
    for anchor in ANCHORS:
        assert f"{anchor.tokens_per_second:,.0f} tokens/s" in said
        assert anchor.source in said
    assert "Not ours, and measured elsewhere" in said
    assert "was spared its SVDs" in said


def test_all_figures_go_into_a_file(machine: Machine, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "figures.json"
    assert main(["bench", "--json", str(file), "--markdown", "--vram", "16GiB", "--rounds", "1"]) == 0
    assert capsys.readouterr().out.splitlines() == _markdown(Machine(), rounds=1, vram=16 * GIB)
    found = json.loads(file.read_text(encoding="utf-8"))
    assert found["format"] == 1
    assert found["measured_on"] == found["machine"]["card"] == LOOK.card
    assert found["complete"] is True
    assert found["vram_bytes"] == 16 * GIB
    whole, galore, adamw, own = found["rows"]
    assert (whole["layers"], galore["layers"] == adamw["layers"] == own["layers"]) == (32, True)
    assert galore["ratio_to_adamw_8bit"] == pytest.approx(0.8, rel=0.1)
    assert galore["tokens_per_second"] == pytest.approx(4096 / galore["seconds_per_step"])
    assert len(galore["rounds"][0]["seconds"]) == WARM_UP + 3
    assert {"allocated_bytes", "reserved_bytes", "planned_bytes", "first_step_seconds", "refresh_seconds"} <= set(
        galore
    )
    # What torch may reserve of a smaller card.
    assert {job.limit_bytes for job in machine.trained[:4]} == {16 * GIB - OUTSIDE_BYTES}


def _markdown(machine: Machine, rounds: int, vram: int) -> list[str]:
    return markdown.rows(report_of(machine, rounds=rounds, vram=vram))


def test_no_card_is_said_with_what_would_be_measured(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    machine.look = NO_CARD
    assert main(["bench"]) == 2
    said = capsys.readouterr().err
    assert "sees no GPU here" in said
    assert "all 32 layers of meta-llama/Llama-2-7b-hf" in said
    assert "bitsandbytes' AdamW8bit" in said
    assert "hf-galore bench --small" in said
    assert not machine.trained


def test_what_was_measured_before_an_interrupt_is_printed(
    machine: Machine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(job: Job) -> bool:
        if len(machine.trained) == 3:
            raise KeyboardInterrupt
        return False

    machine.fails = interrupted
    file = tmp_path / "figures.json"
    assert main(["bench", "--json", str(file)]) == 130
    said = capsys.readouterr()
    assert re.search(r"s / step +│ +0\.880 │ +0\.960 │ +│ +│", said.out)
    assert "what was measured until then is above" in said.err
    found = json.loads(file.read_text(encoding="utf-8"))
    assert found["complete"] is False
    assert [len(row["rounds"]) for row in found["rows"]] == [1, 1, 0, 0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--layers", "none"], "--layers has to be an integer of at least 1, but is 'none'"),
        (["--steps", "0"], "--steps has to be an integer of at least 1, but is '0'"),
        (["--vram", "large"], "--vram: A card is given by its name"),
        (["--vram", "24GiB", "--small"], "--vram is about a card"),
        (["--max_steps", "5"], "--max_steps has no meaning for a measurement"),
        (["--json", "/nowhere/at/all.json"], "there is no folder"),
        (["--steps", "2", "8"], "'8' belongs to no --key"),
    ],
)
def test_mistakes(arguments: list[str], words: str, machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *arguments]) == 2
    assert words in capsys.readouterr().err
    assert not machine.trained
