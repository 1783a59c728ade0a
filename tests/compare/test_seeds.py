"""`hf-galore compare`: runs that differ in their seed are one line and one curve, mean ± standard deviation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from hf_galore.cli import compare
from hf_galore.cli.main import main
from hf_galore.compare import figures
from hf_galore.compare.curves import curve
from hf_galore.compare.notes import notes
from hf_galore.compare.reading import read_runs
from hf_galore.compare.seeds import Seeds, by_seed
from hf_galore.compare.tables import results_table
from tests.support.commands import printed_json
from tests.support.written_runs import NAN, Page, write_facts, write_run

LOSSES = {1: [4.0, 3.0, 2.5], 2: [4.2, 3.1, 2.0], 3: [4.4, 3.5, 2.2]}


@pytest.fixture(autouse=True)
def _coarse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures of few pixels are drawn faster."""
    monkeypatch.setattr(figures, "_DPI", 50)


def seeded(folder: Path, seed: int | None, losses: list[float] | None = None, **settings: Any) -> Path:
    told = {"seed": seed, "data_seed": None, "learning_rate": 1e-3, **settings}
    return write_run(folder, losses or LOSSES[seed or 1], {"settings": told}, held_out=losses or LOSSES[seed or 1])


def three(folder: Path, name: str = "galore") -> list[Path]:
    return [seeded(folder / f"{name}-seed{seed}", seed) for seed in LOSSES]


def names(folders: list[Path]) -> list[str]:
    return [one.name for one in by_seed(read_runs(folders))]


# ---- numbers


def test_mean_and_deviation_are_numpys(tmp_path: Path) -> None:
    other = seeded(tmp_path / "other", 1, [5.0, 4.0, 3.0], learning_rate=2e-3)
    arguments = [*map(str, [*three(tmp_path), other]), "--output", str(tmp_path / "out")]
    found = printed_json(["compare", *arguments, "--json"])
    (seeds,) = found["seeds"]
    assert (seeds["name"], seeds["broken"]) == ("galore", [])
    assert seeds["runs"] == ["galore-seed1", "galore-seed2", "galore-seed3"]
    assert [run["name"] for run in found["runs"]] == [*seeds["runs"], "other"]
    last = [losses[-1] for losses in LOSSES.values()]
    mean, deviation = np.mean(last), np.std(last, ddof=1)
    assert seeds["results"]["eval_loss_last"] == {
        "mean": pytest.approx(mean, rel=1e-12),
        "deviation": pytest.approx(deviation, rel=1e-12),
        "count": 3,
    }
    page = Page((tmp_path / "out" / "index.html").read_text(encoding="utf-8"))
    settings, results, each = page.tables[:3]
    assert settings[0] == ["run", "galore (3 seeds)", "other"]
    assert ["learning_rate"] not in settings
    assert ["seed", "1, 2, 3", "1"] in settings
    row = next(row for row in results if row[0] == "held-out loss, last")
    assert row[1] == f"{mean:.4f} ± {deviation:.4f}"
    assert row[2].startswith("3.0000 (+34.3 %)")
    # The single ones are there too.
    assert [row[0] for row in each[1:]] == [*seeds["runs"], "other"]
    assert [row[each[0].index("held-out loss, last")] for row in each[1:]] == ["2.5000", "2.0000", "2.2000", "3.0000"]


