"""Settings that fit a card: that they do, that no larger ones do, and how they are shown."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hf_galore import GaLoreConfig
from hf_galore.cli.main import main
from hf_galore.plan.needs import OUTSIDE_BYTES, needed_at_a_guess
from hf_galore.plan.planner import MemoryPlan
from hf_galore.recipes import any_recipe, stand_in, suggestions
from hf_galore.recipes.planning import plan_recipe
from tests.support.commands import printed_json, write_recipe
from tests.support.planning import llama_folder

RANKS, BATCHES = (4, 16), (1, 4)


@pytest.fixture(autouse=True)
def _small_search(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(suggestions, "RANKS", RANKS)
    monkeypatch.setattr(suggestions, "BATCHES", BATCHES)
    monkeypatch.setattr(suggestions, "_FEW_LAYERS", (3, 3))  # all of them: no time for estimates


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    llama_folder(folder, layers=3)
    settings = {
        "model_name_or_path": str(folder),
        "dataset_name": "not/needed",
        "max_length": 64,
        "optim": "galore_adamw_8bit_layerwise",
        "optim_target_modules": ["attn", "mlp"],
        "optim_args": "rank=8, update_proj_gap=50, proj_bits=16",
        "output_dir": str(folder / "out"),
    }
    return write_recipe(folder, settings, "small.yaml")


def planned(path: str, rank: int, batch: int, checkpointing: bool) -> MemoryPlan:
    config = GaLoreConfig(rank=rank, update_proj_gap=50)
    return plan_recipe(path, overrides=suggestions.Choice(rank, batch, checkpointing).overrides(config))


def test_what_is_suggested_fits_and_nothing_larger_does(path: str) -> None:
    # What one of the settings needs, so that some fit and some do not.
    vram = planned(path, 4, 4, True).needed_bytes
    arguments = ["plan", "--config", path, "--suggest", "--json", "--vram", f"{vram / 2**20 + 0.001:.3f}MiB"]
    rows = printed_json(arguments)
    found = {(row["rank"], row["checkpointing"]): row for row in rows}
    assert found[4, True]["batch"] == 4
    assert (16, False) not in found or found[16, False]["batch"] == 1
    assert [row["rank"] for row in rows] == sorted((row["rank"] for row in rows), reverse=True)
    for (rank, checkpointing), row in found.items():
        assert row["needed_bytes"] <= vram + 2**11
        assert row["tokens_per_step"] == row["batch"] * 64
        assert row["overrides"][1] == f"rank={rank}, update_proj_gap=50"
        larger = [batch for batch in BATCHES if batch > row["batch"]]
        if larger and rank == 16:
            assert planned(path, rank, row["batch"], checkpointing).needed_bytes == row["needed_bytes"]
            assert planned(path, rank, larger[0], checkpointing).needed_bytes > vram


def test_a_person_reads_a_table_and_what_to_type(
    path: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(suggestions, "BATCHES", (1,))
    assert main(["plan", "--config", path, "--suggest", "--vram", "8GiB"]) == 0
    shown = capsys.readouterr().out
    assert "What fits into 8 GiB, the best first" in shown
    assert "A desktop, which takes 0.3 to 1 GiB, is not counted." in shown
    best = "--optim_args 'rank=16, update_proj_gap=50' --per_device_train_batch_size 1"
    assert f"For the first: {best}" in " ".join(shown.split())
    one, more = (planned(path, rank, 1, True).peak_bytes for rank in (8, 16))
    cost = f"128 more of rank take {128 * (more - one) / 8 / 2**20:,.1f} MiB."
    assert f"2 settings were estimated, from a few layers; those listed were planned whole. {cost}" in shown
    assert shown.index("│   16 │") < shown.index("│    4 │")  # and of each, first the one with more tokens a step


def test_where_nothing_fits(path: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suggestions, "RANKS", (4,))
    monkeypatch.setattr(suggestions, "BATCHES", (1,))
    assert main(["plan", "--config", path, "--suggest", "--vram", "871MiB"]) == 1
    assert "Nothing fits into 0.8506 GiB: not even rank 4 with a batch of 1" in capsys.readouterr().out


def test_other_optimizers_have_no_rank_to_look_for(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--config", path, "--suggest", "--vram", "8GiB", "--optim", "adamw_torch"]) == 2
    assert "--suggest looks for a rank" in capsys.readouterr().err


def test_an_estimate_is_near_the_plan_and_not_below_it(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suggestions, "_FEW_LAYERS", (1, 2))  # of three

    def parsed(overrides: object = ()) -> object:
        return any_recipe.parse(["--config", path, *overrides], "test", "")  # type: ignore[misc]

    config = GaLoreConfig(rank=8, update_proj_gap=50)
    estimate = suggestions.Estimate(parsed, config, stand_in.shape_of(parsed()), lambda text: None)  # type: ignore[arg-type]
    for rank, batch in ((4, 1), (16, 4), (8, 2)):
        true = planned(path, rank, batch, True).peak_bytes
        found = estimate(suggestions.Choice(rank, batch, True))
        assert 0.999 * true <= found <= 1.25 * true


def test_a_guess_has_what_is_outside_of_the_allocator() -> None:
    with_segments, without = (needed_at_a_guess(10 * 2**30, expandable=expandable) for expandable in (True, False))
    assert 10 * 2**30 + OUTSIDE_BYTES < with_segments < without < 11 * 2**30 + OUTSIDE_BYTES


def test_the_folder_of_the_recipe_stays_as_it_was(path: str) -> None:
    assert not (Path(path).parent / "out").exists()
