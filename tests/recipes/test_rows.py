"""What becomes of the rows of a dataset before TRL gets them: conversations of other kinds, streams, several files."""

from __future__ import annotations

import csv
import json
import logging
from pathlib import Path
from typing import Any

import datasets
import pytest

from hf_galore.errors import UserError
from hf_galore.recipes.data_loading import load_named
from hf_galore.recipes.rows import prepare_rows

CHATML = "{{ '<|im_start|>' + message['role'] }}"
TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def prepared(rows: list[dict[str, Any]], *, stream: bool = False, **options: Any) -> Any:
    split = datasets.Dataset.from_list(rows)
    settings = {"given": "dataset_name d", "text_field": "text", "assistant_only": False, "template": CHATML, **options}
    return prepare_rows(split.to_iterable_dataset() if stream else split, "train", **settings)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("column", ["messages", "conversations"])
@pytest.mark.parametrize("keys", [("role", "content"), ("from", "value")], ids=["role", "from"])
@pytest.mark.parametrize("names", [("user", "assistant"), ("human", "gpt")], ids=["ours", "others"])
def test_conversations_of_other_kinds_are_those_that_trl_takes(
    names: tuple[str, str], keys: tuple[str, str], column: str, stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{column: [dict(zip(keys, turn, strict=True)) for turn in zip(names, "ab", strict=True)]}]
    with caplog.at_level(logging.INFO, logger="hf_galore"):
        split = prepared(rows, stream=stream, assistant_only=True)
    assert list(split) == [{"messages": TURNS}]
    assert len(caplog.records) == (names[0] == "human")
    if names[0] == "human":
        assert "taken for others: human for user, gpt for assistant." in caplog.text


def test_a_role_that_the_template_knows_keeps_its_name(caplog: pytest.LogCaptureFixture) -> None:
    turns = [{"role": "human", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows = [{"messages": turns}]
    assert list(prepared(rows, template="{% if message['role'] == 'human' %}")) == rows
    assert list(prepared(rows)) == [{"messages": TURNS}]


def test_a_prompt_beside_whole_conversations_is_left_out() -> None:
    """As in ultrachat_200k: TRL would look for the completion."""
    assert list(prepared([{"prompt": "a", "prompt_id": "1", "messages": TURNS}])) == [
        {"prompt_id": "1", "messages": TURNS}
    ]
    pairs = [{"prompt": "a", "completion": "b"}]
    assert list(prepared(pairs)) == pairs


def test_what_has_been_tokenized_is_left_alone() -> None:
    rows = [{"input_ids": [1, 2], "text": None}]
    assert list(prepared(rows)) == rows


def test_tools_need_no_content() -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "look", "arguments": "{}"}]}
    assert len(prepared([{"messages": [{"role": "user", "content": "a", "tool_calls": None}, call]}])) == 1


def test_a_stream_is_checked_as_it_is_read() -> None:
    split = prepared([{"text": "a"}, {"text": "b"}, {"text": None}], stream=True)
    rows = iter(split)
    assert [next(rows)["text"], next(rows)["text"]] == ["a", "b"]
    with pytest.raises(UserError, match=r"dataset_name d, split 'train', row 3: has no text \(it is missing or null\)"):
        next(rows)


def test_all_rows_are_looked_at_and_counted() -> None:
    rows: list[dict[str, Any]] = [{"text": "a"}] * 1500
    rows[1200] = rows[1300] = {"text": None}
    with pytest.raises(UserError, match=r"row 1201 and 1 other row\(s\): has no text"):
        prepared(rows)


# ---- a file as data


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".csv", ".tsv", ".txt", ".parquet", ".jsonl.gz"])
def test_a_file_is_the_split_train(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"mine{ending}"
    rows = [{"text": "a b"}, {"text": "c"}]
    if ending in (".csv", ".tsv"):
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, delimiter="\t" if ending == ".tsv" else ",").writerows(
                [["text", "n"], ["a b", 1], ["c", 2]]
            )
    elif ending == ".txt":
        path.write_text("a b\nc\n")
    elif ending == ".json":
        path.write_text(json.dumps(rows))
    elif ending == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    else:
        datasets.Dataset.from_list(rows).to_json(path, compression="gzip" if ending.endswith(".gz") else None)
    splits = load_named(f"dataset_name {path}", str(path))
    assert list(splits) == ["train"]
    assert splits["train"]["text"][:] == ["a b", "c"]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"content": "a"}, "Where 'content' is the text: --dataset_text_field content."),
        ({"question": "a", "answer": "b"}, "Rename 'question' to 'prompt' and 'answer' to 'completion'."),
        (
            {"instruction": "a", "input": "b", "output": "c"},
            "Rename 'instruction', with 'input' added to it, to 'prompt' and 'output' to 'completion'.",
        ),
        ({"a": "b", "c": "d"}, "or 'input_ids'."),
    ],
)
def test_columns_of_other_names(row: dict[str, str], words: str) -> None:
    split = datasets.Dataset.from_list([row])
    with pytest.raises(UserError) as error:
        prepare_rows(split, "train", given="data", text_field="text", assistant_only=False, template=None)
    assert str(error.value).endswith(words)
