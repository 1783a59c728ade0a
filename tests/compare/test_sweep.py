"""`hf-galore compare --sweep`: which runs it makes of a recipe, how it goes on, and one that is real."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from hf_galore.cli import sweep
from hf_galore.cli.interrupts import Stopped
from hf_galore.cli.main import main
from hf_galore.compare.sweep import SETTINGS_FILE, plan_sweep
from hf_galore.errors import UserError
from hf_galore.recipes.embedded_model import CACHE_VARIABLE, Embedded, embedded
from hf_galore.recipes.run_record import RUN_FILE, RunFacts
from tests.support import signals
from tests.support.commands import command_line, said_of_mistake, write_checkpoint, write_recipe
from tests.support.written_runs import FACTS, Page, write_state

SETTINGS: dict[str, Any] = {
    "model_name_or_path": "org/model",
    "dataset_name": "org/data",
    "optim": "galore_adamw",
    "optim_target_modules": ["attn", "mlp"],
    "optim_args": "rank=16, update_proj_gap=4, scale=1",
    "learning_rate": 1e-3,
    "max_steps": 2,
    "bf16": False,
    "use_cpu": True,
    "report_to": "none",
}


@pytest.fixture
def path(tmp_path: Path) -> str:
    return written(tmp_path)


def written(folder: Path, **changes: Any) -> str:
    return write_recipe(folder, {**SETTINGS, "output_dir": str(folder / "out"), **changes})


class Trainings:
    """Stands in for the processes: each leaves a finished run, but for those that are to fail."""

    def __init__(self, **statuses: int) -> None:
        self.statuses = statuses
        self.commands: list[Sequence[str]] = []

    def __call__(self, command: Sequence[str], to_stderr: bool) -> int:
        start = command_line()
        assert command[: len(start)] == start
        self.commands.append(command[len(start) :])
        folder = Path(option(command, "output_dir"))
        status = self.statuses.get(folder.name.replace("-", "_"), 0)
        if status == 0:
            write_state(folder, [{"loss": 2.0, "step": 1}, {"loss": 1.0, "step": 2}], 2)
            FACTS.write(folder)
        return status

    @property
    def folders(self) -> list[str]:
        return [Path(option(command, "output_dir")).name for command in self.commands]


def option(command: Sequence[str], key: str) -> str:
    """The value that counts: the last one."""
    return [item.partition("=")[2] for item in command if item.startswith(f"--{key}=")][-1]


def trained(monkeypatch: pytest.MonkeyPatch, **statuses: int) -> Trainings:
    trainings = Trainings(**statuses)
    monkeypatch.setattr(sweep, "_wait", trainings)
    return trainings


# ---- which runs


def test_a_key_of_optim_args_leaves_the_others(path: str, tmp_path: Path) -> None:
    planned = plan_sweep(["rank=8,128"], ["--config", path, "--seed", "7"])
    assert planned.output_dir == tmp_path / "out"
    assert [trial.name for trial in planned.trials] == ["rank=8", "rank=128"]
    assert [trial.folder for trial in planned.trials] == [tmp_path / "out" / "rank-8", tmp_path / "out" / "rank-128"]
    assert [trial.settings["optim_args"] for trial in planned.trials] == [
        "rank=8, update_proj_gap=4, scale=1.0",
        "update_proj_gap=4, scale=1.0",  # 128 is the default
    ]
    assert planned.trials[0].command == [
        *("sft", "--config", path, "--seed", "7"),
        "--optim_args=rank=8, update_proj_gap=4, scale=1.0",
        f"--output_dir={tmp_path / 'out' / 'rank-8'}",
    ]
    assert planned.trials[0].settings["seed"] == 7


def test_the_scale_that_goes_with_a_rank_is_a_value_too(path: str) -> None:
    planned = plan_sweep(["rank=8,16", "scale=auto,0.5"], ["--config", path])
    assert [trial.folder.name for trial in planned.trials][:2] == ["rank-8_scale-auto", "rank-8_scale-0.5"]
    assert planned.trials[2].settings["optim_args"] == "rank=16, update_proj_gap=4, scale=auto"


def test_what_does_nothing_without_another_goes_with_that_of_the_recipe(path: str) -> None:
    override = ["--optim_args", "rank=16, residual=fira", "--max_grad_norm", "0"]
    planned = plan_sweep(["residual_scale=0.5,2"], ["--config", path, *override])
    told = [trial.settings["optim_args"] for trial in planned.trials]
    assert told == [f"rank=16, residual=fira, residual_scale={scale}" for scale in ("0.5", "2.0")]
    with pytest.raises(UserError, match="--sweep residual_scale=2: GaLore's residual_scale=2 multiplies what a resid"):
        plan_sweep(["residual_scale=2"], ["--config", path])


def test_several_keys_make_all_combinations(path: str) -> None:
    planned = plan_sweep(["scale=1,2", "learning_rate=1e-3,2e-3"], ["--config", path])
    assert [trial.folder.name for trial in planned.trials] == [
        "scale-1_learning_rate-1e-3",
        "scale-1_learning_rate-2e-3",
        "scale-2_learning_rate-1e-3",
        "scale-2_learning_rate-2e-3",
    ]
    told = [(trial.settings["optim_args"], trial.settings["learning_rate"]) for trial in planned.trials]
    assert told[1] == ("rank=16, update_proj_gap=4, scale=1.0", 2e-3)
    assert told[2] == ("rank=16, update_proj_gap=4, scale=2.0", 1e-3)


def test_a_value_with_commas_in_it(path: str) -> None:
    planned = plan_sweep(['optim_args="rank=8, scale=2",rank=4'], ["--config", path])
    assert [trial.settings["optim_args"] for trial in planned.trials] == ["rank=8, scale=2", "rank=4"]


def test_another_optimizer_is_not_told_what_is_for_galore(path: str) -> None:
    planned = plan_sweep(["optim=galore_adamw,adamw_torch"], ["--config", path])
    assert [trial.settings["optim_args"] for trial in planned.trials] == [SETTINGS["optim_args"], None]


def test_the_command_is_the_recipes(path: str) -> None:
    assert plan_sweep(["rank=8"], ["--config", "quickstart.yaml", "--max_steps", "3"]).trials[0].command[:3] == [
        *("quickstart", "--max_steps", "3")
    ]
    own = ["--config", "quickstart.yaml", "--model_name_or_path", "org/model"]
    assert plan_sweep(["rank=8"], own).trials[0].command[:3] == ["sft", "--config", "quickstart.yaml"]


# ---- mistakes: found before anything is run

MISTAKES: dict[str, tuple[list[str], list[str]]] = {
    "no recipe": (["--sweep", "rank=8"], ["--sweep needs a recipe"]),
    "no such key": (["--sweep", "rnak=8,16", "--config", "PATH"], ["rnak", "Did you mean 'rank'?"]),
    "no such key of a recipe": (
        ["--sweep", "learningrate=1", "--config", "PATH"],
        ["there is no such key", "Did you mean 'learning_rate'?"],
    ),
    "no values": (["--sweep", "rank=", "--config", "PATH"], ["--sweep rank=", "KEY=V1,V2"]),
    "an empty value": (["--sweep", "rank=8,,16", "--config", "PATH"], ["KEY=V1,V2"]),
    "no key": (["--sweep", "8,16", "--config", "PATH"], ["KEY=V1,V2"]),
    "a value twice": (["--sweep", "rank=8,8", "--config", "PATH"], ["a value is given twice"]),
    "a key twice": (["--sweep", "rank=8", "--sweep", "rank=16", "--config", "PATH"], ["twice for the same key"]),
    "a rank that is none": (["--sweep", "rank=8,big", "--config", "PATH"], ["rank=big", "at least 1"]),
    "a number that is none": (
        ["--sweep", "learning_rate=1e-3,fast", "--config", "PATH"],
        ["learning_rate=fast", "invalid float value"],
    ),
    "an optim that is none": (["--sweep", "optim=galore_adamw,adamx", "--config", "PATH"], ["optim=adamx"]),
    "a rank of AdamW": (
        ["--sweep", "rank=8", "--config", "PATH", "--optim", "adamw_torch"],
        ["rank=8", "these are of GaLore, which optim adamw_torch is not"],
    ),
    "what is given too": (
        ["--sweep", "learning_rate=1,2", "--config", "PATH", "--learning_rate", "1"],
        ["are both given"],
    ),
    "a part and the whole": (
        ["--sweep", "optim_args=rank=4", "--sweep", "rank=8", "--config", "PATH"],
        ["optim_args would undo the other"],
    ),
    "its own": (["--sweep", "output_dir=a,b", "--config", "PATH"], ["it is nothing to compare"]),
    "the same folder": (
        ["--sweep", "dataset_name=a/b,a:b", "--config", "PATH"],
        ["dataset_name-a-b, and so would another"],
    ),
    "an unknown option": (
        ["--sweep", "rank=8", "--config", "PATH", "--max_step", "3"],
        ["there is no option --max_step", "--max_steps"],
    ),
    "names": (["--sweep", "rank=8,16", "--config", "PATH", "--names", "a"], ["there are 2 runs"]),
    "a stray word": (["--sweep", "rank=8", "out", "--config", "PATH"], ["'out' belongs to no --key"]),
    "a checkpoint's folder": (
        ["--sweep", "rank=8", "--config", "PATH", "--resume_from_checkpoint", "somewhere"],
        ["a sweep has no use for a folder"],
    ),
}


@pytest.mark.parametrize(("arguments", "words"), MISTAKES.values(), ids=list(MISTAKES))
def test_a_mistake_is_found_before_anything_is_run(
    arguments: list[str],
    words: list[str],
    path: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    trainings = trained(monkeypatch)
    line = said_of_mistake("compare", [path if item == "PATH" else item for item in arguments], capsys)
    assert [word for word in words if word not in line] == []
    assert trainings.commands == []
    assert not (tmp_path / "out").exists()


def test_an_output_is_checked_before_anything_is_run(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trainings = trained(monkeypatch)
    assert main(["compare", "--sweep", "rank=8", "--config", path, "--output", f"{path}/x"]) == 2
    assert "recipe.yaml is a file" in capsys.readouterr().err
    assert trainings.commands == []


def test_several_seeds_are_runs_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trainings = trained(monkeypatch)
    arguments = ["--config", "glue/roberta_base_mrpc.yaml", "--seeds", "1", "2"]
    assert main(["compare", "--sweep", "rank=8", *arguments]) == 2
    assert "--sweep seed=1,2,3" in capsys.readouterr().err
    assert trainings.commands == []


# ---- running, and going on


def test_a_sweep_goes_on_where_it_was(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["compare", "--sweep", "rank=4,8,16,32", "--config", path]
    first = trained(monkeypatch, rank_16=1)
    assert main(arguments) == 1
    assert first.folders == ["rank-4", "rank-8", "rank-16"]
    assert not (tmp_path / "out" / "comparison").exists()
    # The third had begun.
    FACTS.__class__(**{**vars(FACTS), "finished": False}).write(mkdir(tmp_path / "out" / "rank-16"))
    again = [*arguments, "--resume_from_checkpoint"]
    planned = plan_sweep(["rank=4,8,16,32"], ["--config", path]).trials[2]
    (planned.folder / SETTINGS_FILE).write_text(json.dumps(planned.settings))
    write_checkpoint(planned.folder / "checkpoint-1", {"log_history": [{"loss": 2.0, "step": 1}]})
    second = trained(monkeypatch)
    assert main(again) == 0
    assert second.folders == ["rank-16", "rank-32"]
    assert [option(command, "resume_from_checkpoint") for command in second.commands] == ["true", "false"]
    page = Page((tmp_path / "out" / "comparison" / "index.html").read_text(encoding="utf-8"))
    assert [row[0] for row in page.tables[0]] == ["run", "rank=4", "rank=8", "rank=16", "rank=32"]
    # Without the option nothing is, unless what is there is to be removed.
    third = trained(monkeypatch)
    assert main(arguments) == 2
    assert "rank-4 holds a run: " in capsys.readouterr().err
    assert main([*arguments, "--overwrite_output_dir"]) == 0
    assert third.folders == ["rank-4", "rank-8", "rank-16", "rank-32"]


def mkdir(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def test_a_failure_stops_the_sweep_and_says_which(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trainings = trained(monkeypatch, rank_8=2)
    assert main(["compare", "--sweep", "rank=8,16", "--config", path]) == 2
    assert trainings.folders == ["rank-8"]
    (line,) = capsys.readouterr().err.splitlines()
    assert "rank=8 failed with exit status 2, and the sweep stops: hf-galore sft --config" in line
    assert line.endswith(f"go on with: hf-galore compare --sweep rank=8,16 --config {path} --resume_from_checkpoint")
    assert not (tmp_path / "out").exists()  # the run left nothing, and so did the sweep


def test_a_finished_run_with_other_settings_is_not_taken_for_this_one(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trained(monkeypatch)
    arguments = ["compare", "--sweep", "rank=4,8", "--config", path, "--output", str(tmp_path / "page")]
    assert main(arguments) == 0
    trainings = trained(monkeypatch)
    assert main([*arguments, "--max_steps", "9", "--resume_from_checkpoint"]) == 2
    assert "rank-4 holds a run with other settings (max_steps 2, now 9)" in capsys.readouterr().err
    assert trainings.commands == []
    assert main([*arguments, "--resume_from_checkpoint"]) == 0
    assert trainings.commands == []
    assert capsys.readouterr().out.count("is finished: it is not run again.") == 2


def test_ctrl_c_says_how_to_go_on(
    path: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trainings = trained(monkeypatch, rank_8=130)
    assert main(["compare", "--sweep", "rank=4,8,16", "--config", path]) == 130
    assert trainings.folders == ["rank-4", "rank-8"]
    assert capsys.readouterr().err.splitlines()[-1] == (
        "hf-galore compare: interrupted in rank=8; go on with: hf-galore compare --sweep rank=4,8,16 --config "
        f"{path} --resume_from_checkpoint"
    )


TOLD = """
import signal, sys, time
from pathlib import Path
told = []
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, frame: told.append(signal.Signals(number).name))
print("begun", flush=True)
Path(sys.argv[1]).touch()
while not told:
    time.sleep(0.01)
