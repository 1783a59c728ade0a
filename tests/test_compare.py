"""`hf-galore compare`: what it reads of runs, tables, pictures, the page, and what it says about mistakes."""

from __future__ import annotations

import base64
import contextlib
import io
import itertools
import json
import math
import re
import struct
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from hf_galore.cli import compare, comparison_figures, runs
from hf_galore.cli.comparison_tables import as_dict, digits, duration
from hf_galore.cli.main import main
from hf_galore.cli.run_record import RUN_FILE, RunFacts

NAN = math.nan


@pytest.fixture
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take seconds."""
    monkeypatch.setattr(compare, "pictures", lambda runs: [])


@pytest.fixture(autouse=True)
def _coarse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures of few pixels are drawn faster."""
    monkeypatch.setattr(comparison_figures, "_DPI", 50)


FACTS = RunFacts(
    command="hf-galore sft",
    recipe="recipe.yaml",
    model="org/model",
    data="org/data",
    optim="galore_adamw_8bit_layerwise",
    optim_args="rank=64, scale=1",
    optim_target_modules=["attn", "mlp"],
    learning_rate=2e-3,
    lora_rank=None,
    parameters=1000,
    trainable_parameters=1000,
    device="cpu",
    versions={"torch": "2.13.0", "trl": "1.16.0"},
    started="2026-01-02T03:04:05+00:00",
    finished=True,
    optimizer_bytes=3 * 2**20,
)


def a_log(
    losses: Sequence[float],
    *,
    held_out: Sequence[float] = (),
    seconds: float | None = 0.5,
    runtime: float | None = 20.0,
    **more: float,
) -> list[dict[str, Any]]:
    """A log for each step; held-out losses at steps 1, 2, ...; and the entry of the end."""
    log: list[dict[str, Any]] = []
    for step, loss in enumerate(losses, start=1):
        entry = {"loss": loss, "learning_rate": 1e-3 / step, "epoch": step / 10, "step": step, **more}
        if seconds is not None:
            entry |= {"step_seconds": seconds, "tokens_per_second": 64 / seconds, "peak_memory_gib": step / 100}
        log.append(entry)
        if step <= len(held_out):
            log.append({"eval_loss": held_out[step - 1], "eval_runtime": 1.0, "step": step})
    if runtime is not None:
        log.append({"train_runtime": runtime, "train_loss": 1.0, "step": len(losses)})
    return log


