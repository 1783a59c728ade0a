"""`hf-galore compare`: where a step is in tokens and hours, curves over those, and losses at equal tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from hf_galore.cli.main import main
from hf_galore.compare import figures
from hf_galore.compare.curves import curve
from hf_galore.compare.notes import notes
from hf_galore.compare.progress import axes_of, position, tokens
from hf_galore.compare.reading import read_run, read_runs
from hf_galore.compare.tables import results_table
from tests.support.written_runs import a_log, numbers, write_run, write_state

# Logged at steps 2 and 4; evaluated at 3 and 5, which is the last.
LOG: list[dict[str, Any]] = [
    {"step": 2, "loss": 4.0, "step_seconds": 1800.0, "tokens_per_second": 0.5, "num_tokens": 1000.0},
    {"step": 3, "eval_loss": 3.5},
    {"step": 4, "loss": 3.0, "step_seconds": 900.0, "tokens_per_second": 0.25, "num_tokens": 3000.0},
    {"step": 5, "eval_loss": 3.0},
    {"step": 5, "train_runtime": 9000.0},
]


def without(*keys: str) -> list[dict[str, Any]]:
    return [{key: value for key, value in entry.items() if key not in keys} for entry in LOG]


def places(folder: Path, log: list[dict[str, Any]], axis: str, key: str) -> list[float] | None:
    write_state(folder, log, 5)
    found = curve(read_run(folder, "run"), key, axis)
    return None if found is None else found.x


def test_places_are_those_of_the_log(tmp_path: Path) -> None:
    assert places(tmp_path, LOG, "steps", "loss") == [2, 4]
    assert places(tmp_path, LOG, "tokens", "loss") == [1000, 3000]
    assert places(tmp_path, LOG, "tokens", "eval_loss") == [2000, 3750]  # in proportion
    assert places(tmp_path, LOG, "hours", "loss") == [1.0, 1.5]
    assert places(tmp_path, LOG, "hours", "eval_loss") == [1.25, 1.875]
    assert tokens(read_run(tmp_path, "run")) == 3750


def test_tokens_that_were_not_counted_are_speed_times_time(tmp_path: Path) -> None:
    # 2 steps of 1800 s at 0.5 tokens a second, and 2 of 900 s at 0.25.
    assert places(tmp_path, without("num_tokens"), "tokens", "loss") == [1800, 2250]


def test_steps_that_were_not_timed_share_all_the_time(tmp_path: Path) -> None:
    log = without("step_seconds", "tokens_per_second")
    assert places(tmp_path, log, "hours", "loss") == [1.0, 2.0]


def test_what_no_log_tells_has_no_place(tmp_path: Path) -> None:
    bare: list[dict[str, Any]] = [{key: entry[key] for key in ("step", "loss") if key in entry} for entry in LOG]
    assert places(tmp_path, bare, "tokens", "loss") is None
    assert places(tmp_path, bare, "hours", "loss") is None
    run = read_run(tmp_path, "run")
    assert position(run, "tokens") is None
    assert axes_of([run]) == ["steps"]


def test_the_first_step_is_at_nothing(tmp_path: Path) -> None:
    log = [{"step": 0, "eval_loss": 9.0}, *LOG]
    for axis in ("steps", "tokens", "hours"):
        found = places(tmp_path, log, axis, "eval_loss")
        assert found is not None
        assert found[0] == 0


@pytest.mark.parametrize(
    ("axis", "label", "expected"),
    [("steps", "step", [2, 4]), ("tokens", "tokens", [1000, 3000]), ("hours", "hours of training steps", [1.0, 1.5])],
)
def test_pictures_are_over_the_axis_that_is_asked_for(
    axis: str, label: str, expected: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kwargs: drawn.append(self))
    write_state(tmp_path / "run", LOG, 5)
    figures.pictures(read_runs([tmp_path / "run"]), axis, for_page=False)
    axes = next(figure.axes[0] for figure in drawn if figure.axes[0].get_title(loc="left").startswith("Training loss"))
    assert list(axes.lines[0].get_xdata()) == expected
    assert axes.get_xlabel() == label


def test_what_has_no_place_on_that_axis_is_over_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kwargs: drawn.append(self))
    write_state(tmp_path / "told", [{"step": 2, "loss": 1.0, "num_tokens": 10.0}], 2)
    write_state(tmp_path / "untold", [{"step": 3, "eval_loss": 1.0}], 3)
    figures.pictures(read_runs([tmp_path / "told", tmp_path / "untold"]), "tokens", for_page=False)
    found = {figure.axes[0].get_title(loc="left"): figure.axes[0].get_xlabel() for figure in drawn}
    assert found == {"Training loss": "tokens", "Held-out loss": "step"}


def test_short_runs_are_over_minutes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kwargs: drawn.append(self))
    write_state(tmp_path / "run", [{"step": 3, "loss": 1.0, "step_seconds": 40.0}], 3)
    figures.pictures(read_runs([tmp_path / "run"]), "hours", for_page=False)
    assert list(drawn[0].axes[0].lines[0].get_xdata()) == [pytest.approx(2.0)]
    assert drawn[0].axes[0].get_xlabel() == "minutes of training steps"


def test_an_axis_that_no_log_has_is_a_mistake(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_state(tmp_path / "run", [{"loss": 1.0, "step": 1}], 1)
    assert main(["compare", str(tmp_path / "run"), "--x", "tokens", "--output", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("hf-galore compare: --x tokens: no run's log tells them.")
    assert not (tmp_path / "out").exists()


# ---- equal tokens


def test_losses_at_equal_tokens_where_some_saw_more(tmp_path: Path) -> None:
    short = write_run(tmp_path / "short", [3.0] * 4, held_out=[6.0, 5.0, 4.0, 3.0])  # 64 tokens a step
    long = write_run(tmp_path / "long", [3.0] * 4)
    doubled = [{**entry, "tokens_per_second": 192.0} for entry in a_log([3.0] * 4, held_out=[8.0, 6.0, 5.0, 4.5])]
    write_state(long, doubled, 4)  # 96 tokens a step: 256 are between the second and the third
    found = numbers(short, long)
    assert (found["short"]["results"]["tokens"], found["long"]["results"]["tokens"]) == (256, 384)
    assert found["short"]["results"]["eval_loss_at_equal_tokens"] == 3.0
    assert found["long"]["results"]["eval_loss_at_equal_tokens"] == pytest.approx(6.0 + (256 - 192) / 96 * (5.0 - 6.0))
    compared = read_runs([short, long])
    assert "held-out loss at 256 tokens" in [row.label for row in results_table(compared).rows]
    (said,) = (note for note in notes(compared) if "equal tokens" in note)
    assert said.startswith("Some runs saw 256 tokens and some up to 384: the held-out loss at 256 compares them")


def test_runs_that_saw_as_many_have_no_such_line(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / name, held_out=[2.0, 1.0]) for name in ("a", "b")]
    assert "eval_loss_at_equal_tokens" not in numbers(*folders)["a"]["results"]
    assert not any("equal tokens" in note for note in notes(read_runs(folders)))


def test_a_run_whose_tokens_are_not_known_is_said(tmp_path: Path) -> None:
    told = write_run(tmp_path / "told")
    write_state(tmp_path / "untold", [{"loss": 1.0, "step": 1}], 1)
    assert "No log tells the tokens of untold: over tokens there is no curve." in notes(
        read_runs([told, tmp_path / "untold"])
    )