time.sleep(float(sys.argv[2]))
Path(sys.argv[1]).write_text(" ".join(told))
sys.exit(143)
"""


@contextlib.contextmanager
def sent_once_begun(begun: Path, numbers: Sequence[int], pause: float = 0) -> Iterator[None]:
    """Send signals to this process, the first when a file is there."""

    def send() -> None:
        while not begun.exists():
            time.sleep(0.01)
        for number in numbers:
            os.kill(os.getpid(), number)
            time.sleep(pause)

    thread = threading.Thread(target=send)
    with signals.of_a_terminal():
        thread.start()
        try:
            yield
        finally:
            thread.join()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_what_stops_a_sweep_reaches_the_run_and_waits_for_it(
    number: int, status: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Sent to the sweep alone, as `kill` does: the run would train on, or be cut off in its checkpoint."""
    begun = tmp_path / "begun"
    with sent_once_begun(begun, [number]):
        assert sweep._wait([sys.executable, "-c", TOLD, str(begun), "0.3"], to_stderr=True) == status
    assert begun.read_text() == "SIGTERM"  # once: a second Ctrl-C would have stopped it at once
    shown = capfd.readouterr()
    assert (shown.out, shown.err) == ("", "begun\n")


def test_a_sweep_that_is_stopped_twice_waits_no_longer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "_PATIENCE", 0.1)
    begun = tmp_path / "begun"
    with sent_once_begun(begun, [signal.SIGINT, signal.SIGINT], pause=1):
        assert sweep._wait([sys.executable, "-c", TOLD, str(begun), "60"], to_stderr=True) == 130
    assert begun.read_text() == ""


