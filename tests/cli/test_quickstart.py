"""What `hf-galore quickstart` makes and shows. Whole runs of it are in test_commands.py."""

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
from hf_galore.recipes import embedded_model
from hf_galore.recipes.embedded_model import CACHE_VARIABLE, conversations, embedded, is_asked_in, split
from hf_galore.recipes.errors import UserError
from hf_galore.recipes.run_record import optimizer_bytes


def said(*turns: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]


# ---- conversations


def test_several_answers_become_several_conversations_and_turns_stay_one() -> None:
    every = conversations()
    answers = [c[1]["content"] for c in every if c[0]["content"] == "What is a super computer?"]
    assert len(answers) == 3
    assert "You know, the big iron!" in answers
    # Six turns of two who talk about soccer, which is no question with five answers.
    assert [len(c) for c in every if c[0]["content"] == "Which is your favorite soccer club?"] == [6]


def test_no_conversation_comes_twice() -> None:
    every = [str(conversation).casefold() for conversation in conversations()]
    assert len(every) == len(set(every)) > 900


def test_every_tenth_question_is_held_out_wherever_it_is_asked() -> None:
    every = [said(f"question {i}", "answer") for i in range(1, 21)]
    later = said("hello", "hi", "Question, 10?", "answer")  # a held-out question in other words, after another one
    train, test = split([*every, later, said("question 20", "another answer")])
    assert test == [said("question 10", "answer"), said("question 20", "answer"), said("question 20", "another answer")]
    assert later not in train
    assert len(train) == 18


def test_a_question_is_the_same_without_case_and_punctuation() -> None:
    every = [said("Hello", "Hi", "What is AI?", "A field.")]
    assert is_asked_in("what is  ai", every)
    assert not is_asked_in("A field.", every)  # that is an answer
    assert not is_asked_in("What is an AI?", every)


def test_the_questions_shown_are_of_both_parts() -> None:
    train, test = split(conversations())
    trained_on = [is_asked_in(question, train) for question in quickstart.QUESTIONS]
    assert trained_on == [True, True, False]
    assert is_asked_in(quickstart.QUESTIONS[-1], test)


# ---- model and data


def test_everybody_gets_the_same_model_and_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = []
    for name in ("one", "two"):
        monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / name))
        root = embedded().model.parent
        files.append({path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()})
    assert files[0] == files[1]
    assert Path("model/model.safetensors") in files[0]


def test_a_failure_leaves_nothing_and_the_slower_of_two_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))

    def fails(tokenizer: Any) -> None:
        raise RuntimeError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(embedded_model, "_model", fails)
        with pytest.raises(RuntimeError):
            embedded()
    assert list(tmp_path.iterdir()) == []

    root = embedded().model.parent
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    embedded_model._make(root)  # as a second process would that saw no folder a moment ago
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before
    assert list(tmp_path.iterdir()) == [root]


def test_a_cache_that_cannot_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "file"))
    with pytest.raises(UserError, match=CACHE_VARIABLE):
        embedded()


# ---- what is shown


def trainer_with(optimizer: GaLoreAdamW, model: nn.Module, history: list[dict[str, float]]) -> SFTTrainer:
    made = SimpleNamespace(
        optimizer=optimizer,
        model=model,
        state=SimpleNamespace(log_history=history, global_step=7),
        args=SimpleNamespace(optim=SimpleNamespace(value="galore_adamw"), output_dir="somewhere"),
    )
    return cast("SFTTrainer", made)


def test_bytes_are_those_of_the_optimizers_tensors() -> None:
    model = nn.Linear(64, 32)
    model.bias.requires_grad_(False)
    plain = GaLoreAdamW([model.weight])
    step = 4  # a float32 scalar for each parameter, and two more for the refreshes of a target
    assert optimizer_bytes(plain) == 2 * 4 * 64 * 32 + step
    projected = GaLoreAdamW([{"params": [model.weight], "rank": 4}])
    basis, moments = 32 * 4 // 2 + 2 * 2, 2 * 4 * 4 * 64  # 4 bits an element, and a scale for 64 of them
    assert optimizer_bytes(projected) == basis + moments + 3 * step


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


def test_ctrl_c_in_the_quickstart(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(quickstart, "_train", interrupted)
    assert main(["quickstart"]) == 130
    assert "nothing was saved. Run hf-galore quickstart again" in capsys.readouterr().err
