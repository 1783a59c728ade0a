"""What a run's checkpoints take, calculated beforehand; and a disk that is full all the same."""

from __future__ import annotations

import logging
import resource
import shutil
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, TrainingArguments

from hf_galore.cli.main import main
from hf_galore.errors import UserError
from hf_galore.recipes.disk_space import GIB, Sizes, check_space, sizes_of
from hf_galore.recipes.embedded_model import Embedded
from hf_galore.recipes.full_disk import full_disk
from hf_galore.recipes.model_checks import model_on_meta
from tests.support.commands import options, said_of_mistake, short_run, write_checkpoint

Usage = namedtuple("Usage", "total used free")


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    return TrainingArguments(output_dir=str(folder), use_cpu=True, report_to="none", **changes)


def with_free(gib: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, int(gib * GIB)))


OPTIMS: dict[str, dict[str, Any]] = {
    "galore_adamw_8bit": {"optim_target_modules": ["attn", "mlp"], "optim_args": "rank=8"},
    "adamw_torch": {"optim_target_modules": None, "optim_args": None},
}


@pytest.mark.parametrize("optim", OPTIMS)
def test_the_calculated_sizes_are_those_of_what_is_written(optim: str, small: Embedded, tmp_path: Path) -> None:
    changes = {**OPTIMS[optim], "optim": optim, "max_steps": 1, "save_steps": 1}
    settings = {**short_run(small.model, small.data, tmp_path / "out"), **changes}
    assert main(["sft", *options({key: value for key, value in settings.items() if value is not None})]) == 0
    model = model_on_meta(AutoConfig.from_pretrained(small.model), dtype=torch.float32)
    assert model is not None
    sizes = sizes_of(arguments(tmp_path, optim=optim, **OPTIMS[optim]), model)
    written = {
        name: (tmp_path / "out" / "checkpoint-1" / name).stat().st_size
        for name in ("model.safetensors", "optimizer.pt")
    }
    assert sizes.weights == pytest.approx(written["model.safetensors"], rel=0.01)
    assert sizes.optimizer == pytest.approx(written["optimizer.pt"], rel=0.03)  # torch's file has its own tables
    assert sizes_of(arguments(tmp_path, optim=optim, save_only_model=True), model) == Sizes(sizes.weights, 0)


def test_no_room_for_one_checkpoint_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_free(29, monkeypatch)
    sizes = Sizes(12 * GIB, 6 * GIB)
    with pytest.raises(UserError) as error:
        check_space(arguments(tmp_path / "new" / "out"), sizes)
    assert (
        "29.0 GiB are free, and by calculation it needs 30.0 GiB, 12.0 GiB for the model and 18.0 GiB for a "
        "checkpoint, 6.0 GiB of it the optimizer's. Free some, or give an output_dir on another disk; save_only_model: "
        "true leaves"
    ) in str(error.value)
    check_space(arguments(tmp_path, save_strategy="no"), sizes)
    check_space(arguments(tmp_path), Sizes(12 * GIB, 0), overwrites=True)
    with_free(11, monkeypatch)
    with pytest.raises(UserError, match=r"by calculation it needs 12\.0 GiB, 12\.0 GiB for the model\. Free some"):
        check_space(arguments(tmp_path, save_strategy="no"), sizes)


# room for one checkpoint beside the model, and what is said of which settings
ROOM: dict[str, tuple[dict[str, Any], str | None]] = {
    "all of an unknown number": ({}, "It keeps all at a time"),
    "one": ({"max_steps": 10, "save_steps": 10}, None),
    "two": ({"max_steps": 20, "save_steps": 10}, "It keeps up to 2 at a time"),
    "two, of many": ({"max_steps": 1000, "save_steps": 10, "save_total_limit": 1}, "It keeps up to 2 at a time"),
    "halves": ({"save_steps": 0.5}, "It keeps up to 2 at a time"),
    "an epoch": ({"save_strategy": "epoch", "num_train_epochs": 1}, None),
    "epochs": ({"save_strategy": "epoch", "num_train_epochs": 2.5}, "It keeps up to 3 at a time"),
    "none": ({"save_strategy": "no"}, None),
}


@pytest.mark.parametrize(("changes", "words"), ROOM.values(), ids=list(ROOM))
def test_room_for_some_is_a_warning(
    changes: dict[str, Any],
    words: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with_free(4.5, monkeypatch)
    with caplog.at_level(logging.WARNING, logger="hf_galore"):
        check_space(arguments(tmp_path, **changes), Sizes(GIB, GIB))
    assert len(caplog.records) == (words is not None)
    if words is not None:
        assert "has room for 1 checkpoint(s): 4.5 GiB are free" in caplog.text
        assert words in caplog.text


def test_a_run_that_is_overwritten_makes_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(tmp_path / "checkpoint-1")
    (tmp_path / "checkpoint-1" / "more").write_bytes(bytes(1000))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, 100))
    sizes = Sizes(100, 200)
    with pytest.raises(UserError):
        check_space(arguments(tmp_path), sizes)
    check_space(arguments(tmp_path, save_steps=1, max_steps=1), sizes, overwrites=True)


def test_a_disk_that_says_nothing_of_itself_is_no_mistake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Disks of other machines may be mounted so."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, 0))
    check_space(arguments(tmp_path), Sizes(100, 200))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(1, 1, 0))
    with pytest.raises(UserError):
        check_space(arguments(tmp_path), Sizes(100, 200))


# ---- full


@pytest.fixture
def _small_files() -> Iterator[None]:
    """No file of more than 9 MiB can be written, as on a disk that is full then: a model can, and AdamW's state not."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9 * 2**20, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.usefixtures("_small_files")
@pytest.mark.parametrize("limit", [9, 5], ids=["the optimizer", "the model"])
def test_a_disk_that_is_full_is_one_line(
    limit: int, small: Embedded, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit * 2**20, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    out = tmp_path / "out"
    plain = {"optim": "adamw_torch", "optim_target_modules": None, "optim_args": None, "max_steps": 1, "save_steps": 1}
    settings = {key: value for key, value in {**short_run(small.model, small.data, out), **plain}.items() if value}
    line = said_of_mistake("sft", options(settings), capsys)
    reason = "torch could not write a file to its end" if limit == 9 else "File too large (os error 27)"
    assert line.startswith(f"hf-galore sft: output_dir {out}: what the run saves could not be written (")
    assert reason in line
    assert f"{out / 'checkpoint-1'} is not whole: delete it. Free some, or set save_total_limit lower; then run" in line


def test_a_full_disk_says_where_to_go_on(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "checkpoint-2")
    error = OSError(28, "No space left on device", str(tmp_path / "x"))
    assert f"then go on from {tmp_path / 'checkpoint-2'} by --resume_from_checkpoint." in str(
        full_disk(error, tmp_path)
    )
    assert "is not whole" not in str(full_disk(error, tmp_path))
    wrapped = RuntimeError("something else")
    wrapped.__context__ = error
    assert full_disk(wrapped, tmp_path) is not None
    for other in (OSError(2, "No such file or directory"), RuntimeError("no"), ValueError("28")):
        assert full_disk(other, tmp_path) is None
