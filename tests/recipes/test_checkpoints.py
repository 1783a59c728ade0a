"""Checkpoints that a kill left in part: which is gone on from, what is said of the others, and that nothing is lost."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoTokenizer

from hf_galore.errors import UserError
from hf_galore.recipes.checkpoints import check_folders, flaw, last_checkpoint
from hf_galore.recipes.embedded_model import Embedded
from hf_galore.recipes.run_record import RecordedTrainer
from hf_galore.recipes.stream_position import POSITION_FILE
from hf_galore.recipes.whole_files import write_whole
from tests.support import warm
from tests.support.commands import recorded_trainer, write_checkpoint
from tests.support.helpers import Counting, arguments, tiny_llama

OPTIM = "galore_adamw_8bit_layerwise"
# In the order in which they are written; the first ones, and the tokenizer's, are not for the resumed run.
FOR_OTHERS = ["config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json"]
NEEDED = [
    "model.safetensors",
    "training_args.bin",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "trainer_state.json",
]
TEXT = ["chat_template.jinja"]  # any part of which is a text


EACH_STEP = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}


@pytest.fixture(scope="module")
def written(small: Embedded, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("written")
    trainer = recorded_trainer(folder, OPTIM, **EACH_STEP)
    trainer.processing_class = AutoTokenizer.from_pretrained(small.model)  # which is saved with each checkpoint
    trainer.train()
    write_whole(folder / "checkpoint-2" / POSITION_FILE, json.dumps({"steps": 2, "place": {"shard": 0}}))
    return folder


@pytest.fixture
def out(written: Path, tmp_path: Path) -> Path:
    """The folder of a run, its own for each test."""
    return shutil.copytree(written, tmp_path / "out")


def assert_left_out(out: Path, name: str, problem: str, caplog: pytest.LogCaptureFixture) -> None:
    """The older checkpoint is gone on from, one line says why, and the later one by name is refused for the same."""
    assert last_checkpoint(out) == out / "checkpoint-1"
    (line,) = caplog.messages
    assert line.startswith(f"{out / 'checkpoint-2'} is left out")
    assert problem in line
    assert name in line
    args = arguments(out, OPTIM)
    args.resume_from_checkpoint = str(out / "checkpoint-2")
    with pytest.raises(UserError, match="is no checkpoint that training can go on from") as error:
        check_folders(args)
    assert name in str(error.value)
    assert str(error.value).count("\n") == 0


def cut(file: Path, size: int) -> None:
    with file.open("r+b") as stream:
        stream.truncate(size)


def test_these_are_all_files_that_a_trainer_writes(written: Path) -> None:
    assert {path.name for path in (written / "checkpoint-2").iterdir()} == {*FOR_OTHERS, *TEXT, *NEEDED, POSITION_FILE}
    assert last_checkpoint(written) == written / "checkpoint-2"
    assert flaw(written / "checkpoint-1") is None


def test_the_last_checkpoint_is_the_last_whole_one(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path) is None
    write_checkpoint(tmp_path / "checkpoint-9")
    latest = write_checkpoint(tmp_path / "checkpoint-10")  # after 9 by number, before it by name
    (tmp_path / "checkpoint-11").mkdir()  # its run was killed while it was written
    (tmp_path / "checkpoint-best").mkdir()
    assert last_checkpoint(tmp_path) == latest


# ---- one file


@pytest.mark.parametrize("part", [0.0, 0.5])
@pytest.mark.parametrize("name", [*FOR_OTHERS, *NEEDED, POSITION_FILE])
def test_a_checkpoint_with_a_file_that_is_cut_off_is_left_out(
    name: str, part: float, out: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = out / "checkpoint-2" / name
    cut(file, int(part * file.stat().st_size))
    assert_left_out(out, name, "is cut off", caplog)


@pytest.mark.parametrize("name", NEEDED)
def test_a_checkpoint_without_a_file_that_is_needed_is_left_out(
    name: str, out: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (out / "checkpoint-2" / name).unlink()
    assert_left_out(out, name, "it holds no", caplog)


@pytest.mark.parametrize("name", [*FOR_OTHERS, *TEXT, POSITION_FILE])
def test_a_checkpoint_without_a_file_that_training_does_not_read_is_whole(name: str, out: Path) -> None:
    (out / "checkpoint-2" / name).unlink()
    assert last_checkpoint(out) == out / "checkpoint-2"


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "rng_state.pth", "training_args.bin"])
def test_one_byte_too_few_is_seen(name: str, out: Path) -> None:
    file = out / "checkpoint-2" / name
    cut(file, file.stat().st_size - 1)
    assert str(flaw(out / "checkpoint-2")).startswith(f"{name} is cut off")


# ---- killed between files, and in the middle of each


def test_a_kill_between_any_two_files_and_in_each(written: Path, tmp_path: Path) -> None:
    """In the order in which the Trainer writes them, up to trainer_state.json; and in that of their deletion."""
    whole = written / "checkpoint-2"
    files = sorted((file for file in whole.iterdir() if file.name != POSITION_FILE), key=lambda f: f.stat().st_mtime_ns)
    assert files[-1].name == "trainer_state.json"
    out = tmp_path / "out"
    shutil.copytree(written / "checkpoint-1", out / "checkpoint-1")
    part = out / "checkpoint-2"
    part.mkdir()
    for file in files:
        assert last_checkpoint(out) == out / "checkpoint-1"
        for size in (0, file.stat().st_size // 2):
            shutil.copy(file, part)
            cut(part / file.name, size)
            assert last_checkpoint(out) == out / "checkpoint-1"
        shutil.copy(file, part)
    assert last_checkpoint(out) == part

    for name in reversed(NEEDED):  # in whatever order a file system gives: once one of these is gone
        (part / name).unlink()
        assert last_checkpoint(out) == out / "checkpoint-1"


def test_a_kill_while_an_older_checkpoint_of_the_same_step_is_written_over(out: Path) -> None:
    """Parts of both, all of them whole, would be the weights of one run with the optimizer of another."""
    args = arguments(out, OPTIM, save_strategy="steps", save_steps=2, max_steps=2)

    class Killed(RecordedTrainer):
        def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Killed(model=tiny_llama(), args=args, train_dataset=Counting()).train()
    assert flaw(out / "checkpoint-2") == "it holds no trainer_state.json"
    assert last_checkpoint(out) == out / "checkpoint-1"


def test_what_we_write_ourselves_is_there_whole_or_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "facts.json"
    write_whole(file, "before")
    original = Path.write_text

    def killed(self: Path, text: str, **options: Any) -> None:
        original(self, text[: len(text) // 2], **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", killed)
        with pytest.raises(KeyboardInterrupt):
            write_whole(file, "afterwards")
    assert file.read_text() == "before"
    write_whole(file, "afterwards")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["afterwards"]


def test_nothing_whole_is_an_error_and_not_a_new_beginning(out: Path, caplog: pytest.LogCaptureFixture) -> None:
    for step in (1, 2):
        cut(out / f"checkpoint-{step}" / "trainer_state.json", 0)
    args = arguments(out, OPTIM)
    args.resume_from_checkpoint = "true"
    with pytest.raises(
        UserError, match=r"no complete checkpoint in .* anew: without it, and with --overwrite_output_dir"
    ):
        check_folders(args)
    assert [message.split(" is left out")[0] for message in caplog.messages] == [
        str(out / f"checkpoint-{step}") for step in (2, 1)
    ]


# ---- other kinds of checkpoints


def in_shards(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    tiny_llama().save_pretrained(folder, max_shard_size="200KB")


def as_adapters(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "config.json").unlink()
    get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(str(folder))


def as_pickle(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def in_the_old_format(folder: Path) -> None:
    for file in ("optimizer.pt", "scheduler.pt"):
        content = torch.load(folder / file, weights_only=True)
        torch.save(content, folder / file, _use_new_zipfile_serialization=False)


def of_two_processes(folder: Path) -> None:
    shutil.copy(folder / "rng_state.pth", folder / "rng_state_1.pth")
    (folder / "rng_state.pth").rename(folder / "rng_state_0.pth")


def with_files_of_somebody_else(folder: Path) -> None:
    (folder / "table.bin").write_bytes(b"\x00\x01")
    (folder / "notes.txt").write_text("")


KINDS: dict[str, tuple[Callable[[Path], None], list[str]]] = {
    "shards": (
        in_shards,
        ["model-00001-of-00004.safetensors", "model-00004-of-00004.safetensors", "model.safetensors.index.json"],
    ),
    "adapters": (as_adapters, ["adapter_model.safetensors"]),
    "pickle": (as_pickle, ["pytorch_model.bin"]),
    "old format": (in_the_old_format, ["optimizer.pt", "scheduler.pt"]),
    "two processes": (of_two_processes, ["rng_state_0.pth", "rng_state_1.pth"]),
    "somebody else's files": (with_files_of_somebody_else, []),
}


@pytest.mark.parametrize(("change", "names"), KINDS.values(), ids=list(KINDS))
def test_other_kinds(change: Callable[[Path], None], names: list[str], out: Path) -> None:
    """Each is whole; without one of its own files, or with half of it, it is not."""
    folder = out / "checkpoint-2"
    change(folder)
    assert flaw(folder) is None
    for name in names:
        content = (folder / name).read_bytes()
        (folder / name).unlink()
        assert str(flaw(folder)).startswith("it holds no ")
        if name != "pytorch_model.bin":  # without which nothing says what the model was saved as
            assert flaw(folder) == f"it holds no {name}"
        for half in (b"", content[: len(content) // 2]):
            (folder / name).write_bytes(half)
            assert str(flaw(folder)).startswith(f"{name} is cut off")
        (folder / name).write_bytes(content)
    assert flaw(folder) is None


def test_a_checkpoint_of_the_model_alone_is_nothing_to_go_on_from(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The Trainer would begin with new moments, and say nothing."""
    out = tmp_path / "out"
    recorded_trainer(out, OPTIM, save_only_model=True, **EACH_STEP).train()
    caplog.clear()
    assert last_checkpoint(out) is None
    assert len(caplog.messages) == 2
    assert "it holds no optimizer.pt, scheduler.pt and rng_state.pth, only the model" in caplog.messages[0]
    assert "save_only_model" in caplog.messages[0]


