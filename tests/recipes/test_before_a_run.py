"""What is done before a run begins: on a card its plan, that says whether it fits; with `dry_run` nothing else."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from transformers import Trainer

from hf_galore.cli.main import main
from hf_galore.cli.plan_picture import gib
from hf_galore.plan import planner
from hf_galore.plan.cards import PresentCard
from hf_galore.plan.planner import GIB, MemoryPlan, in_gib
from hf_galore.recipes import training
from hf_galore.recipes.embedded_model import Embedded
from hf_galore.recipes.planning import plan_recipe
from tests.support.commands import options, said_of_mistake, short_run, weights, write_recipe
from tests.support.helpers import assert_identical


@pytest.fixture
def settings(small: Embedded, tmp_path: Path) -> dict[str, Any]:
    return {**short_run(small.model, small.data, tmp_path / "out"), "max_steps": 2}


def a_card(monkeypatch: pytest.MonkeyPatch, total: int, free: int) -> None:
    """Let there be a card that a run trains on, as far as its plan is concerned."""
    monkeypatch.setattr(planner, "present_card", lambda context: PresentCard(total, free))
    monkeypatch.setattr(training, "_trains_on_one_card", lambda parsed: True)


@pytest.fixture
def planned(settings: dict[str, Any], tmp_path: Path) -> MemoryPlan:
    plain = {key: str(value) if isinstance(value, Path) else value for key, value in settings.items()}
    return plan_recipe(write_recipe(tmp_path, plain))


def test_a_run_on_a_card_is_planned_and_the_same(
    settings: dict[str, Any],
    planned: MemoryPlan,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    needed = planned.needed_bytes
    a_card(monkeypatch, total=8 * GIB, free=needed)
    assert main(["sft", *options(settings)]) == 0
    said = [record for record in caplog.records if "by its plan" in record.message]
    assert [record.levelname for record in said] == ["INFO"]
    assert said[0].message == (
        f"The run needs {in_gib(needed)} by its plan, and {in_gib(needed)} of the card's 8.00 GiB are free."
    )
    caplog.clear()
    out = tmp_path / "unplanned"
    assert main(["sft", *options({**settings, "plan_first": "false", "output_dir": out})]) == 0
    assert "by its plan" not in caplog.text
    assert_identical(weights(tmp_path / "out"), weights(out))


@pytest.mark.parametrize(
    ("short_of", "advice"),
    [("free", "Other programs hold the rest, which nvidia-smi lists."), ("total", "--suggest says what fits.")],
)
def test_too_little_memory_is_a_warning_before_anything_is_loaded(
    short_of: str,
    advice: str,
    settings: dict[str, Any],
    planned: MemoryPlan,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    short = planned.needed_bytes - 1
    total = short if short_of == "total" else 8 * GIB
    a_card(monkeypatch, total=total, free=short)
    said: list[str] = []

    def begun(self: Trainer, *args: Any, **kwargs: Any) -> None:
        said.extend(record.message for record in caplog.records if record.levelname == "WARNING")
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "train", begun)
    monkeypatch.setattr(Trainer, "save_model", lambda *args: pytest.fail("nothing was trained"))
    # A plan trains too, with another method of the planner's.
    found = planned_without_training(monkeypatch, planned, PresentCard(total, short))
    assert main(["sft", *options(settings)]) == 130
    assert found == [True]
    assert ["it will probably run out of memory" in line and line.endswith(advice) for line in said] == [True]


def planned_without_training(monkeypatch: pytest.MonkeyPatch, planned: MemoryPlan, card: PresentCard) -> list[bool]:
    """Let the plan before a run be one that is known, on the card of this machine; what is returned is told of it."""
    asked: list[bool] = []

    def known(parsed: Any) -> MemoryPlan:
        asked.append(True)
        return dataclasses.replace(planned, vram_bytes=card.total, free_bytes=card.free)

    monkeypatch.setattr(training, "plan_recipe", known)
    return asked


def test_a_dry_run_checks_plans_and_leaves_nothing(
    settings: dict[str, Any],
    planned: MemoryPlan,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(training, "run_recorded", lambda *args, **kwargs: pytest.fail("it trains"))
    before = sorted(tmp_path.iterdir())
    assert main(["sft", *options(settings), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert f"needs a card of {gib(planned.needed_bytes, planned.needed_bytes)} GiB" in " ".join(shown.split())
    assert "Which card is not known: hf-galore plan has --vram 4090, or 24GB, for a verdict." in shown  # `sft` has not
    assert shown.splitlines()[-1] == "hf-galore sft: all checks passed. Nothing was trained or written."
    assert sorted(tmp_path.iterdir()) == before


def test_a_dry_run_on_a_card_that_is_too_small(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, planned: MemoryPlan
) -> None:
    a_card(monkeypatch, total=planned.needed_bytes - 1, free=planned.needed_bytes - 1)
    assert main(["sft", *options(settings), "--dry_run", "true"]) == 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dataset_train_split": "trian"}, "no split 'trian'"),
        ({"optim_target_modules": ["atn"]}, "'atn' matches no trainable"),
        ({"optim_args": "rank=4096"}, "rank 4096"),
    ],
)
def test_a_dry_run_finds_what_a_run_would(
    changes: dict[str, Any],
    words: str,
    settings: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    line = said_of_mistake("sft", [*options({**settings, **changes}), "--dry_run"], capsys)
    assert words in line
    assert not (tmp_path / "out").exists()
