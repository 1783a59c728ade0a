"""What `hf-galore quickstart` shows. Whole runs of it are in test_commands.py."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from rich.console import Console
from torch import nn
from trl import SFTTrainer

from hf_galore import GaLoreAdamW
from hf_galore.cli import quickstart
from hf_galore.cli.main import main
from hf_galore.recipes.embedded_model import conversations, is_asked_in, split
from tests.support.commands import write_checkpoint


def test_the_questions_shown_are_of_both_parts() -> None:
    train, test = split(conversations())
    trained_on = [is_asked_in(question, train) for question in quickstart.QUESTIONS]
    assert trained_on == [True, True, False]
    assert is_asked_in(quickstart.QUESTIONS[-1], test)


# ---- what is shown


def trainer_with(optimizer: GaLoreAdamW, model: nn.Module, history: list[dict[str, float]]) -> SFTTrainer:
    made = SimpleNamespace(
        optimizer=optimizer,
        model=model,
        state=SimpleNamespace(log_history=history, global_step=7),
        args=SimpleNamespace(optim=SimpleNamespace(value="galore_adamw"), output_dir="somewhere"),
    )
    return cast("SFTTrainer", made)


def test_the_closing_table_has_first_last_and_lowest_losses() -> None:
    model = nn.Linear(64, 32)
    history = [
        {"eval_loss": 4.0},
        {"loss": 3.5},
        {"loss": 1.25},
        {"eval_loss": 2.0},
        {"eval_loss": 3.0},
        {"train_runtime": 61.7},
    ]
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(quickstart.summary_table(trainer_with(GaLoreAdamW(model.parameters()), model, history)))
    shown = console.export_text()
    assert "3.50 first, 1.25 last" in shown
    assert "4.00 first, 3.00 last, lowest 2.00" in shown
    assert "62 s for 7 steps" in shown
    assert "somewhere" in shown
    assert f"AdamW's would be {2 * 4 * (64 * 32 + 32) / 1e6:.2f} MB" in shown


@pytest.mark.parametrize("option", ["--config=x.yaml", "--model_name_or_path", "--dataset-name", "--datasets"])
def test_the_quickstart_keeps_its_own_model_and_data(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quickstart", option, "mine"]) == 2
    assert "is not for the quickstart" in capsys.readouterr().err


def test_ctrl_c_in_the_quickstart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(quickstart, "_train", interrupted)
    out = tmp_path / "out"
    assert main(["quickstart", "--output_dir", str(out)]) == 130
    assert "nothing was saved. Run hf-galore quickstart again" in capsys.readouterr().err
    saved = write_checkpoint(out / "checkpoint-20")
    assert main(["quickstart", "--output_dir", str(out), "--resume_from_checkpoint"]) == 130
    said = capsys.readouterr().err
    assert "nothing was saved" not in said
    assert said.endswith(f"go on from {saved} with: hf-galore quickstart --output_dir {out} --resume_from_checkpoint\n")
