"""What `report_to` sends to TensorBoard, W&B and trackio, read back from where each keeps it; what it cannot."""

from __future__ import annotations

import json
import os
import sqlite3
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import TrainingArguments
from transformers.integrations import get_available_reporting_integrations, integration_utils
from wandb.proto import wandb_internal_pb2

from hf_galore.errors import UserError
from hf_galore.recipes import trackers
from hf_galore.recipes.embedded_model import CACHE_VARIABLE, conversations, embedded, split
from hf_galore.recipes.trackers import check_trackers
from tests.support.commands import command_line, write_recipe

STEPS = 4
OPTIM_ARGS = "rank=16, update_proj_gap=2, scale=1"

# step -> name -> value
History = dict[int, dict[str, float]]


class Tracked(NamedTuple):
    """A folder in which a run has left what it reported, and what it logged."""

    folder: Path
    log: list[dict[str, float]]


@pytest.fixture
def tracked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tracked:
    """One run that reports to all three, in a process of its own: W&B writes the last of it when the process ends."""
    for tracker in READERS:
        pytest.importorskip(tracker, reason="the extra tracking is not installed")
    folder = tmp_path
    monkeypatch.setenv(CACHE_VARIABLE, str(folder / "cache"))
    small = embedded()
    data = folder / "data"
    data.mkdir()
    for name, part in zip(("train", "test"), split(conversations()), strict=True):
        lines = (json.dumps({"messages": messages}) + "\n" for messages in part[:8])
        (data / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    settings = {
        "model_name_or_path": str(small.model),
        "dataset_name": str(data),
        "max_length": 32,
        "assistant_only_loss": True,
        "optim": "galore_adamw_8bit_layerwise",
        "optim_target_modules": ["attn", "mlp"],
        "optim_args": OPTIM_ARGS,
        "learning_rate": 1e-3,
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "activation_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "logging_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": STEPS,
        "save_strategy": "no",
        "disable_tqdm": True,
        "report_to": ["tensorboard", "wandb", "trackio"],
        "trackio_space_id": None,  # by default older releases of transformers send it to a space of theirs
        "run_name": "tracked",
        "output_dir": str(folder / "out"),
    }
    offline = {"WANDB_MODE": "offline", "WANDB_DIR": str(folder), "TRACKIO_DIR": str(folder / "trackio")}
    subprocess.run(
        command_line("sft", "--config", write_recipe(folder, settings)),
        env={**os.environ, **offline, "OMP_NUM_THREADS": "1"},
        check=True,
    )
    state = json.loads((folder / "out" / "trainer_state.json").read_text(encoding="utf-8"))
    return Tracked(folder, state["log_history"])


# ---- reading


def tensorboard(folder: Path) -> tuple[History, str]:
    """The scalars of the event file, and the optim_args among the arguments that it holds as text."""
    (events,) = (folder / "out" / "runs").rglob("events.out.tfevents.*")
    accumulator = EventAccumulator(str(events))
    accumulator.Reload()
    history: History = {}
    for name in accumulator.Tags()["scalars"]:
        for event in accumulator.Scalars(name):
            history.setdefault(event.step, {})[name] = event.value
    (arguments,) = accumulator.Tensors("args/text_summary")
    return history, json.loads(arguments.tensor_proto.string_val[0])["optim_args"]


def wandb(folder: Path) -> tuple[History, str]:
    """The history and the configuration in the file that `wandb sync` uploads."""
    (transactions,) = (folder / "wandb").glob("offline-run-*/*.wandb")
    history: History = {}
    config: dict[str, Any] = {}
    for record in wandb_records(transactions.read_bytes()):
        config.update({update.key: json.loads(update.value_json) for update in record.config.update if update.key})
        row = {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
        if row:
            history.setdefault(row["train/global_step"], {}).update(row)
    return history, config["optim_args"]


def wandb_records(data: bytes) -> Iterator[Any]:
    """The records of a `.wandb` file: seven bytes that name the format, then LevelDB's log of protobuf messages.

    Its blocks of 32 KiB hold chunks: a checksum (4 bytes), a length (2), a type (1) and the data. A chunk holds all of
    a record (type 1), or its first part (2), one between (3), or its last (4). Fewer than seven bytes at the end of a
    block are left empty. https://github.com/google/leveldb/blob/main/doc/log_format.md
    """
    assert data.startswith(b":W&B")
    block, header = 2**15, 7
    place, record = header, b""
    while place + header <= len(data):
        if (left := block - place % block) < header:
            place += left
            continue
        size, kind = struct.unpack_from("<HB", data, place + 4)
        place += header
        record += data[place : place + size]
        place += size
        if kind in (1, 4):
            yield wandb_internal_pb2.Record.FromString(record)  # type: ignore[attr-defined, unused-ignore]
            record = b""


def trackio(folder: Path) -> tuple[History, str]:
    """The metrics and the configuration in the project's database."""
    (database,) = (folder / "trackio").glob("*.db")
    connection = sqlite3.connect(database)
    rows = [json.loads(text) for (text,) in connection.execute("SELECT metrics FROM metrics ORDER BY id")]
    ((config,),) = connection.execute("SELECT config FROM configs WHERE run_name = 'tracked'")
    connection.close()
    history: History = {}
    for row in rows:
        history.setdefault(row["train/global_step"], {}).update(row)
    return history, json.loads(config)["optim_args"]


# ---- what is there

READERS = {"tensorboard": tensorboard, "wandb": wandb, "trackio": trackio}
# TensorBoard keeps float32.
TOLERANCE = {"tensorboard": 2**-23, "wandb": 0, "trackio": 0}


def test_every_figure_arrives_with_its_step(tracked: Tracked) -> None:
    """In each of the three; one test, for the run takes ten seconds."""
    logged = {int(entry["step"]): entry for entry in tracked.log if "loss" in entry}
    (evaluation,) = (entry for entry in tracked.log if "eval_loss" in entry)
    assert sorted(logged) == list(range(1, STEPS + 1))
    assert [entry["learning_rate"] for entry in logged.values()] == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4])
    for entry in logged.values():
        assert {"loss", "grad_norm", "galore/refreshes", "galore/captured_energy_median"} <= set(entry)
    assert {"galore/moment_mib", "galore/basis_mib", "galore/targets", "galore/full_rank"} <= set(logged[1])
    assert "galore/overlap_median" in logged[2]

    for name, read in READERS.items():
        history, optim_args = read(tracked.folder)
        for step, entry in logged.items():
            expected = {f"train/{key}": value for key, value in entry.items() if key != "step"}
            found = {key: history[step].get(key) for key in expected}
            assert found == pytest.approx(expected, rel=TOLERANCE[name], abs=0), name
        assert history[STEPS]["eval/loss"] == pytest.approx(evaluation["eval_loss"], rel=TOLERANCE[name], abs=0), name
        assert optim_args == OPTIM_ARGS, name