def write_state(folder: Path, log: Sequence[dict[str, Any]], step: int, max_steps: int | None = None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    state = {"global_step": step, "max_steps": max_steps or step, "log_history": log}
    (folder / "trainer_state.json").write_text(json.dumps(state))


def write_facts(folder: Path, **changes: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RUN_FILE).write_text(json.dumps({**vars(FACTS), **changes}))


def write_run(
    folder: Path, losses: Sequence[float] = (4.0, 3.0, 2.0), facts: dict[str, Any] | None = None, **log: Any
) -> Path:
    write_state(folder, a_log(losses, **log), len(losses))
    write_facts(folder, **(facts or {}))
    return folder


def compared(folders: Sequence[Path], output: Path, *options: str) -> dict[str, Any]:
    """What `--json` prints, by the names of the runs."""
    stdout = io.StringIO()
    with contextlib.redirect_stdout(stdout):
        assert main(["compare", *map(str, folders), "--json", "--output", str(output), *options]) == 0
    found = json.loads(stdout.getvalue(), parse_constant=lambda text: pytest.fail(f"{text} is not JSON"))
    assert found["page"] == str(output / "index.html")
    return {run["name"]: run for run in found["runs"]}


def numbers(*folders: Path) -> dict[str, Any]:
    """Likewise, without a page."""
    return {run["name"]: run for run in as_dict(runs.read_runs(folders))}


class Page(HTMLParser):
    """The tables of a page, its pictures, and everything that would be fetched."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.best: list[str] = []
        self.pictures: dict[str, bytes] = {}
        self.tags: list[str] = []
        self._open: list[str] = []
        self._best = False
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        self.tags.append(tag)
        if tag not in ("meta", "img"):
            self._open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self._best = given.get("class") == "best"
        elif tag == "img":
            kind, _, data = str(given["src"]).partition(",")
            assert kind == "data:image/png;base64"
            self.pictures[str(given["alt"])] = base64.b64decode(data, validate=True)
        assert not {"href", "srcset", "action"} & given.keys()
        assert not any(name.startswith("on") for name in given)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += data
            if self._best:
                self.best.append(data)

    def rows(self) -> dict[str, list[str]]:
        """The cells of all tables, by the labels of their rows."""
        return {row[0]: row[1:] for table in self.tables for row in table[1:]}


def png_size(png: bytes) -> tuple[int, int]:
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", png[16:24])
    return int(width), int(height)


# ---- reading


def test_numbers_of_a_run_of_ours(tmp_path: Path) -> None:
    losses = [10.0 - step for step in range(10)] + [3.0] * 8 + [2.0, 1.0]  # 20 steps; the last tenth: 18, 19, 20
    folder = write_run(tmp_path / "ours", losses, held_out=[5.0, 4.0, 4.5], runtime=11.0)
    found = compared([folder], tmp_path / "out")["ours"]
    assert found["finished"] is True
    assert (found["step"], found["max_steps"]) == (20, 20)
    assert found["method"] == "GaLore r=64, 8-bit, layerwise"
    assert found["model"] == "org/model"
    assert found["learning_rate"] == 2e-3  # as set, not the highest logged
    assert found["results"] == {
        "training_loss": 2.0,
        "eval_loss_first": 5.0,
        "eval_loss_last": 4.5,
        "eval_loss_lowest": 4.0,
        "step_seconds": 0.5,
        "tokens_per_second": 128.0,
        "peak_memory_gib": 0.2,
        "optimizer_bytes": 3 * 2**20,
        "seconds_in_steps": 10.0,
        "training_seconds": 11.0,
    }
    assert found["facts"]["optim_args"] == "rank=64, scale=1"


def test_a_run_of_another_program(tmp_path: Path) -> None:
    folder = tmp_path / "theirs"
    log = a_log([4.0, 2.0], seconds=None, runtime=8.0, num_tokens=400.0)
    log[0] |= {"galore/moment_mib": 2.0, "galore/basis_mib": 0.5}
    write_state(folder, log, 2)
    (folder / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    found = numbers(folder)["theirs"]
    assert found["finished"] is True
    assert found["facts"] is None
    assert found["method"] == "GaLore"
    assert found["model"] == "LlamaForCausalLM"
    assert found["learning_rate"] == 1e-3  # the highest logged
    results = found["results"]
    assert results["training_loss"] == 2.0
    assert results["step_seconds"] == 4.0
    assert results["tokens_per_second"] == 50.0
    assert results["training_seconds"] == 8.0
    assert results["optimizer_bytes"] == 2.5 * 2**20
    assert results["peak_memory_gib"] is None


def test_adapters_of_another_program_in_a_checkpoint(tmp_path: Path) -> None:
    checkpoint = tmp_path / "theirs" / "checkpoint-3"
    write_state(checkpoint, a_log([3.0, 2.0, 1.0], seconds=None, runtime=None), 3, max_steps=9)
    (checkpoint / "adapter_config.json").write_text('{"r": 8, "base_model_name_or_path": "org/base"}')
    found = numbers(tmp_path / "theirs")["theirs"]
    assert (found["method"], found["model"]) == ("LoRA r=8", "org/base")
    assert found["finished"] is False
    assert found["results"]["step_seconds"] is None


def test_trl_sft_saves_its_last_checkpoint_and_no_state(tmp_path: Path) -> None:
    write_state(tmp_path / "theirs" / "checkpoint-3", a_log([3.0, 2.0, 1.0], runtime=None), 3)
    assert numbers(tmp_path / "theirs")["theirs"]["finished"] is True


@pytest.mark.usefixtures("_no_pictures")
def test_an_interrupted_run_is_read_from_its_last_complete_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "stopped"
    write_facts(folder, finished=False, optimizer_bytes=None)
    write_state(folder, a_log([9.0] * 8), 8)  # of an earlier run in the same folder
    write_state(folder / "checkpoint-2", a_log([7.0, 6.0], runtime=None), 2, max_steps=8)
    write_state(folder / "checkpoint-4", a_log([7.0, 6.0, 5.0, 4.0], runtime=None), 4, max_steps=8)
    (folder / "checkpoint-6").mkdir()  # killed while it was saved
    found = numbers(folder)["stopped"]
    assert found["finished"] is False
    assert found["step"] == 4
    assert found["results"]["training_loss"] == 4.0
    assert found["results"]["seconds_in_steps"] == 2.0
    assert main(["compare", str(folder), "--output", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert "4 of 8, interrupted" in shown
    assert "its figures are those of its last checkpoint, step 4 of 8" in shown


def test_a_resumed_runs_training_time_is_left_out(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "resumed", [3.0] * 10, seconds=1.0, runtime=4.0)
    results = numbers(folder)["resumed"]["results"]
    assert results["training_seconds"] is None
    assert results["seconds_in_steps"] == 10.0


@pytest.mark.parametrize(
    ("optim", "optim_args", "lora_rank", "expected"),
    [
        ("galore_adamw", None, None, "GaLore r=128"),
        ("galore_adamw_8bit", "rank=32, scale=2", None, "GaLore r=32, 8-bit"),
        ("galore_adafactor_layerwise", "rank=8", None, "GaLore Adafactor r=8, layerwise"),
        ("adamw_torch_fused", None, None, "AdamW"),
        ("adamw_bnb_8bit", None, None, "AdamW, 8-bit"),
        ("paged_adamw_8bit", None, None, "AdamW, 8-bit, paged"),
        ("adamw_torch", None, 16, "LoRA r=16"),
        ("adamw_bnb_8bit", None, 16, "LoRA r=16, AdamW, 8-bit"),
        ("lion_32bit", None, None, "lion_32bit"),
    ],
)
def test_methods(optim: str, optim_args: str | None, lora_rank: int | None, expected: str, tmp_path: Path) -> None:
    facts = {"optim": optim, "optim_args": optim_args, "lora_rank": lora_rank}
    assert runs.read_run(write_run(tmp_path / "run", facts=facts), "run").method == expected


def test_folders_of_the_same_name_are_told_apart(tmp_path: Path) -> None:
    folders = [tmp_path / path for path in ("a/x/out", "b/x/out", "b/y/out", "lone")]
    assert runs.folder_names(folders) == ["a/x/out", "b/x/out", "y/out", "lone"]


@pytest.mark.usefixtures("_no_pictures")
def test_names_are_taken_in_their_order(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / name) for name in ("b", "a")]
    assert list(compared(folders, tmp_path / "out", "--names", "GaLore, and more,AdamW".replace(", ", " "))) == [
        "GaLore and more",
        "AdamW",
    ]


# ---- the page and the pictures


def test_the_page_has_the_numbers_and_needs_nothing_else(tmp_path: Path) -> None:
    first = write_run(tmp_path / "first", held_out=[4.0, 5.0])
    second = write_run(
        tmp_path / "second", [4.0, 3.0, 1.0], {"trainable_parameters": 25, "optimizer_bytes": 2**20}, seconds=0.25
    )
    compared([first, second], tmp_path / "out")
    text = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    assert re.search(r"https?:|url\(|@import|<script|<link", text) is None
    page = Page(text)
    assert [table[0] for table in page.tables] == [["run", "first", "second"]] * 3
    rows = page.rows()
    assert rows["training loss, mean of the last tenth"] == ["2.0000", "1.0000 (−50.0 %)"]
    assert rows["held-out loss, first"] == ["4.0000", "–"]
    assert rows["held-out loss, last"] == ["5.0000", "–"]
    assert rows["step time, median"] == ["0.500 s", "0.250 s (−50.0 %)"]
    assert rows["tokens per second, median"] == ["128", "256 (+100.0 %)"]
    assert rows["peak memory"] == ["0.0300 GiB", "0.0300 GiB (0.0 %)"]
    assert rows["optimizer state"] == ["3.00 MiB", "1.00 MiB (−66.7 %)"]
    assert rows["trained"] == ["all", "25 (2.50 %)"]
    assert rows["optim_args"] == ["rank=64, scale=1"] * 2
    assert rows["torch"] == ["2.13.0", "2.13.0"]
    assert rows["steps"] == ["3", "3"]
    # Not where both are the same, and not of a number that only one has.
    assert page.best[:4] == ["1.0000 (−50.0 %)", "0.250 s (−50.0 %)", "256 (+100.0 %)", "1.00 MiB (−66.7 %)"]
    files = {file.name: file.read_bytes() for file in (tmp_path / "out").glob("*.png")}
    assert sorted(files.values()) == sorted(page.pictures.values())
    assert set(files) == {
        f"{name}.png"
        for name in (
            *("training_loss", "held_out_loss", "learning_rate", "step_time", "tokens_per_second"),
            *("peak_memory", "optimizer_state"),
        )
    }
    assert all(min(png_size(png)) > 60 for png in files.values())


def test_names_are_text_on_the_page_and_in_the_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "<script>alert('[red]$x_1$')</script>"
    folder = write_run(tmp_path / "run", facts={"model": '"><img src=x>', "optim_args": None})
    assert main(["compare", str(folder), "--names", name, "--output", str(tmp_path / "out")]) == 0
    assert "[red]" in capsys.readouterr().out.replace("\n", "")  # no markup of rich's
    page = Page((tmp_path / "out" / "index.html").read_text(encoding="utf-8"))
    assert "script" not in page.tags
    assert page.tables[0][0] == ["run", name]
    assert page.rows()["model"] == ['"><img src=x>']


def test_a_loss_that_is_not_a_number(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = write_run(tmp_path / "good", held_out=[3.0, 2.0])
    bad = write_run(tmp_path / "bad", [4.0, NAN, math.inf], held_out=[3.0, NAN])
    found = numbers(good, bad)["bad"]["results"]
    assert found["training_loss"] is None
    assert (found["eval_loss_last"], found["eval_loss_lowest"]) == (None, 3.0)
    assert main(["compare", str(bad), str(good), "--output", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert "bad: the training loss is not finite, first at step 2." in shown
    rows = Page((tmp_path / "out" / "index.html").read_text(encoding="utf-8")).rows()
    assert rows["held-out loss, last"] == ["NaN", "2.0000"]  # and no difference from it
    assert rows["training loss, mean of the last tenth"] == ["inf", "2.0000"]


def test_only_nan(tmp_path: Path) -> None:
    found = compared([write_run(tmp_path / "bad", [NAN, NAN])], tmp_path / "out")["bad"]
    assert found["results"]["training_loss"] is None
    assert not (tmp_path / "out" / "training_loss.png").exists()


def test_metrics_that_all_evaluated_runs_share(tmp_path: Path) -> None:
    def scored(name: str, **metrics: float) -> Path:
        folder = write_run(tmp_path / name)
        log = [*a_log([2.0, 1.0]), {"step": 1, "eval_accuracy": 0.25}, {"step": 2, "eval_loss": 1.0, **metrics}]
        write_state(folder, log, 2)
        return folder

    folders = [scored("a", eval_accuracy=0.5, eval_f1=1.0), scored("b", eval_accuracy=0.75), write_run(tmp_path / "c")]
    found = compared(folders, tmp_path / "out")
    assert [found[name]["results"]["eval_accuracy"] for name in "abc"] == [0.5, 0.75, None]
    assert "eval_f1" not in found["a"]["results"]
    rows = Page((tmp_path / "out" / "index.html").read_text(encoding="utf-8")).rows()
    assert rows["held-out accuracy, last"] == ["0.5000", "0.7500 (+50.0 %)", "–"]
    assert (tmp_path / "out" / "eval_accuracy.png").is_file()


def test_runs_with_nothing_in_common(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_state(tmp_path / "evaluated", [{"eval_loss": 2.0, "step": 5}], 5)
    write_state(tmp_path / "trained", [{"loss": 3.0, "step": 7}], 7)
    folders = [str(tmp_path / "evaluated"), str(tmp_path / "trained")]
    assert main(["compare", *folders, "--output", str(tmp_path / "o")]) == 0
    rows = Page((tmp_path / "o" / "index.html").read_text(encoding="utf-8")).rows()
    assert rows["training loss, mean of the last tenth"] == ["–", "3.0000"]
    assert rows["held-out loss, last"] == ["2.0000", "–"]
    assert "step time, median" not in rows
    assert "Logged by no run: learning rate, step time, tokens per second, peak memory." in capsys.readouterr().out


@pytest.mark.usefixtures("_no_pictures")
def test_totals_are_not_set_against_each_other_where_steps_differ(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / "long", [2.0] * 4), write_run(tmp_path / "short", [2.0] * 2, runtime=5.0)]
    compared(folders, tmp_path / "out")
    page = Page((tmp_path / "out" / "index.html").read_text(encoding="utf-8"))
    assert page.rows()["training time, with evaluations"] == ["20.0 s", "5.00 s"]
    assert "5.00 s" not in page.best


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The figures that are saved, by their titles."""
    figures: dict[str, Any] = {}
    original = Figure.savefig

    def savefig(self: Figure, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        figures[self.axes[0].get_title(loc="left")] = self

    monkeypatch.setattr(Figure, "savefig", savefig)
    return figures


def test_ten_runs_and_a_legend_that_covers_none(tmp_path: Path, drawn: dict[str, Any]) -> None:
    folders = [write_run(tmp_path / f"_run_{n}_$x$_{'long' * 9}", [4.0 + n, 3.0 + n]) for n in range(10)]
    comparison_figures.pictures(runs.read_runs(folders))
    figure = drawn["Training loss"]
    axes, legend = figure.axes[0], figure.legends[0]
    labels = [text.get_text() for text in legend.get_texts()]
    assert len(set(labels)) == 10
    assert not legend.get_window_extent().overlaps(axes.get_window_extent())
    box = legend.get_window_extent()
    assert figure.bbox.contains(box.x0, box.y0)
    assert figure.bbox.contains(box.x1, box.y1)
    styles = {(line.get_color(), str(line.get_linestyle()), str(line._dash_pattern)) for line in axes.lines}
    assert len(styles) == 10
    bars = drawn["Peak memory"].axes[0]
    boxes = [text.get_window_extent() for text in bars.get_yticklabels()]
    assert not any(a.overlaps(b) for a, b in itertools.pairwise(boxes))


def test_axes_are_logarithmic_only_where_curves_lie_far_apart(tmp_path: Path, drawn: dict[str, Any]) -> None:
    near = [write_run(tmp_path / "a", [9.0, 5.0, 4.0]), write_run(tmp_path / "b", [8.0, 4.0, 3.0])]
    comparison_figures.pictures(runs.read_runs(near))
    assert {figure.axes[0].get_yscale() for figure in drawn.values()} == {"linear"}
    drawn.clear()
    far = write_run(tmp_path / "c", [500.0, 400.0, 300.0])
    comparison_figures.pictures(runs.read_runs([*near, far]))
    assert drawn["Training loss"].axes[0].get_yscale() == "log"
    assert drawn["Learning rate"].axes[0].get_yscale() == "linear"


def test_a_first_step_that_compiles_does_not_flatten_the_others(tmp_path: Path, drawn: dict[str, Any]) -> None:
    folder = write_run(tmp_path / "run", [2.0] * 5)
    log = a_log([2.0] * 5)
    log[0]["step_seconds"] = 60.0
    write_state(folder, log, 5)
    comparison_figures.pictures(runs.read_runs([folder]))
    (title,) = (title for title in drawn if title.startswith("Step time"))
    assert title == "Step time (highest 60.0, beyond the axis): run"
    assert drawn[title].axes[0].get_ylim() == (0, 0.75)


def test_a_noisy_curve_has_its_running_median(tmp_path: Path, drawn: dict[str, Any]) -> None:
    losses = [3.0] * 400
    losses[200] = 90.0
    comparison_figures.pictures(runs.read_runs([write_run(tmp_path / "run", losses)]))
    (title,) = (title for title in drawn if title.startswith("Training loss"))
    assert title == "Training loss (thick: running median over a 40th of the log): run"
    raw, smooth = (line.get_ydata() for line in drawn[title].axes[0].lines)
    assert max(raw) == 90.0
    assert set(smooth) == {3.0}


# ---- what a person reads


@pytest.mark.usefixtures("_no_pictures")
@pytest.mark.parametrize("width", [60, 80, 200])
def test_tables_fit_the_terminal(
    width: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    folders = [write_run(tmp_path / f"run{n}", [4.0, 3.0 + n]) for n in range(6)]
    assert main(["compare", *map(str, folders), "--output", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    boxes = [line for line in shown.splitlines() if line[:1] in "┏┡│└┃"]
    assert max(map(len, boxes)) <= width
    losses = [cell for line in boxes if "training loss" in line for cell in re.findall(r"\d\.\d{4}", line)]
    assert losses == [f"{3 + n:.4f}" for n in range(6)]


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0.0, "0"), (0.12345, "0.123"), (12.345, "12.3"), (1234567.8, "1,234,568"), (1e-9, "1.00e-09"), (NAN, "NaN")],
)
def test_digits(value: float, expected: str) -> None:
    assert digits(value) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [(41.52, "41.5 s"), (723.0, "12 min 03 s"), (3599.7, "1 h 00 min"), (12_000.0, "3 h 20 min")],
)
def test_durations(value: float, expected: str) -> None:
    assert duration(value) == expected


# ---- mistakes: one line, exit status 2, nothing written


def _no_log(folder: Path) -> None:
    write_state(folder, [], 3)


def _no_history(folder: Path) -> None:
    folder.mkdir()
    (folder / "trainer_state.json").write_text("{}")


def _broken(folder: Path) -> None:
    folder.mkdir()
    (folder / "trainer_state.json").write_text('{"log_history": [')


def _not_text(folder: Path) -> None:
    folder.mkdir()
    (folder / "trainer_state.json").write_bytes(b"\xff\xfe\xfa")


def _broken_facts(folder: Path) -> None:
    write_run(folder)
    (folder / RUN_FILE).write_text('{"model": "m"}')


def _stopped_early(folder: Path) -> None:
    write_facts(folder, finished=False)


MISTAKES: dict[str, tuple[Any, list[str], list[str]]] = {
    "no folder": (lambda folder: None, [], ["bad: there is no such folder"]),
    "a file": (lambda folder: folder.write_text("x"), [], ["bad is a file"]),
    "an empty folder": (lambda folder: folder.mkdir(), [], ["bad holds no trainer_state.json"]),
    "an empty log": (_no_log, [], ["has an empty log", "logging_steps"]),
    "no log": (_no_history, [], ["holds no log_history"]),
    "broken JSON": (_broken, [], ["trainer_state.json cannot be read"]),
    "no text": (_not_text, [], ["trainer_state.json cannot be read"]),
    "broken facts": (_broken_facts, [], [f"{RUN_FILE} cannot be read"]),
    "stopped before a checkpoint": (_stopped_early, [], ["stopped before its first checkpoint"]),
    "too few names": (write_run, ["--names", "a"], ["--names gives 1 (a), but there are 2 runs"]),
    "an empty name": (write_run, ["--names", "a,"], ["empty name"]),
    "the same name": (write_run, ["--names", "a,a"], ["calls two runs the same"]),
    "no name": (write_run, ["--names"], ["--names needs a name for each run"]),
    "unknown option": (write_run, ["--outptu", "x"], ["there is no option --outptu. Did you mean '--output'?"]),
    "output twice": (write_run, ["--output=x"], ["--output is given twice"]),
    "a recipe": (write_run, ["--config", "x.yaml"], ["--config is for a sweep"]),
    "a switch with a value": (write_run, ["--json=yes"], ["--json takes no value"]),
}


@pytest.mark.parametrize(("make", "options", "words"), MISTAKES.values(), ids=list(MISTAKES))
def test_a_mistake_is_one_line_and_leaves_nothing(
    make: Any, options: list[str], words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = write_run(tmp_path / "good")
    make(tmp_path / "bad")
    before = sorted(tmp_path.rglob("*"))
    arguments = [str(good), str(tmp_path / "bad"), "--output", str(tmp_path / "deep" / "out"), *options]
    assert main(["compare", *arguments]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    (line,) = shown.err.splitlines()
    assert line.startswith("hf-galore compare: ")
    assert [word for word in words if word not in line] == []
    assert sorted(tmp_path.rglob("*")) == before


def test_no_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare"]) == 2
    assert "give the folders of runs to compare" in capsys.readouterr().err


def test_the_same_run_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_run(tmp_path / "run")
    assert main(["compare", str(folder), str(folder / ".." / "run")]) == 2
    assert "is given twice" in capsys.readouterr().err


def test_an_output_that_is_below_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "taken").write_text("mine")
    assert main(["compare", str(write_run(tmp_path / "run")), "--output", str(tmp_path / "taken" / "out")]) == 2
    assert "taken is a file" in capsys.readouterr().err
    assert (tmp_path / "taken").read_text() == "mine"


def test_an_output_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise PermissionError(13, "Permission denied")

    folder = write_run(tmp_path / "run")
    monkeypatch.setattr("tempfile.TemporaryFile", refuse)  # tests may run as root, whom nothing stops
    assert main(["compare", str(folder), "--output", str(tmp_path / "out")]) == 2
    assert "cannot be written to" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("_no_pictures")
def test_what_else_is_in_the_output_stays(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    (tmp_path / "out" / "index.html").write_text("old")
    compared([write_run(tmp_path / "run")], tmp_path / "out")
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"
    assert (tmp_path / "out" / "index.html").read_text().startswith("<!DOCTYPE html>")
    assert not [path for path in (tmp_path / "out").iterdir() if path.is_dir()]
