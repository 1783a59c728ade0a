"""`hf-galore compare`: what it reads of runs, what a person reads, and what it says about mistakes."""

from __future__ import annotations

import io
import math
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from hf_galore.cli import compare, compare_screen
from hf_galore.cli.main import main
from hf_galore.compare import reading
from hf_galore.compare.notes import notes
from hf_galore.compare.tables import settings_table
from hf_galore.compare.words import digits, duration
from hf_galore.recipes.run_record import RUN_FILE
from tests.support.written_runs import a_log, compared, numbers, write_facts, write_run, write_state


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take seconds, and have tests of their own."""
    monkeypatch.setattr(compare, "pictures", lambda runs, axis: [])


# ---- reading


def test_numbers_of_a_run_of_ours(tmp_path: Path) -> None:
    losses = [10.0 - step for step in range(10)] + [3.0] * 8 + [2.0, 1.0]  # 20 steps; the last tenth: 18, 19, 20
    folder = write_run(tmp_path / "ours", losses, held_out=[5.0, 4.0, 4.5], runtime=11.0)
    found = compared([folder], tmp_path / "out")["ours"]
    assert found["finished"] is True
    assert (found["step"], found["max_steps"]) == (20, 20)
    assert found["method"] == "GaLore r=64, 8-bit, layerwise"
    assert found["model"] == "org/model"
    assert found["learning_rate"] == 2e-3  # as set, not the highest logged
    assert found["results"] == {
        "training_loss": 2.0,
        "eval_loss_first": 5.0,
        "eval_loss_last": 4.5,
        "eval_loss_lowest": 4.0,
        "tokens": 1280.0,
        "step_seconds": 0.5,
        "tokens_per_second": 128.0,
        "peak_memory_gib": 0.2,
        "optimizer_bytes": 3 * 2**20,
        "seconds_in_steps": 10.0,
        "training_seconds": 11.0,
    }
    assert found["facts"]["optim_args"] == "rank=64, scale=1"


def test_a_run_of_another_program(tmp_path: Path) -> None:
    folder = tmp_path / "theirs"
    log = a_log([4.0, 2.0], seconds=None, runtime=8.0, num_tokens=400.0)
    log[0] |= {"galore/moment_mib": 2.0, "galore/basis_mib": 0.5}
    write_state(folder, log, 2)
    (folder / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    found = numbers(folder)["theirs"]
    assert found["finished"] is True
    assert found["facts"] is None
    assert found["method"] == "GaLore"
    assert found["model"] == "LlamaForCausalLM"
    assert found["learning_rate"] == 1e-3  # the highest logged
    results = found["results"]
    assert results["training_loss"] == 2.0
    assert results["step_seconds"] == 4.0
    assert results["tokens_per_second"] == 50.0
    assert results["training_seconds"] == 8.0
    assert results["optimizer_bytes"] == 2.5 * 2**20
    assert results["peak_memory_gib"] is None


def test_adapters_of_another_program_in_a_checkpoint(tmp_path: Path) -> None:
    checkpoint = tmp_path / "theirs" / "checkpoint-3"
    write_state(checkpoint, a_log([3.0, 2.0, 1.0], seconds=None, runtime=None), 3, max_steps=9)
    (checkpoint / "adapter_config.json").write_text('{"r": 8, "base_model_name_or_path": "org/base"}')
    found = numbers(tmp_path / "theirs")["theirs"]
    assert (found["method"], found["model"]) == ("LoRA r=8", "org/base")
    assert found["finished"] is False
    assert found["results"]["step_seconds"] is None


def test_trl_sft_saves_its_last_checkpoint_and_no_state(tmp_path: Path) -> None:
    write_state(tmp_path / "theirs" / "checkpoint-3", a_log([3.0, 2.0, 1.0], runtime=None), 3)
    assert numbers(tmp_path / "theirs")["theirs"]["finished"] is True


def test_an_interrupted_run_is_read_from_its_last_complete_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "stopped"
    write_facts(folder, finished=False, optimizer_bytes=None)
    write_state(folder, a_log([9.0] * 8), 8)  # of an earlier run in the same folder
    write_state(folder / "checkpoint-2", a_log([7.0, 6.0], runtime=None), 2, max_steps=8)
    write_state(folder / "checkpoint-4", a_log([7.0, 6.0, 5.0, 4.0], runtime=None), 4, max_steps=8)
    (folder / "checkpoint-4" / "config.json").write_text("{}")
    (folder / "checkpoint-6").mkdir()  # killed while it was saved
    write_state(folder / "checkpoint-8", a_log([7.0] * 8, runtime=None), 8)
    state = (folder / "checkpoint-8" / "trainer_state.json").read_text()
    (folder / "checkpoint-8" / "trainer_state.json").write_text(state[: len(state) // 2])  # and once more
    (folder / "config.json").write_text("")
    found = numbers(folder)["stopped"]
    assert caplog.messages[0].startswith(f"{folder / 'checkpoint-8'} is left out: trainer_state.json is cut off")
    assert found["finished"] is False
    assert found["step"] == 4
    assert found["results"]["training_loss"] == 4.0
    assert found["results"]["seconds_in_steps"] == 2.0
    assert main(["compare", str(folder), "--output", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert "4 of 8, interrupted" in shown
    assert "its figures are those of its last checkpoint, step 4 of 8" in shown


def test_a_resumed_runs_training_time_is_left_out(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "resumed", [3.0] * 10, seconds=1.0, runtime=4.0)
    results = numbers(folder)["resumed"]["results"]
    assert results["training_seconds"] is None
    assert results["seconds_in_steps"] == 10.0


@pytest.mark.parametrize(
    ("optim", "optim_args", "lora_rank", "expected"),
    [
        ("galore_adamw", None, None, "GaLore r=128"),
        ("galore_adamw_8bit", "rank=32, scale=2", None, "GaLore r=32, 8-bit"),
        ("galore_adafactor_layerwise", "rank=8", None, "GaLore Adafactor r=8, layerwise"),
        ("adamw_torch_fused", None, None, "AdamW"),
        ("adamw_bnb_8bit", None, None, "AdamW, 8-bit"),
        ("paged_adamw_8bit", None, None, "AdamW, 8-bit, paged"),
        ("adamw_torch", None, 16, "LoRA r=16"),
        ("adamw_bnb_8bit", None, 16, "LoRA r=16, AdamW, 8-bit"),
        ("lion_32bit", None, None, "lion_32bit"),
    ],
)
def test_methods(optim: str, optim_args: str | None, lora_rank: int | None, expected: str, tmp_path: Path) -> None:
    facts = {"optim": optim, "optim_args": optim_args, "lora_rank": lora_rank}
    assert reading.read_run(write_run(tmp_path / "run", facts=facts), "run").method == expected


def test_folders_of_the_same_name_are_told_apart(tmp_path: Path) -> None:
    folders = [tmp_path / path for path in ("a/x/out", "b/x/out", "b/y/out", "lone")]
    assert reading.folder_names(folders) == ["a/x/out", "b/x/out", "y/out", "lone"]


def test_names_are_taken_in_their_order(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / name) for name in ("b", "a")]
    assert list(compared(folders, tmp_path / "out", "--names", "GaLore, and more,AdamW".replace(", ", " "))) == [
        "GaLore and more",
        "AdamW",
    ]


# ---- what a person reads


@pytest.mark.parametrize("width", [60, 80, 200])
def test_tables_fit_the_terminal(
    width: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    folders = [write_run(tmp_path / f"run{n}", [4.0, 3.0 + n]) for n in range(6)]
    assert main(["compare", *map(str, folders), "--output", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    # Sentences go to a program or a file as they are; see the next test.
    tables = [line for line in shown.splitlines() if not line.startswith(("The same", "Peak", "Logged", "The page"))]
    assert max(map(len, tables)) <= width
    losses = [re.findall(r"\d\.\d{4}", line)[:1] for line in tables if line.startswith("run")]
    assert losses[:6] == [[f"{3 + n:.4f}"] for n in range(6)]


def test_sentences_end_between_words_in_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.StringIO()
    console = Console(file=written, width=40, force_terminal=True, highlight=False)
    monkeypatch.setattr(compare_screen, "Console", lambda **settings: console)
    compare_screen.show(reading.read_runs([write_run(tmp_path / "run")]))
    told = [line.strip() for line in written.getvalue().partition("Peak memory is")[2].splitlines()]
    assert told[:3] == ["of the whole process,", "Python and libraries included: it ran on", "a CPU."]


def test_few_runs_stand_side_by_side(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    folders = [write_run(tmp_path / f"run{n}", [4.0, 3.0 + n], {"learning_rate": 0.5 + n}) for n in range(3)]
    assert main(["compare", *map(str, folders), "--output", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"Settings that differ.*learning rate *│ *0.5 *│ *1.5 *│ *2.5 ", shown, re.DOTALL)
    assert "The same in all: method GaLore r=64, 8-bit, layerwise; model org/model" in shown
    boxes = [line for line in shown.splitlines() if line[:1] in "┏┡│└┃"]
    assert max(map(len, boxes)) <= 80
    losses = [re.findall(r"\d\.\d{4}", line) for line in boxes if "training loss" in line]
    assert losses == [["3.0000", "4.0000", "5.0000"]]  # in one part


def test_settings_of_adapters_are_those_of_runs_that_have_them(tmp_path: Path) -> None:
    def told(peft: bool, rank: int) -> dict[str, Any]:
        return {"settings": {"use_peft": peft, "lora_r": rank, "lora_alpha": rank}, "lora_rank": rank if peft else None}

    folders = [
        write_run(tmp_path / name, facts=told(peft, rank)) for name, peft, rank in (("a", False, 1), ("b", True, 8))
    ]
    assert "lora_alpha" not in [row.label for row in settings_table(reading.read_runs(folders)).rows]
    folders.append(write_run(tmp_path / "c", facts=told(True, 16)))
    rows = {row.label: row.cells for row in settings_table(reading.read_runs(folders)).rows}
    assert rows["lora_alpha"] == ["–", "8", "16"]
    assert "lora_r" not in rows  # the method says it
    assert [method.partition(",")[0] for method in rows["method"]] == ["GaLore r=64", "LoRA r=8", "LoRA r=16"]


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0.0, "0"), (0.12345, "0.123"), (12.345, "12.3"), (1234567.8, "1,234,568"), (1e-9, "1.00e-09"), (math.nan, "NaN")],
)
def test_digits(value: float, expected: str) -> None:
    assert digits(value) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [(41.52, "41.5 s"), (723.0, "12 min 03 s"), (3599.7, "1 h 00 min"), (12_000.0, "3 h 20 min")],
)
def test_durations(value: float, expected: str) -> None:
    assert duration(value) == expected


# ---- mistakes: one line, exit status 2, nothing written


def _no_log(folder: Path) -> None:
    write_state(folder, [], 3)


def _no_history(folder: Path) -> None:
    folder.mkdir()
    (folder / "trainer_state.json").write_text("{}")


def _broken(folder: Path) -> None:
    folder.mkdir()
    (folder / "trainer_state.json").write_text('{"log_history": [')


def _not_text(folder: Path) -> None:
    folder.mkdir()
    (folder / "trainer_state.json").write_bytes(b"\xff\xfe\xfa")


def _broken_facts(folder: Path) -> None:
    write_run(folder)
    (folder / RUN_FILE).write_text('{"model": "m"}')


def _stopped_early(folder: Path) -> None:
    write_facts(folder, finished=False)


MISTAKES: dict[str, tuple[Any, list[str], list[str]]] = {
    "no folder": (lambda folder: None, [], ["bad: there is no such folder"]),
    "a file": (lambda folder: folder.write_text("x"), [], ["bad is a file"]),
    "an empty folder": (lambda folder: folder.mkdir(), [], ["bad holds no trainer_state.json"]),
    "an empty log": (_no_log, [], ["has an empty log", "logging_steps"]),
    "no log": (_no_history, [], ["holds no log_history"]),
    "broken JSON": (_broken, [], ["trainer_state.json cannot be read"]),
    "no text": (_not_text, [], ["trainer_state.json cannot be read"]),
    "broken facts": (_broken_facts, [], [f"{RUN_FILE} cannot be read"]),
    "stopped before a checkpoint": (_stopped_early, [], ["stopped before its first checkpoint"]),
    "too few names": (write_run, ["--names", "a"], ["--names gives 1 (a), but there are 2 runs"]),
    "an empty name": (write_run, ["--names", "a,"], ["empty name"]),
    "the same name": (write_run, ["--names", "a,a"], ["calls two runs the same"]),
    "no name": (write_run, ["--names"], ["--names needs a name for each run"]),
    "unknown option": (write_run, ["--outptu", "x"], ["there is no option --outptu. Did you mean '--output'?"]),
    "output twice": (write_run, ["--output=x"], ["--output is given twice"]),
    "a recipe": (write_run, ["--config", "x.yaml"], ["--config is for a sweep"]),
    "an unknown axis": (write_run, ["--x", "step"], ["curves are drawn over steps, tokens, hours", "'steps'"]),
    "a switch with a value": (write_run, ["--json=yes"], ["--json takes no value"]),
}


@pytest.mark.parametrize(("make", "options", "words"), MISTAKES.values(), ids=list(MISTAKES))
def test_a_mistake_is_one_line_and_leaves_nothing(
    make: Any, options: list[str], words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = write_run(tmp_path / "good")
    make(tmp_path / "bad")
    before = sorted(tmp_path.rglob("*"))
    arguments = [str(good), str(tmp_path / "bad"), "--output", str(tmp_path / "deep" / "out"), *options]
    assert main(["compare", *arguments]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    (line,) = shown.err.splitlines()
    assert line.startswith("hf-galore compare: ")
    assert [word for word in words if word not in line] == []
    assert sorted(tmp_path.rglob("*")) == before


def test_no_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare"]) == 2
    assert "give the folders of runs to compare" in capsys.readouterr().err


def test_the_same_run_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_run(tmp_path / "run")
    assert main(["compare", str(folder), str(folder / ".." / "run")]) == 2
    assert "is given twice" in capsys.readouterr().err


def test_an_output_that_is_below_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "taken").write_text("mine")
    assert main(["compare", str(write_run(tmp_path / "run")), "--output", str(tmp_path / "taken" / "out")]) == 2
    assert "taken is a file" in capsys.readouterr().err
    assert (tmp_path / "taken").read_text() == "mine"


def test_an_output_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise PermissionError(13, "Permission denied")

    folder = write_run(tmp_path / "run")
    monkeypatch.setattr("tempfile.TemporaryFile", refuse)  # tests may run as root, whom nothing stops
    assert main(["compare", str(folder), "--output", str(tmp_path / "out")]) == 2
    assert "cannot be written to" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_else_is_in_the_output_stays(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    (tmp_path / "out" / "index.html").write_text("old")
    compared([write_run(tmp_path / "run")], tmp_path / "out")
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"
    assert (tmp_path / "out" / "index.html").read_text().startswith("<!DOCTYPE html>")
    assert not [path for path in (tmp_path / "out").iterdir() if path.is_dir()]


def test_every_setting_that_differs_is_shown_and_other_work_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    same = {"max_length": 256, "weight_decay": 0.0, "learning_rate": 2e-3}
    first = write_run(
        tmp_path / "a",
        facts={"settings": {**same, "seed": 1, "packing": True, "num_train_epochs": 3, "optim_args": "rank=8"}},
    )
    second = write_run(
        tmp_path / "b",
        facts={"settings": {**same, "seed": 2, "packing": False, "num_train_epochs": 12.0, "max_length": 128}},
    )
    unknown = write_run(tmp_path / "c")
    found = reading.read_runs([first, second, unknown])
    rows = {row.label: row.cells for row in settings_table(found).rows}
    assert rows["max_length"] == ["256", "128", "–"]
    assert rows["packing"] == ["true", "false", "–"]
    assert rows["seed"] == ["1", "2", "–"]
    assert rows["num_train_epochs"] == ["3", "12", "–"]  # from a file, and from the command line, which has it as 12.0
    assert "weight_decay" not in rows
    labels = [row.label for row in settings_table(found, everything=True).rows]
    assert len(set(labels)) == len(labels)
    said = "The runs did not do the same work: max_length, num_train_epochs, packing, seed differ. A lower loss or a "
    assert f"{said}shorter time may come of that." in notes(found)
    assert main(["compare", str(first), str(second), "--output", str(tmp_path / "out")]) == 0
    assert "max_length" in capsys.readouterr().out
    assert not any("same work" in note for note in notes(reading.read_runs([first, unknown])))


def test_a_run_of_a_version_that_had_other_options(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "run"), write_run(tmp_path / "old", facts={"optim_args": "rang=8"})]
    assert compared(runs, tmp_path / "out")["old"]["method"] == "GaLore, 8-bit, layerwise"
