"""`hf-galore plan`: what it prints, draws and returns, and what it says about mistakes."""

from __future__ import annotations

import io
import json
import sys
import types
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from hf_galore.cli import plan as command
from hf_galore.cli import plan_picture
from hf_galore.cli.main import main
from hf_galore.plan import plan
from hf_galore.plan.needs import OUTSIDE, OUTSIDE_BYTES
from hf_galore.plan.planner import GIB, MemoryPlan
from hf_galore.recipes.any_recipe import Arguments
from tests.support.commands import printed_json, write_recipe
from tests.support.planning import llama_folder

# Warnings that Python does not show a person.
UNSEEN = (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning)

DESKTOP = "A desktop, which takes 0.3 to 1 GiB, is not counted."
KINDS = {"parameters", "gradients", "low-rank gradients", "moments", "bases", "batches", "activations", "temporaries"}


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan is to be the same on every machine, but for the card that is there."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's folder with a config and nothing else."""
    folder = tmp_path_factory.mktemp("model")
    return llama_folder(folder, layers=2)


@pytest.fixture
def settings(model: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "model_name_or_path": str(model),
        "dtype": "bfloat16",
        "dataset_name": "not/needed",
        "max_length": 32,
        "optim": "galore_adamw",
        "optim_target_modules": ["attn", "mlp"],
        "optim_args": "rank=8, update_proj_gap=4",
        "per_device_train_batch_size": 2,
        "bf16": True,
        "activation_checkpointing": True,
        "report_to": "none",
        "output_dir": str(tmp_path / "out"),
    }


def written(settings: dict[str, Any], folder: Path) -> str:
    return write_recipe(folder, settings, "small.yaml")


def planned(path: str, *options: str) -> dict[str, Any]:
    """What `--json` prints."""
    found: dict[str, Any] = printed_json(["plan", "--config", path, "--json", *options])
    return found


def refuses_to_plan(*args: Any, **kwargs: Any) -> MemoryPlan:
    raise AssertionError("it planned, which takes half a minute, before it looked at what was given")