# ---- what is not there


@pytest.fixture
def only_tensorboard(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in get_available_reporting_integrations():
        if name != "tensorboard":
            monkeypatch.setattr(integration_utils, f"is_{name}_available", lambda: False)


MISSING = {
    "trackio": (
        ["tensorboard", "trackio"],
        'trackio is not installed. Install it (pip install trackio, or "hf-galore[tracking]"), or set report_to to one '
        "of tensorboard.",
    ),
    "mlflow": (
        "mlflow",
        "mlflow is not installed, or not set up. Install it as its documentation says, or set report_to to one of "
        "tensorboard.",
    ),
    "tensorbord": ("tensorbord", "tensorbord is not supported, only azure_ml, comet_ml, "),
}


@pytest.mark.usefixtures("only_tensorboard")
@pytest.mark.parametrize(("report_to", "words"), MISSING.values(), ids=list(MISSING))
def test_a_tracker_that_is_not_there(report_to: str | list[str], words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        check_trackers(TrainingArguments(output_dir=str(tmp_path), report_to=report_to, use_cpu=True))
    assert str(error.value).startswith(f"report_to: {words}")


@pytest.mark.usefixtures("only_tensorboard")
@pytest.mark.parametrize("report_to", ["none", "all", "tensorboard", "azure_ml", "flyte", []])
def test_trackers_that_are_there_or_that_nobody_can_tell(report_to: Any, tmp_path: Path) -> None:
    check_trackers(TrainingArguments(output_dir=str(tmp_path), report_to=report_to, use_cpu=True))


def test_no_tracker_at_all(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(trackers, "get_available_reporting_integrations", list)
    with pytest.raises(
        UserError, match=r'pip install wandb, or "hf-galore\[tracking\]"\), or set report_to to \'none\'\.$'
    ):
        check_trackers(TrainingArguments(output_dir=str(tmp_path), report_to="wandb", use_cpu=True))