def test_what_deepspeed_and_fsdp_keep_in_folders_is_not_missed(out: Path) -> None:
    folder = out / "checkpoint-2"
    for name in ("optimizer.pt", "model.safetensors"):
        (folder / name).unlink()
    for name in ("optimizer_0", "pytorch_model_fsdp_0"):
        (folder / name).mkdir()
    assert flaw(folder) is None


def test_tensors_are_not_read(out: Path) -> None:
    """A terabyte, nearly all of it a hole in the file."""
    file = out / "checkpoint-2" / "model.safetensors"
    length = 2**40
    header = json.dumps({"weight": {"dtype": "U8", "shape": [length], "data_offsets": [0, length]}}).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header)
    cut(file, 8 + len(header) + length)
    assert flaw(out / "checkpoint-2") is None
    cut(file, 8 + len(header) + length - 1)
    assert str(flaw(out / "checkpoint-2")).startswith("model.safetensors is cut off")


# ---- killed in earnest


@pytest.mark.slow
def test_thirty_kills_at_random_moments_and_thirty_resumes(tmp_path: Path) -> None:
    """And the weights and moments at the end are those of a run that was left alone, bit for bit."""
    seed, kills = 1, 30
    script = warm.ran(warm.module, "tests.support.killed_runs", str(tmp_path), str(seed), str(kills))
    assert script.returncode == 0, f"seed {seed}: {script.stderr}"
    assert json.loads(script.stdout.splitlines()[-1])["kills"] == kills
