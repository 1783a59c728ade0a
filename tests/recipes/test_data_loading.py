"""Data that cannot be loaded: one line that says why, whoever asks for them."""

from __future__ import annotations

import gzip
import lzma
from pathlib import Path

import pytest

from hf_galore.errors import UserError
from hf_galore.recipes.data_loading import load_dataset, load_named, split_of


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


def test_a_folder_that_is_not_there_is_not_one_of_that_name_that_once_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the Hub `datasets` gives what its cache has under the name: files of a folder elsewhere."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    here, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
    here.mkdir()
    (elsewhere / "my_texts").mkdir(parents=True)
    (elsewhere / "my_texts" / "train.jsonl").write_text('{"text": "of another time"}\n')
    monkeypatch.chdir(elsewhere)
    assert load_named("dataset_name my_texts", "my_texts")["train"]["text"][:] == ["of another time"]
    monkeypatch.chdir(here)
    with pytest.raises(UserError, match=r"my_texts( cannot be loaded)?: .*(there is no such folder here|the Hub)"):
        load_named("dataset_name my_texts", "my_texts")


@pytest.mark.parametrize("beside", ["notes.txt", "x.csv", "train-1.jsonl"])
def test_an_empty_file_beside_others_is_no_mistake(beside: str, tmp_path: Path) -> None:
    (tmp_path / "train-0.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    (tmp_path / beside).touch()
    assert load_named("dataset_name d", str(tmp_path))["train"]["text"][:] == ["a", "b"]


@pytest.mark.parametrize("ending", ["gz", "xz"])
def test_a_compressed_file_that_is_cut_off_is_one_line(ending: str, tmp_path: Path) -> None:
    text = "".join(f'{{"text": "{number}"}}\n' for number in range(100)).encode()
    whole = gzip.compress(text) if ending == "gz" else lzma.compress(text)
    path = tmp_path / f"mine.jsonl.{ending}"
    path.write_bytes(whole[:-20])
    with pytest.raises(UserError, match="holds a compressed file that is not whole"):
        load_named(f"dataset_name {path}", str(path))