def test_the_curve_is_the_mean_in_a_band(tmp_path: Path) -> None:
    (seeds,) = by_seed(read_runs(three(tmp_path)))
    found = curve(seeds, "loss", "steps")
    assert found is not None
    assert found.deviation is not None
    logged = np.array(list(LOSSES.values()))
    assert found.x == [1, 2, 3]
    np.testing.assert_allclose(found.y, logged.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(found.deviation, logged.std(axis=0, ddof=1), rtol=1e-12)


def test_the_band_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    original = Figure.savefig

    def savefig(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        drawn.append(self)

    monkeypatch.setattr(Figure, "savefig", savefig)
    figures.pictures(by_seed(read_runs(three(tmp_path))), for_page=False)
    axes = drawn[0].axes[0]
    assert axes.get_title(loc="left") == "Training loss (band: ± standard deviation): galore (3 seeds)"
    (band,) = axes.collections
    corners = {(round(float(x), 6), round(float(y), 6)) for x, y in band.get_paths()[0].vertices}
    logged = np.array(list(LOSSES.values()))
    mean, deviation = logged.mean(axis=0), logged.std(axis=0, ddof=1)
    assert corners == {
        (step + 1, round(float(mean[step] + sign * deviation[step]), 6)) for step in range(3) for sign in (1, -1)
    }


def test_a_seed_that_broke_is_in_no_mean_and_the_others_are_best_at_nothing(tmp_path: Path) -> None:
    folders = [*three(tmp_path), seeded(tmp_path / "galore-seed4", 4, [4.0, NAN, NAN])]
    folders.append(seeded(tmp_path / "worse", 1, [9.0, 9.0, 9.0], learning_rate=2e-3))
    compared = by_seed(read_runs(folders))
    row = next(row for row in results_table(compared).rows if row.label == "held-out loss, last")
    mean, deviation = np.mean([2.5, 2.0, 2.2]), np.std([2.5, 2.0, 2.2], ddof=1)
    assert row.cells[0] == f"{mean:.4f} ± {deviation:.4f} (3 of 4)"
    assert row.best == frozenset()
    assert results_table(compared).marks == {0: "4 seeds, broken"}
    said = notes(compared)
    assert "galore-seed4 is broken: the training loss is not finite, first at step 2. It is best at nothing." in said
    assert "galore: its means are of 3 of 4 seeds; 1 broke." in said


def test_each_seed_by_itself_where_that_is_wanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compare, "pictures", lambda runs, axis: [])
    arguments = ["compare", *map(str, three(tmp_path)), "--output", str(tmp_path / "out")]
    assert main([*arguments, "--by-seed"]) == 0
    shown = capsys.readouterr().out
    assert "galore-seed2" in shown
    assert "±" not in shown
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert "galore (3 seeds)" in shown
    assert "± is the standard deviation over seeds (of a sample, n − 1): galore: 1, 2, 3." in shown
    assert "did not do the same work" not in shown


# ---- which


def test_only_runs_that_differ_in_nothing_else_are_taken_together(tmp_path: Path) -> None:
    folders = three(tmp_path)
    folders.insert(1, seeded(tmp_path / "rate", 1, learning_rate=2e-3))
    folders.append(write_run(tmp_path / "unknown"))
    interrupted = seeded(tmp_path / "galore-seed5", 5, [1.0, 1.0, 1.0])
    write_facts(interrupted, settings={"seed": 5, "data_seed": None, "learning_rate": 1e-3}, finished=False)
    (interrupted / "trainer_state.json").rename(interrupted / "kept")
    (interrupted / "checkpoint-1").mkdir()
    (interrupted / "kept").rename(interrupted / "checkpoint-1" / "trainer_state.json")
    found = by_seed(read_runs([*folders, interrupted]))
    assert [one.name for one in found] == ["galore", "rate", "unknown", "galore-seed5"]
    assert isinstance(found[0], Seeds)
    assert found[0].seeds == ["1", "2", "3"]


def test_a_seed_that_was_run_twice_is_no_seed_more(tmp_path: Path) -> None:
    assert names([seeded(tmp_path / "a", 1), seeded(tmp_path / "b", 1)]) == ["a", "b"]


def test_other_models_or_devices_are_not_taken_together(tmp_path: Path) -> None:
    first, second = seeded(tmp_path / "a1", 1), seeded(tmp_path / "a2", 2)
    assert names([first, second]) == ["a"]
    write_facts(second, settings={"seed": 2, "data_seed": None, "learning_rate": 1e-3}, device="NVIDIA H100")
    assert names([first, second]) == ["a1", "a2"]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["galore-s1", "galore-s2"], "galore"),
        (["seed=1, rank=8", "seed=2, rank=8"], "rank=8"),
        (["rank=8, seed=1", "rank=8, seed=12"], "rank=8"),
        (["seed-1_rank-8", "seed-2_rank-8"], "rank-8"),
        (["r64-1", "r64-2"], "r64"),
        (["run10", "run11"], "run"),
        (["first/out", "second/out"], "out"),
        (["one", "two"], "GaLore r=64, 8-bit, layerwise"),
        (["seed=1", "seed=2"], "GaLore r=64, 8-bit, layerwise"),
    ],
)
def test_names_without_their_seeds(given: list[str], expected: str, tmp_path: Path) -> None:
    folders = [seeded(tmp_path / str(place), place, [1.0]) for place in range(len(given))]
    (found,) = by_seed(read_runs(folders, given))
    assert found.name == expected


def test_two_groups_are_not_called_the_same(tmp_path: Path) -> None:
    folders = [
        seeded(tmp_path / f"{rate}-{seed}", seed, learning_rate=rate) for rate in (1e-3, 2e-3) for seed in (1, 2)
    ]
    found = by_seed(read_runs(folders, ["run-s1", "run-s2", "run-s3", "run-s4"]))
    assert [one.name for one in found] == ["run-s1 + run-s2", "run-s3 + run-s4"]
