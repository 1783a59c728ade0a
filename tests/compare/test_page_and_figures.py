"""`hf-galore compare`: the page that it makes, and the pictures."""

from __future__ import annotations

import itertools
import math
import re
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from hf_galore.cli.main import main
from hf_galore.compare import figures, notes, reading, tables
from hf_galore.compare.page import page
from hf_galore.compare.runs import Run
from tests.support.written_runs import (
    NAN,
    Page,
    a_log,
    compared,
    numbers,
    png_size,
    write_facts,
    write_run,
    write_state,
)


@pytest.fixture(autouse=True)
def _coarse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures of few pixels are drawn faster."""
    monkeypatch.setattr(figures, "_DPI", 50)


LONG = "-and-what-it-was-told"


def read_page(folder: Path) -> Page:
    return Page((folder / "index.html").read_text(encoding="utf-8"))


def twelve(folder: Path) -> list[Path]:
    """Runs with names short and long, one of them broken, one interrupted, one by another program."""

    def settings(place: int) -> dict[str, Any]:
        args = f"rank={place + 1}"
        return {"optim_args": args, "settings": {"max_length": 2**place, "optim_args": args, "seed": 1}}

    names = [f"run{place}{LONG * (place % 4)}" for place in range(12)]
    for place, name in enumerate(names):
        write_run(folder / name, [5.0, 4.0, 3.0 + place], settings(place), held_out=[4.0, 3.0])
    write_state(folder / names[3], a_log([5.0, NAN, NAN]), 3)
    write_facts(folder / names[5], **settings(5), finished=False)
    write_state(folder / names[5] / "checkpoint-2", a_log([5.0, 4.0], runtime=None), 2, 3)
    (folder / names[7] / "hf_galore_run.json").unlink()
    return [folder / name for name in names]


@pytest.fixture(scope="module")
def page_of_twelve(tmp_path_factory: pytest.TempPathFactory) -> str:
    found: list[Run] = reading.read_runs(twelve(tmp_path_factory.mktemp("runs")))
    return page(found, figures.pictures(found))


def test_twelve_runs_have_a_line_each_settings_that_differ_first_and_one_legend(page_of_twelve: str) -> None:
    text, page = page_of_twelve, Page(page_of_twelve)
    marked = [f"run{place}{LONG * (place % 4)}" for place in range(12)]
    marked[3] += " (broken)"
    marked[5] += " (interrupted)"
    differ, results = page.tables[:2]
    assert differ[0][:2] == ["run", "method"]  # by their ranks
    assert {"max_length", "rank"} <= set(differ[0])
    assert not {"optim_args", "seed", "model", "device"} & set(differ[0])  # of GaLore's keys those that differ
    assert [row[0] for row in differ[1:]] == marked
    assert [row[differ[0].index("max_length")] for row in differ[1:]] == [
        "–" if place == 7 else str(2**place) for place in range(12)
    ]
    assert [row[0] for row in results[1:]] == marked
    assert [row[1] for row in results[1:]][:4] == ["3.0000", "4.0000", "5.0000", "NaN"]
    assert "The same in all: model <b>org/model</b>" in text
    assert text.count('type="checkbox"') == 12
    assert "broken at step 2" in text
    # Whatever is a run's can be hidden with it, and nothing else is.
    for place in range(12):
        assert f"body:has(#show-{place}:not(:checked)) .run-{place} {{ display: none; }}" in text
        assert text.count(f'<tr class="run-{place}">') == 2
        # Held-out loss and all else over three axes, and two bars with their numbers.
        assert len(re.findall(rf'<g class="run-{place}"', text)) >= (10 if place in (3, 5, 7) else 19)


def test_what_is_referred_to_in_pictures_is_there_once(page_of_twelve: str) -> None:
    ids = re.findall(r'\bid="([^"]+)"', page_of_twelve)
    assert len(ids) == len(set(ids))
    referred = set(re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', page_of_twelve))
    assert referred
    assert {one or other for one, other in referred} <= set(ids)
    # Colours are the page's, which are others where it is dark.
    assert re.findall(r"(?:stroke|fill): #[0-9a-f]+", page_of_twelve.partition("</style>")[2]) == []


def test_a_reader_chooses_what_curves_are_over(tmp_path: Path) -> None:
    compared([write_run(tmp_path / "a"), write_run(tmp_path / "b")], tmp_path / "out", "--x", "hours")
    text = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    assert re.findall(r'id="over-(\w+)" autocomplete="off"( checked)?', text) == [
        ("steps", ""),
        ("tokens", ""),
        ("hours", " checked"),
    ]
    for axis in ("steps", "tokens", "hours"):
        assert f"body:has(#over-{axis}:checked) div.axis.{axis} {{ display: block; }}" in text
    assert text.count('<div class="axis hours chosen">') == text.count('<div class="axis steps">') == 4


def test_the_page_has_the_numbers_and_needs_nothing_else(tmp_path: Path) -> None:
    first = write_run(tmp_path / "first", held_out=[4.0, 5.0])
    second = write_run(
        tmp_path / "second", [4.0, 3.0, 1.0], {"trainable_parameters": 25, "optimizer_bytes": 2**20}, seconds=0.25
    )
    compared([first, second], tmp_path / "out")
    text = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    assert re.search(r"https?:|url\((?!#)|@import|<script|<link|<img", text) is None
    page = Page(text)
    assert [table[0] for table in page.tables] == [["run", "first", "second"]] * 4
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
    # Over steps, tokens and hours; and bars.
    curves = ["Training loss", "Held-out loss", "Learning rate", "Step time", "Speed"]
    assert page.pictures == [title for title in curves for _ in range(3)] + ["Peak memory", "Optimizer state"]
    files = {file.name: file.read_bytes() for file in (tmp_path / "out").glob("*.png")}
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
    assert name not in page.tags
    assert page.rows()["model"] == ['"><img src=x>']


def test_a_loss_that_is_not_a_number(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = write_run(tmp_path / "good", held_out=[3.0, 2.0])
    bad = write_run(tmp_path / "bad", [4.0, NAN, math.inf], held_out=[3.0, NAN])
    found = numbers(good, bad)["bad"]["results"]
    assert found["training_loss"] is None
    assert (found["eval_loss_last"], found["eval_loss_lowest"]) == (None, 3.0)
    assert main(["compare", str(bad), str(good), "--output", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert "bad is broken: the training loss is not finite, first at step 2." in " ".join(shown.split())
    assert "bad (broken)" in shown
    rows = read_page(tmp_path / "out").rows()
    assert rows["held-out loss, last"] == ["NaN", "2.0000"]  # and no difference from it
    assert rows["training loss, mean of the last tenth"] == ["inf", "2.0000"]


def test_a_broken_run_is_best_at_nothing(tmp_path: Path) -> None:
    """transformers logs a loss of NaN as 0, unless it is told otherwise: the norm of the gradient gives it away."""
    good = write_run(tmp_path / "good", [4.0, 3.0], held_out=[3.0, 2.0])
    bad = write_run(tmp_path / "bad")
    write_state(bad, [*a_log([4.0], held_out=[3.0]), *({**one, "step": 2} for one in a_log([0.0], grad_norm=NAN))], 2)
    found = reading.read_runs([good, bad])
    assert [run.broken for run in found] == [None, ("grad_norm", 2)]
    rows = {row.label: row for row in tables.results_table(found).rows}
    loss = rows["training loss, mean of the last tenth"]
    assert (loss.cells[1], loss.best) == ("0.0000 (−100.0 %)", frozenset())
    assert rows["steps"].cells == ["2", "2, broken at 2"]
    said = notes.notes(found)
    assert "bad is broken: grad_norm is not finite, first at step 2. It is best at nothing." in said


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
    rows = read_page(tmp_path / "out").rows()
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


def test_totals_are_not_set_against_each_other_where_steps_differ(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / "long", [2.0] * 4), write_run(tmp_path / "short", [2.0] * 2, runtime=5.0)]
    compared(folders, tmp_path / "out")
    page = Page((tmp_path / "out" / "index.html").read_text(encoding="utf-8"))
    assert page.rows()["training time, with evaluations"] == ["20.0 s", "5.00 s"]
    assert "5.00 s" not in page.best


# ---- pictures


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
    figures.pictures(reading.read_runs(folders), for_page=False)
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
    figures.pictures(reading.read_runs(near), for_page=False)
    assert {figure.axes[0].get_yscale() for figure in drawn.values()} == {"linear"}
    drawn.clear()
    far = write_run(tmp_path / "c", [500.0, 400.0, 300.0])
    figures.pictures(reading.read_runs([*near, far]), for_page=False)
    assert drawn["Training loss"].axes[0].get_yscale() == "log"
    assert drawn["Learning rate"].axes[0].get_yscale() == "linear"


def test_a_first_step_that_compiles_does_not_flatten_the_others(tmp_path: Path, drawn: dict[str, Any]) -> None:
    folder = write_run(tmp_path / "run", [2.0] * 5)
    log = a_log([2.0] * 5)
    log[0]["step_seconds"] = 60.0
    write_state(folder, log, 5)
    figures.pictures(reading.read_runs([folder]), for_page=False)
    (title,) = (title for title in drawn if title.startswith("Step time"))
    assert title == "Step time (highest 60.0, beyond the axis): run"
    bottom, top = drawn[title].axes[0].get_ylim()
    assert bottom == 0
    assert 0.5 < top < 1


def test_a_noisy_curve_has_its_running_median(tmp_path: Path, drawn: dict[str, Any]) -> None:
    losses = [3.0] * 400
    losses[200] = 90.0
    figures.pictures(reading.read_runs([write_run(tmp_path / "run", losses)]), for_page=False)
    (title,) = (title for title in drawn if title.startswith("Training loss"))
    assert title == "Training loss (thick: running median over a 40th of the log): run"
    raw, smooth = (line.get_ydata() for line in drawn[title].axes[0].lines)
    assert max(raw) == 90.0
    assert set(smooth) == {3.0}


def test_what_was_not_logged_by_step_is_one_level_or_a_bar(tmp_path: Path, drawn: dict[str, Any]) -> None:
    theirs = tmp_path / "theirs"
    write_state(theirs, a_log([4.0, 2.0], seconds=None, runtime=8.0), 2)
    ours = write_run(tmp_path / "ours")
    figures.pictures(reading.read_runs([ours, theirs]), for_page=False)
    figure = drawn["Step time"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["ours", "theirs (mean of all its time)"]
    assert [list(line.get_ydata()) for line in figure.axes[0].lines] == [[0.5, 0.5, 0.5], [4.0, 4.0]]
    drawn.clear()
    figures.pictures(reading.read_runs([theirs]), for_page=False)
    (bar,) = drawn["Step time"].axes[0].patches
    assert bar.get_width() == 4.0
    assert "Peak memory" not in drawn