def a_plan(*, peak: int = 10 * GIB, vram: int | None = None, **more: Any) -> MemoryPlan:
    half = peak // 2
    more = {"expandable_bytes": peak + GIB // 10, "segmented_bytes": peak + GIB // 2, **more}
    return MemoryPlan(
        peak_bytes=peak,
        resident_bytes=half,
        breakdown={"parameters": half, "something new": peak - half},
        phase="update",
        phase_peaks={"update": peak, "forward": half},
        device="cuda",
        seconds=1.0,
        parameters=1000,
        vram_bytes=vram,
        **more,
    )


# ---- what it finds


def test_json_says_what_the_plan_found(
    settings: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = written(settings, tmp_path)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        assert main(["plan", "--config", path, "--json"]) == 0
    shown = capfd.readouterr()
    found = json.loads(shown.out)  # one object, or this fails
    assert shown.err == ""
    assert [str(warning.message) for warning in warned if not issubclass(warning.category, UNSEEN)] == []
    assert sum(found["breakdown"].values()) == found["peak_bytes"] == max(found["phase_peaks"].values())
    assert found["phase_peaks"][found["phase"]] == found["peak_bytes"]
    assert {"parameters", "moments", "bases"} <= set(found["breakdown"]) <= KINDS
    assert list(found["breakdown"].values()) == sorted(found["breakdown"].values(), reverse=True)
    # Embedding, head and 5 norms; two layers of 4 square matrices and 3 of the MLP's. Each takes whole granules.
    numbers = 2 * 512 * 64 + 5 * 64 + 2 * (4 * 64 * 64 + 3 * 64 * 128)
    assert found["parameters"] == numbers
    assert found["breakdown"]["parameters"] >= 2 * numbers
    assert 2 * numbers < found["resident_bytes"] < found["peak_bytes"]
    assert found["tokens_per_step"] == 2 * 32
    assert found["device"] == "cuda (stood in for by cpu tensors)"
    assert found["seconds"] > 0
    assert found["reserved_bytes"] == found["expandable_bytes"] > found["peak_bytes"]
    assert found["needed_bytes"] == found["reserved_bytes"] + OUTSIDE_BYTES
    assert found["outside_bytes"] == OUTSIDE
    assert found["vram_bytes"] is None
    assert (found["fits"], found["free_bytes"], found["fits_now"]) == (None, None, None)
    assert "tokenizer" in found["notes"][0]
    # The same as from Python, which goes the same way.
    again = plan(path)
    assert (again.peak_bytes, again.resident_bytes) == (found["peak_bytes"], found["resident_bytes"])


def test_overrides_change_the_plan(settings: dict[str, Any], tmp_path: Path) -> None:
    path = written(settings, tmp_path)
    base = planned(path)
    batch = planned(path, "--per_device_train_batch_size", "16")
    assert batch["peak_bytes"] > base["peak_bytes"]
    assert batch["breakdown"]["parameters"] == base["breakdown"]["parameters"]
    assert batch["tokens_per_step"] == 8 * base["tokens_per_step"]
    low_rank = planned(path, "--optim_args=rank=4, update_proj_gap=4")
    assert low_rank["resident_bytes"] < base["resident_bytes"]


@pytest.mark.parametrize("options", [["--use_cpu", "false"], ["--use_cpu"]])
def test_bf16_is_planned_without_a_gpu_whatever_is_said_of_the_cpu(
    options: list[str], settings: dict[str, Any], tmp_path: Path
) -> None:
    path = written({**settings, "use_cpu": False}, tmp_path)
    assert planned(path, *options)["breakdown"]["parameters"] > 0


def test_the_verdict_is_about_what_is_needed_and_not_only_the_peak(settings: dict[str, Any], tmp_path: Path) -> None:
    path = written(settings, tmp_path)
    found = planned(path)
    kib = -(-found["needed_bytes"] // 1024)
    assert planned(path, "--vram", f"{kib}KiB")["fits"] is True
    assert found["peak_bytes"] < (kib - 1) * 1024
    assert printed_json(["plan", "--config", path, f"--vram={kib - 1}KiB", "--json"], status=1)["fits"] is False


def test_a_recipe_is_not_needed_where_the_command_line_says_it_all(model: Path, tmp_path: Path) -> None:
    options = ["--model_name_or_path", str(model), "--max_length", "16", "--output_dir", str(tmp_path / "out")]
    assert printed_json(["plan", "--json", *options])["peak_bytes"] > 0


# ---- what it prints


@pytest.mark.parametrize(
    ("vram", "status", "words"),
    [
        ([], 0, ["small.yaml needs a card of", "give --vram 4090, or 24GB, for a verdict"]),
        (["--vram", "24GiB"], 0, ["small.yaml fits: it needs 0.", "of a card's 24.00 GiB, and leaves 23.", DESKTOP]),
        (["--vram", "RTX 4090"], 0, ["of a card's 23.52 GiB, and leaves 22.", DESKTOP]),
        (["--vram", "24GB"], 0, ["of a card's 23.50 GiB, and leaves 22.", DESKTOP]),
        (
            ["--vram", "64MiB"],
            1,
            ["small.yaml does not fit: it needs 0.", "of a card's 0.0625 GiB", "GiB too much."],
        ),
    ],
)
def test_a_person_reads_tables_and_a_verdict(
    vram: list[str],
    status: int,
    words: list[str],
    settings: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["plan", "--config", written(settings, tmp_path), *vram]) == status
    shown = capsys.readouterr().out
    known = ["planned", "calculated", "that with expandable segments", "measured on an H200", *OUTSIDE]
    tables = ["parameters", "moments", "between steps", "tokens a step", "stood in for by cpu", "a card needs"]
    expected = [*words, *known, *tables, "The tokenizer of"]
    assert [word for word in expected if word not in shown] == []


def test_tables_of_a_plan(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(command, "plan_recipe", lambda *args, **kwargs: a_plan(vram=kwargs["vram"]))
    assert main(["plan", "--model_name_or_path", "[red]m", "--vram", "11.3GiB"]) == 0
    shown = capsys.readouterr().out
    rows = [line.replace("│", " ").split() for line in shown.splitlines()]
    assert ["something", "new", "5.00", "50.0", "%"] in rows
    assert ["the", "peak", "10.00", "100.0", "%", "planned"] in rows
    assert ["torch's", "allocator", "0.10", "calculated"] in rows
    assert ["cuSOLVER", "0.18", "measured", "on", "an", "H200"] in rows
    assert ["a", "card", "needs", "11.05"] in rows
    assert "The allocator's share is that with expandable segments; without them it is 0.50 GiB.\n" in shown
    assert "Peaks elsewhere: forward 5.00 GiB; between steps 5.00 GiB.\n" in shown
    assert "1,000 parameters; planned for cuda in 1.0 s.\n" in shown
    # No markup of rich's.
    assert shown.splitlines()[-1] == (
        "[red]m fits: it needs 11.05 GiB of a card's 11.30 GiB, and leaves 0.25 GiB: too little for a desktop, which "
        "takes 0.3 to 1 GiB. Give the screen to another GPU, or log in without one (ssh)."
    )


def test_a_card_with_room_for_a_desktop(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(command, "plan_recipe", lambda *args, **kwargs: a_plan(vram=kwargs["vram"]))
    assert main(["plan", "--model_name_or_path", "m", "--vram", "11.4GiB"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"m fits: it needs 11.05 GiB of a card's 11.40 GiB, and leaves 0.35 GiB. {DESKTOP}"


def test_without_expandable_segments_more_is_needed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "plan_recipe", lambda *args, **kwargs: a_plan(vram=kwargs["vram"], expandable=False))
    assert main(["plan", "--model_name_or_path", "m", "--vram", "11.3GiB"]) == 1
    shown = capsys.readouterr().out
    assert "The allocator's share is that without expandable segments; with them it is 0.10 GiB.\n" in shown
    assert shown.splitlines()[-1] == "m does not fit: it needs 11.45 GiB of a card's 11.30 GiB, 0.15 GiB too much."


@pytest.mark.parametrize(
    ("free", "words"),
    [
        (11.5, "of a card's 12.00 GiB, of which 11.50 GiB are free now."),
        (10.5, "But only 10.50 GiB are free now: other programs hold the rest, a desktop 0.3 to 1 GiB of it."),
    ],
)
def test_what_is_free_of_this_machines_card(
    free: float, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = a_plan(vram=12 * GIB, free_bytes=int(free * GIB))
    monkeypatch.setattr(command, "plan_recipe", lambda *args, **kwargs: found)
    assert main(["plan", "--model_name_or_path", "m"]) == 0  # the card has room for it
    assert words in capsys.readouterr().out.splitlines()[-1]


def test_what_libraries_print_does_not_get_into_the_json(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def chatty(*args: Any, **kwargs: Any) -> MemoryPlan:
        sys.stdout.write("chatter")
        return a_plan()

    monkeypatch.setattr(command, "plan_recipe", chatty)
    picture = tmp_path / "memory.png"
    assert main(["plan", "--config", written(settings, tmp_path), "--json", "--plot", str(picture)]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["peak_bytes"] == 10 * GIB
    assert "chatter" in shown.err


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("stream", [Terminal(), io.StringIO()], ids=["terminal", "file"])
def test_progress_is_shown_on_a_terminal_only(stream: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(*args: Any, progress: Callable[[str, int], None] | None, **kwargs: Any) -> MemoryPlan:
        assert (progress is not None) == stream.isatty()
        if progress is not None:
            progress("forward", 2)
        return a_plan()

    monkeypatch.setattr(command, "plan_recipe", slow)
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    assert main(["plan", "--model_name_or_path", "m"]) == 0
    assert ("step 2 of 3: forward and backward" in stream.getvalue()) == stream.isatty()
    assert stream.isatty() or stream.getvalue() == ""


# ---- pictures


def test_plot_writes_a_picture(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DISPLAY", raising=False)
    picture = tmp_path / "memory.png"
    assert main(["plan", "--config", written(settings, tmp_path), "--vram", "24GiB", f"--plot={picture}"]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG\r\n")
    assert picture.stat().st_size > 5000
    assert f"The picture is in {picture}." in capsys.readouterr().out


@pytest.mark.parametrize(("suffix", "beginning"), [(".svg", b"<?xml"), (".PDF", b"%PDF")])
def test_other_kinds_of_picture(suffix: str, beginning: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "plan_recipe", lambda *args, **kwargs: a_plan())
    picture = tmp_path / f"cost in $ and $$ of a_b{suffix}"
    picture.write_text("an older one")
    assert main(["plan", "--model_name_or_path", "$m_{", "--plot", str(picture)]) == 0
    assert picture.read_bytes().startswith(beginning)


def test_bars_are_as_long_as_what_they_stand_for() -> None:
    figure = Figure()
    plan_picture.draw(figure, a_plan(vram=16 * GIB), "r.yaml")
    (axes,) = figure.axes
    drawn = [bar for bar in axes.patches if isinstance(bar, Rectangle)]
    peak = [bar for bar in drawn if bar.get_y() > 0.5]
    assert [bar.get_width() for bar in peak] == pytest.approx([5, 5, 1.05])  # 0.1 and 0.95
    assert [bar.get_x() for bar in peak] == pytest.approx([0, 5, 10])
    assert [bar.get_width() for bar in drawn if bar.get_y() < 0.5] == pytest.approx([5])
    (card,) = axes.lines
    assert np.asarray(card.get_xdata()).tolist() == [16, 16]
    assert axes.get_xlim()[1] > 16
    assert axes.get_xlabel() == "GiB"
    assert axes.get_title(loc="left") == "r.yaml: needs 11.05 GiB, fits into 16 GiB"
    (legend,) = figure.legends
    assert {"parameters, 5.00 GiB", "something new, 5.00 GiB", "the card, 16 GiB"} <= {
        text.get_text() for text in legend.get_texts()
    }


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("memory", "its name has to end in one of"),
        ("memory.doc", ".png"),
        ("memory.pgf", "its name has to end in one of"),
        ("nowhere/memory.png", "there is no folder"),
        ("folder.png", "is a folder"),
        ("file.txt/memory.png", "there is no folder"),
    ],
)
def test_a_picture_that_cannot_be_is_found_before_the_plan(
    name: str,
    words: str,
    settings: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(command, "plan_recipe", refuses_to_plan)
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file.txt").write_text("mine")
    path = written(settings, tmp_path)
    assert main(["plan", "--config", path, "--plot", str(tmp_path / name)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("hf-galore plan: --plot ")
    assert words in line


def test_a_picture_where_nothing_can_be_written(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if not Path("/proc/self").exists():
        pytest.skip("/proc is the one folder that not even root can write to")
    monkeypatch.setattr(command, "plan_recipe", refuses_to_plan)
    assert main(["plan", "--config", written(settings, tmp_path), "--plot", "/proc/memory.png"]) == 2
    assert "--plot /proc/memory.png cannot be written" in capsys.readouterr().err


# ---- mistakes: one line, exit status 2

MISTAKES: dict[str, tuple[dict[str, Any], list[str], list[str]]] = {
    "unknown key": ({"optim_arg": "rank=8"}, [], ["there is no option 'optim_arg'", "Did you mean 'optim_args'?"]),
    "unknown option": ({}, ["--max-lenght", "3"], ["no option --max-lenght", "--max_length"]),
    "no size": ({}, ["--vram", "much"], ["--vram", "24GB", "'much'"]),
    "no card": ({}, ["--vram", "4091"], ["--vram", "'4091'", "Did you mean '4090'?", "Names: 2080ti, "]),
    "which of two": ({}, ["--vram", "4060 ti"], ["--vram: '4060 ti'", "say 4060ti-8gb or 4060ti-16gb"]),
    "no memory at all": ({}, ["--vram=0"], ["--vram", "'0'"]),
    "vram without a value": ({}, ["--vram"], ["--vram needs a card"]),
    "vram before an option": ({}, ["--vram", "--json"], ["--vram needs a card"]),
    "vram twice": ({}, ["--vram", "8", "--vram=9"], ["--vram is given twice"]),
    "plot without a value": ({}, ["--plot="], ["--plot needs a file"]),
    "a value for json": ({}, ["--json=yes"], ["--json takes no value"]),
    "a word after json": ({}, ["--optim_target_modules", "attn", "--json", "mlp"], ["'mlp' belongs to no --key"]),
    "suggest without a card": ({}, ["--suggest"], ["--suggest needs to know the card", "--vram 24GB"]),
    "suggest and plot": ({}, ["--suggest", "--vram=8", "--plot=a.png"], ["--plot", "--suggest"]),
    "no model": ({"model_name_or_path": "nowhere/nothing"}, [], ["nowhere/nothing", "Give a folder"]),
    "no such target": ({"optim_target_modules": ["atn"]}, [], ["'atn' matches no trainable"]),
    "misspelt optim_args": ({"optim_args": "rnak=8"}, [], ["no argument 'rnak'", "Did you mean 'rank'?"]),
    "rank above every side": ({"optim_args": "rank=4096"}, [], ["rank 4096", "Give a rank of at most"]),
    "quantized weights": ({"load_in_4bit": True}, [], ["load_in_4bit", "cannot be planned"]),
    "no length": ({"max_length": None}, [], ["max_length is empty"]),
}


@pytest.mark.parametrize(("changes", "options", "words"), MISTAKES.values(), ids=list(MISTAKES))
def test_a_mistake_is_one_line_and_leaves_nothing(
    changes: dict[str, Any],
    options: list[str],
    words: list[str],
    settings: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = written({**settings, **changes}, tmp_path)
    assert main(["plan", "--config", path, *options]) == 2
    shown = capsys.readouterr()
    (line,) = shown.err.splitlines()
    assert line.startswith("hf-galore plan: ")
    assert [word for word in words if word not in line] == []
    assert shown.out == ""
    assert [entry.name for entry in tmp_path.iterdir()] == ["small.yaml"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "give a recipe: --config recipe.yaml"),
        (["--vram", "24GiB"], "give a recipe: --config recipe.yaml"),
        (["--max_length", "16"], "model_name_or_path is missing"),
        (["--config", "missing.yaml"], "there is no such file, and no such recipe comes with hf_galore"),
    ],
)
def test_without_a_recipe(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line


def test_help_has_the_options_of_its_own_and_those_of_a_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["plan", "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    for flag in ("--vram CARD", "23.5GiB", "--json", "--plot FILE", "--suggest", "--per_device_train_batch_size"):
        assert flag in " ".join(shown.split())


# ---- what it leaves alone


def test_the_output_dir_is_neither_made_nor_removed(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    path = written({**settings, "output_dir": "new/out"}, tmp_path)
    planned(path, "--eval_strategy", "steps")
    assert list(here.iterdir()) == []

    (here / "new" / "out").mkdir(parents=True)
    assert main(["plan", "--config", path, "--optim_target_modules", "atn"]) == 2
    assert [str(entry.relative_to(here)) for entry in here.rglob("*")] == ["new", "new/out"]  # empty, and still there

    checkpoint = tmp_path / "out" / "checkpoint-1"
    checkpoint.mkdir(parents=True)
    (checkpoint / "trainer_state.json").write_text("mine")
    planned(written(settings, tmp_path), "--save_total_limit", "1", "--resume_from_checkpoint")
    assert list((tmp_path / "out").rglob("*")) == [checkpoint, checkpoint / "trainer_state.json"]
    assert (checkpoint / "trainer_state.json").read_text() == "mine"


def test_ctrl_c_is_one_line(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*args: Any, **kwargs: Any) -> MemoryPlan:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "plan_recipe", interrupted)
    assert main(["plan", "--config", written(settings, tmp_path), "--json"]) == 130
    shown = capsys.readouterr()
    assert shown.err == "\nhf-galore plan: interrupted.\n"
    assert shown.out == ""


# ---- suggestions, which are made elsewhere


def test_suggest_gets_the_recipe_with_further_overrides_and_the_card(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def suggest(parse: Callable[[Sequence[str]], Arguments], vram: int, as_json: bool) -> int:
        lengths = [parse(extra).training.max_length for extra in ([], ["--max_length", "8"])]
        calls.append((lengths, vram, as_json))
        return 1

    module = types.ModuleType("hf_galore.cli.suggest")
    monkeypatch.setattr(module, "suggest", suggest, raising=False)
    monkeypatch.setitem(sys.modules, "hf_galore.cli.suggest", module)
    monkeypatch.setattr(command, "plan_recipe", refuses_to_plan)
    path = written(settings, tmp_path)
    arguments = ["plan", "--config", path, "--suggest", "--vram", "24GiB", "--max_length", "16"]
    assert main(arguments) == 1
    assert main([*arguments, "--json"]) == 1
    assert calls == [([16, 8], 24 * GIB, False), ([16, 8], 24 * GIB, True)]
