"""The small chat model and the conversations that the quickstart, the notebooks and the tests use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hf_galore.errors import UserError
from hf_galore.recipes import embedded_model
from hf_galore.recipes.embedded_model import CACHE_VARIABLE, conversations, embedded, is_asked_in, split

# ---- conversations


def said(*turns: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]


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


def test_what_is_asked_in_the_test_split_is_not_asked_in_training() -> None:
    train, test = split(conversations())
    asked = [{m["content"].casefold() for c in part for m in c if m["role"] == "user"} for part in (train, test)]
    assert len(train) > 5 * len(test) > 0
    assert asked[0].isdisjoint(asked[1])
    for conversation in train + test:
        assert [m["role"] for m in conversation] == ["user", "assistant"] * (len(conversation) // 2)
        assert all(m["content"].strip() for m in conversation)


# ---- model and data


def test_model_and_data_are_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    first = embedded()
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert embedded() == first
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == times
    assert [folder.name for folder in tmp_path.iterdir()] == [first.model.parent.name]  # nothing temporary is left


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