def test_a_run_that_a_signal_ends() -> None:
    assert sweep._wait([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"], to_stderr=False) == 137


def test_stopped_is_raised_and_not_returned(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trained(monkeypatch, rank_4=130)
    with pytest.raises(Stopped):
        sweep.run_sweep(plan_sweep(["rank=4"], ["--config", path]), "hf-galore compare", [])


# ---- a real one


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Embedded:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CACHE_VARIABLE, str(tmp_path_factory.mktemp("cache")))
        return embedded()


@pytest.mark.slow
def test_two_ranks(
    small: Embedded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    path = written(
        tmp_path,
        model_name_or_path=str(small.model),
        dataset_name=str(small.data),
        max_length=32,
        per_device_train_batch_size=2,
        logging_steps=1,
        save_strategy="no",
    )
    arguments = ["compare", "--sweep", "rank=4,8", "--config", path, "--json", "--output", str(tmp_path / "page")]
    assert main(arguments) == 0
    few, more = json.loads(capfd.readouterr().out)["runs"]
    assert (few["name"], more["name"]) == ("rank=4", "rank=8")
    assert (few["method"], more["method"]) == ("GaLore r=4", "GaLore r=8")
    for run in (few, more):
        assert run["finished"]
        assert run["step"] == 2
        assert run["facts"]["optim_args"].endswith("update_proj_gap=4, scale=1.0")
        results = run["results"]
        assert min(results["step_seconds"], results["tokens_per_second"], results["peak_memory_gib"]) > 0
        assert results["training_seconds"] > results["step_seconds"]
    # The same seed, and the first step's loss is before any update.
    losses = [
        [
            entry["loss"]
            for entry in read(tmp_path / "out" / name / "trainer_state.json")["log_history"]
            if "loss" in entry
        ]
        for name in ("rank-4", "rank-8")
    ]
    assert losses[0][0] == losses[1][0]
    assert few["results"]["optimizer_bytes"] < more["results"]["optimizer_bytes"]
    facts = RunFacts.read(tmp_path / "out" / "rank-4")
    assert facts is not None
    before = (tmp_path / "out" / "rank-4" / RUN_FILE).stat().st_mtime_ns
    assert main([*arguments, "--resume_from_checkpoint"]) == 0
    assert (tmp_path / "out" / "rank-4" / RUN_FILE).stat().st_mtime_ns == before


def read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found
