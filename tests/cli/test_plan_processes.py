"""`hf-galore plan --num_processes N [--sharded]`: what it prints and returns, and what it says about mistakes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer

from hf_galore.cli import plan as command
from hf_galore.cli.main import main
from hf_galore.cli.plan_processes import show as show_processes
from hf_galore.plan.planner import GIB
from hf_galore.plan.processes import ProcessesPlan, RankPlan, rank_plan
from hf_galore.plan.ranks import RankMemory
from hf_galore.plan.rehearsal import Record
from hf_galore.plan.wire import Devices
from hf_galore.recipes.folders import recipes_folder
from hf_galore.recipes.planning import plan_recipe
from hf_galore.recipes.planning_processes import ADAMW, plan_processes
from tests.support.commands import printed_json, write_recipe
from tests.support.pages import DOCS
from tests.support.planning import llama_folder
from tests.support.releases import needs_fused_head

# Embedding, head and 5 norms; two layers of 4 square matrices and 3 of the MLP's.
NORMS, HEADS, MATRICES = 5 * 64, 2 * 512 * 64, 2 * (4 * 64 * 64 + 3 * 64 * 128)
NUMBERS = NORMS + HEADS + MATRICES
LOW_RANK, WIDE_LOW_RANK = 2 * 8 * (4 * 64 + 3 * 128), 2 * 8 * 128
PROBED = LOW_RANK  # as many probes as a basis has columns


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    settings = {
        "model_name_or_path": str(llama_folder(tmp_path / "model", layers=2)),
        "dtype": "bfloat16",
        "dataset_name": "not/needed",
        "max_length": 32,
        "optim": "galore_adamw_layerwise",
        "optim_target_modules": ["attn", "mlp"],
        "optim_args": "rank=8, update_proj_gap=4",
        "per_device_train_batch_size": 2,
        "max_grad_norm": 0,
        "bf16": False,
        "report_to": "none",
        "output_dir": str(tmp_path / "out"),
    }
    return write_recipe(tmp_path, settings, "small.yaml")


def test_json_has_what_a_rank_holds_and_sends_beside_adamw(recipe: str) -> None:
    options = ["--num_processes", "4", "--sharded", "--optim_args=rank=8, projected_backward=false"]
    found = printed_json(["plan", "--config", recipe, "--json", *options])
    assert (found["num_processes"], found["sharded"], found["exchange"]) == (4, True, None)
    assert (found["run"]["optim"], found["adamw"]["optim"]) == ("galore_adamw_layerwise", "adamw_torch_fused")
    assert found["parameters"] == NUMBERS
    assert found["tokens_per_step"] == 4 * 2 * 32
    for rank in (found["run"], found["adamw"]):
        memory = rank["memory_bytes"]
        assert sum(memory.values()) == rank["total_bytes"] < rank["needed_bytes"]
        assert memory["weights"] == pytest.approx(2 * NUMBERS / 4, abs=64 * 4)  # buffers
        assert rank["payload_bytes_per_step"]["all-gather"] >= 2 * 2 * MATRICES
        assert rank["fits"] is None
    assert found["adamw"]["memory_bytes"]["moments"] == 2 * 2 * NUMBERS / 4
    assert found["run"]["memory_bytes"]["moments"] == 2 * 4 * (NORMS + HEADS + LOW_RANK) / 4  # in float32
    assert found["adamw"]["payload_bytes_per_step"]["reduce-scatter"] == 2 * NUMBERS
    # Of the matrices that are wider than tall R is reduced too.
    assert found["run"]["payload_bytes_per_step"]["reduce-scatter"] == 2 * (NUMBERS + WIDE_LOW_RANK)
    # The same from Python.
    of_recipe = printed_json(["plan", "--config", recipe, "--json", *options[:3]])
    again = plan_processes(recipe, 4, sharded=True).as_dict()
    assert again | {"seconds": 0} == of_recipe | {"seconds": 0}


def test_with_a_projected_backward_fsdp2_reduces_only_r(recipe: str) -> None:
    options = [
        "--num_processes",
        "4",
        "--sharded",
        "--optim_args=rank=8, update_proj_gap=1000000",  # layerwise has it by itself
    ]
    found = printed_json(["plan", "--config", recipe, "--json", *options])
    assert found["run"]["payload_bytes_per_step"]["reduce-scatter"] == pytest.approx(
        2 * (NORMS + HEADS + LOW_RANK + PROBED), abs=1
    )


def test_ddp_is_what_is_not_sharded_and_thousands_are_as_quick(recipe: str) -> None:
    two, many = (
        printed_json(["plan", "--config", recipe, "--json", f"--num_processes={number}"]) for number in (2, 5000)
    )
    assert two["exchange"] == "low_rank"
    assert two["run"]["memory_bytes"] == many["run"]["memory_bytes"]
    assert two["adamw"]["payload_bytes_per_step"]["all-reduce"] == 2 * NUMBERS
    assert two["adamw"]["sent_bytes_per_step"] == pytest.approx(2 * NUMBERS, rel=0.001)  # and the buffers
    assert many["adamw"]["sent_bytes_per_step"] == pytest.approx(2 * 2 * NUMBERS, rel=0.001)
    all_refresh = two["run"]["payload_bytes_where_all_refresh"]
    assert all_refresh["reduce"] == 2 * MATRICES
    assert two["run"]["payload_bytes_per_step"]["reduce"] == 2 * MATRICES / 4


def test_one_process_is_the_plan_as_ever(recipe: str) -> None:
    one, ever = (printed_json(["plan", "--config", recipe, "--json", *more]) for more in (["--num_processes", "1"], []))
    assert one | {"seconds": 0} == ever | {"seconds": 0}


def test_bf16_is_told_to_make_weights_float32_under_fsdp2(recipe: str) -> None:
    found = printed_json(["plan", "--config", recipe, "--json", "--num_processes=4", "--sharded", "--bf16", "true"])
    assert found["run"]["memory_bytes"]["weights"] == pytest.approx(4 * NUMBERS / 4, abs=64 * 4)
    assert found["adamw"]["payload_bytes_per_step"]["reduce-scatter"] == 2 * NUMBERS  # in 16 bits as before
    assert any("With bf16: false they stay" in note for note in found["notes"])


# ---- what it prints


def a_rank(optim: str, *, sharded: bool, total: int, sent: float) -> RankPlan:
    half = total // 2
    return RankPlan(
        Devices(8, sharded, "dense" if sharded else "low_rank", hooked=optim != "adamw_torch_fused"),
        optim,
        False,
        RankMemory("backward", {"weights": half, "activations, temporaries": total - half}),
        {"all-reduce": sent, "broadcast": sent / 4},
        sent,
        {"all-reduce": 3.0 * GIB},
    )


def a_plan(*, sharded: bool = True, vram: int | None = None) -> ProcessesPlan:
    run = a_rank("galore_adamw_8bit_layerwise", sharded=sharded, total=10 * GIB, sent=2.0 * GIB)
    adamw = a_rank("adamw_torch_fused", sharded=sharded, total=40 * GIB, sent=16.0 * GIB)
    return ProcessesPlan(run.devices, run, adamw, 1000, 4096, vram, 1.0, ("A note.",))


@pytest.mark.parametrize(
    ("sharded", "vram", "status", "words"),
    [
        (True, None, 0, ["r needs cards of 11.05 GiB, AdamW of 41.35 GiB. Which they are: give --vram 4090, or 24GB"]),
        (False, "24GB", 0, ["r fits: it needs 11.05 GiB of 23.50 GiB of each card. AdamW does not fit: 41.35 GiB."]),
        (True, "48GB", 0, ["r fits: it needs 11.05 GiB of 47.04 GiB of each card. AdamW fits: 41.35 GiB."]),
        (True, "8GB", 1, ["r does not fit: it needs 11.05 GiB of 7.50 GiB of each card. AdamW does not fit"]),
    ],
)
def test_a_person_reads_tables_of_80_columns_and_a_verdict(
    sharded: bool,
    vram: str | None,
    status: int,
    words: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(command, "plan_processes", lambda *args, vram, **more: a_plan(sharded=sharded, vram=vram))
    options = ["--vram", vram] if vram else []
    flags = ["--num_processes", "8", *(["--sharded"] if sharded else []), *options]
    assert main(["plan", "--model_name_or_path", "r", *flags]) == status
    shown = capsys.readouterr().out
    rows = [line.replace("│", " ").split() for line in shown.splitlines()]
    assert ["weights", "5.00", "20.00", "calculated"] in rows
    assert ["activations,", "temporaries", "5.00", "20.00", "planned", "for", "one"] in rows
    assert ["a", "rank", "10.00", "40.00"] in rows
    assert ["a", "card", "needs", "11.05", "41.35"] in rows
    assert ["all-reduce", "2.00", "16.00", "calculated"] in rows
    assert ["sent", "by", "a", "rank", "2.00", "16.00", "by", "a", "ring"] in rows
    tables = [line for line in shown.splitlines() if line and line[0] in "┏┃┡│├└"]
    assert len(tables) > 10
    assert max(map(len, tables)) <= 80
    expected = [*words, f"r on 8 processes under {'FSDP2' if sharded else 'DDP'}", "A note.", "3.00 GiB of payload"]
    assert [word for word in expected if word not in shown] == []
    assert ("Low-rank gradients are exchanged, and no whole ones." in shown) == (not sharded)


# ---- mistakes: one line, exit status 2

MISTAKES = {
    "none at all": (["--num_processes", "0"], "--num_processes 0: num_processes has to be at least 1, but is 0"),
    "fewer than none": (["--num_processes=-2"], "has to be at least 1, but is -2"),
    "no number": (["--num_processes", "two"], "a number of processes, each with a card, such as 8, but is 'two'"),
    "half a number": (["--num_processes", "2.5"], "but is '2.5'"),
    "without a value": (["--num_processes", "--sharded"], "--num_processes needs a number, as --num_processes 8"),
    "one that is sharded": (
        ["--num_processes", "1", "--sharded"],
        "needs at least 2 processes, but num_processes is 1",
    ),
    "sharded over what": (["--sharded"], "--sharded needs --num_processes N"),
    "a value for sharded": (["--num_processes", "2", "--sharded=true"], "--sharded takes no value"),
    "with a picture": (["--num_processes", "2", "--plot", "a.png"], "--plot is about one process"),
    "with suggestions": (["--num_processes", "2", "--suggest", "--vram", "8"], "--suggest is about one process"),
}


@pytest.mark.parametrize(("options", "words"), MISTAKES.values(), ids=list(MISTAKES))
def test_a_mistake_is_one_line(
    options: list[str], words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuses(*args: Any, **kwargs: Any) -> ProcessesPlan:
        raise AssertionError("it planned before it looked at what was given")

    monkeypatch.setattr(command, "plan_processes", refuses)
    assert main(["plan", "--model_name_or_path", "m", *options]) == 2
    shown = capsys.readouterr()
    (line,) = shown.err.splitlines()
    assert line.startswith("hf-galore plan: ")
    assert words in line
    assert shown.out == ""


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("exchange=dense", "exchange=dense does not go with parameters that FSDP2 shards"),
        ("refresh=svd", "take subspace or randomized"),
    ],
)
def test_what_the_optimizer_would_refuse_is_not_planned(
    option: str, words: str, recipe: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--num_processes", "2", "--sharded", f"--optim_args=rank=8, {option}"]
    assert main(["plan", "--config", recipe, *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line


def test_what_ddp_exchanges_is_an_option(recipe: str) -> None:
    found = printed_json(
        ["plan", "--config", recipe, "--json", "--num_processes=2", "--optim_args=rank=8, projected_backward=false"]
    )
    assert found["exchange"] == "dense"
    asked = printed_json(
        ["plan", "--config", recipe, "--json", "--num_processes=2", "--optim_args=rank=8, exchange=low_rank"]
    )
    assert asked["exchange"] == "low_rank"


def test_python_says_so_too() -> None:
    with pytest.raises(ValueError, match="num_processes has to be at least 1, but is 0"):
        plan_processes("quickstart.yaml", 0)


# ---- what the docs show


@needs_fused_head
@pytest.mark.slow
def test_the_docs_show_what_is_printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The tables under FSDP2, and the figures under DDP, from one plan of the recipe and one of AdamW."""
    page, ranks = (DOCS / "memory.md").read_text("utf-8"), dict[tuple[str, bool], RankPlan]()

    def look(trainer: Trainer, record: Record) -> None:
        for sharded in (False, True):
            found = rank_plan(trainer, record, 8, sharded=sharded)
            ranks[found.optim, sharded] = found

    name = "llama3_8b_oasst2.yaml"
    for overrides in ([], ["--optim", ADAMW]):
        plan_recipe(recipes_folder() / name, overrides=overrides, look=look)
    monkeypatch.setenv("COLUMNS", "80")
    run, adamw = (ranks[optim, True] for optim in ("galore_adamw_8bit_layerwise", ADAMW))
    show_processes(ProcessesPlan(run.devices, run, adamw, 0, None, None, 0.0), name, "")
    shown = capsys.readouterr().out.partition("The recipe's optimizer is")[0]
    assert shown in page
    run, adamw = (ranks[optim, False] for optim in ("galore_adamw_8bit_layerwise", ADAMW))
    reduced, gradients = (plan.payload["all-reduce"] / GIB for plan in (run, adamw))
    more = (sum(run.payload.values()) - run.payload["all-reduce"]) / GIB
    for figure in (
        f"needs {adamw.needed_bytes / GIB:.1f} GiB of each card",
        f"buckets for it: {run.needed_bytes / GIB:.1f} GiB",
        f"not G: {reduced:.1f} GiB a step here instead of {gradients:.1f}.",
        f"over the gap that is {more:.1f} GiB a step",
    ):
        assert figure in " ".join(page.split()), figure
