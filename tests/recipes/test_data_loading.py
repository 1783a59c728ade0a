"""Data that cannot be loaded: one line that says why, whoever asks for them."""

from __future__ import annotations

from pathlib import Path

import pytest

from hf_galore.recipes.data_loading import load_dataset, split_of
from hf_galore.recipes.errors import UserError


def test_a_file_that_is_broken_is_named_with_what_is_wrong_in_it(tmp_path: Path) -> None:
    file = tmp_path / "broken.jsonl"
    file.write_text('{"text": "a"}\n{"text": \n')
    # The last are the words of datasets 4.
    wrong = "cannot be loaded: (.*JSON|Expected object or value)"
    with pytest.raises(UserError, match=f"^train_file {file} {wrong}") as error:
        load_dataset(f"train_file {file}", "json", data_files=str(file))
    assert "An error occurred while generating the dataset" not in str(error.value)


def test_a_split_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"text": "a"}\n')
    splits = load_dataset("dataset_name data", str(tmp_path))
    assert split_of(splits, "train", "dataset_train_split")["text"][:] == ["a"]
    with pytest.raises(UserError, match=r"no split 'test'; it has train\. Set dataset_test_split to one of them"):
        split_of(splits, "test", "dataset_test_split")
