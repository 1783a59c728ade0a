"""One job of a bench: what is trained by whom, with random weights and tokens, and what a process leaves that fails."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bitsandbytes.optim.adamw import AdamW
from bitsandbytes.optim.optimizer import GlobalOptimManager
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaForCausalLM
from transformers.trainer_pt_utils import LayerWiseDummyOptimizer

import hf_galore
from hf_galore.bench import machine, markdown, processes, worker
from hf_galore.bench.jobs import (
    ADAMW_8BIT,
    GALORE,
    OUT_OF_MEMORY,
    SMALL_LAYERS,
    SMALL_RANK,
    TRAINERS_OWN,
    WARM_UP,
    Contender,
    Failed,
    Job,
    Look,
    Measured,
)
from hf_galore.cli.main import main
from hf_galore.int8 import Int8Weight
from hf_galore.integrations.accelerate import unwrapped
from hf_galore.integrations.int8_layers import layers_in_int8
from hf_galore.integrations.random_weights import random_weights
from hf_galore.optim import GaLoreAdamW8bit
from hf_galore.recipes import configs_folder

RECIPE = ("--config", "llama2_7b_oasst2.yaml")


def job(**options: Any) -> Job:
    return Job(**{"task": "train", "arguments": RECIPE, "small": True, "steps": 1, **options})


@pytest.fixture
def trainers(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The trainers of the jobs that are done in this process, in which the names are registered afterwards."""
    # It remembers parameters by their addresses, for good, and each job has a process of its own else.
    monkeypatch.setattr(GlobalOptimManager, "_instance", None)
    seen: list[Any] = []
    figures = worker._figures

    def noted(trainer: Any, *others: Any) -> Any:
        seen.append(trainer)
        return figures(trainer, *others)

    monkeypatch.setattr(worker, "_figures", noted)
    yield seen
    hf_galore.register()


# ---- what is trained


@pytest.mark.parametrize(
    ("contender", "optimizer"),
    [(GALORE, GaLoreAdamW8bit), (ADAMW_8BIT, AdamW), (TRAINERS_OWN, LayerWiseDummyOptimizer)],
)
def test_each_contender_trains_with_its_own_optimizer(
    contender: Contender, optimizer: type, trainers: list[Any]
) -> None:
    found = worker.result_of(job(contender=contender, arguments=(*RECIPE, "--learning_rate", "0.1")))
    assert isinstance(found, Measured)
    (trainer,) = trainers
    assert type(unwrapped(trainer.optimizer)) is optimizer
    assert len(found.seconds) == len(found.losses) == WARM_UP + 1
    assert found.tokens_per_step == 32
    assert all(map(math.isfinite, found.losses))
    assert (found.allocated, found.outside_torch) == (None, None)  # no card, no memory
    assert (found.first_refreshes is not None) == (contender == GALORE)
    assert trainer.model.model.layers[0].mlp.up_proj.weight.abs().max() > 0.2  # made with a deviation of 0.02


def test_weights_in_8_bits_are_made_so_and_others_are_beside_them_in_16(trainers: list[Any]) -> None:
    recipe = (*RECIPE, "--weight_bits", "8", "--learning_rate", "0.1")
    assert isinstance(worker.result_of(job(arguments=recipe)), Measured)
    assert isinstance(worker.result_of(job(contender=ADAMW_8BIT, arguments=recipe)), Measured)
    ours, other = (trainer.model for trainer in trainers)
    assert len(layers_in_int8(ours)) == 7 * SMALL_LAYERS
    assert ours.hf_quantizer.is_qat_trainable
    assert not layers_in_int8(other)
    weight = ours.model.layers[0].mlp.up_proj.weight.dequantized()
    assert weight.abs().max() > 0.2  # made with a deviation of 0.02
    assert torch.equal(ours.model.rotary_emb.inv_freq, other.model.rotary_emb.inv_freq)


def test_the_trainers_own_is_not_told_of_a_scale_that_it_does_not_know(trainers: list[Any]) -> None:
    found = worker.result_of(
        job(contender=TRAINERS_OWN, arguments=(*RECIPE, "--optim_args", "rank=16, scale=auto, rule=muon"))
    )
    assert isinstance(found, Measured)
    assert trainers[0].args.optim_args == "rank=16, update_proj_gap=200, proj_type=std"


def test_tokens_are_random_and_the_layers_those_that_were_asked_for(trainers: list[Any]) -> None:
    """Equal tokens would have gradients of rank 1, and a refresh other work to do."""
    worker.result_of(job(layers=1, rank=8))
    (trainer,) = trainers
    assert len(trainer.model.model.layers) == 1
    rows = trainer.train_dataset["input_ids"]
    assert len(rows) == 2 * (WARM_UP + 1)
    assert len({token for row in rows for token in row}) > 50
    assert {target.rank for target in unwrapped(trainer.optimizer).targets()} == {8}


def test_the_trainers_own_is_spared_its_svds_or_not(trainers: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[tuple[int, ...]] = []
    svd = torch.linalg.svd

    def counted(matrix: torch.Tensor, **options: Any) -> Any:
        called.append(matrix.shape)
        return svd(matrix, **options)

    monkeypatch.setattr(torch.linalg, "svd", counted)
    assert isinstance(worker.result_of(job(contender=TRAINERS_OWN)), Measured)
    assert not called
    hf_galore.register()
    assert isinstance(worker.result_of(job(contender=TRAINERS_OWN, svd=True)), Measured)
    assert len(called) == 7 * SMALL_LAYERS


def test_weights_are_made_and_nothing_is_loaded() -> None:
    """The folder has a config and no weights."""
    folder = configs_folder() / "llama_60m"
    with random_weights(torch.device("meta")):
        model = LlamaForCausalLM.from_pretrained(folder, dtype="bfloat16", device_map="auto")
    assert isinstance(model, LlamaForCausalLM)
    assert {(param.dtype, param.device.type) for param in model.parameters()} == {(torch.bfloat16, "meta")}
    with pytest.raises(OSError, match="no file named"):
        LlamaForCausalLM.from_pretrained(folder)


def test_weights_in_8_bits_are_never_floats() -> None:
    folder = configs_folder() / "llama_60m"
    made: list[torch.Size] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            tensors = [one for one in torch.utils._pytree.tree_leaves(out) if type(one) is torch.Tensor]
            made.extend(one.shape for one in tensors if one.is_floating_point() and one.device.type == "cpu")
            return out

    with random_weights(torch.device("cpu")), Watch():
        model = LlamaForCausalLM.from_pretrained(folder, dtype="bfloat16", quantization_config=hf_galore.Int8Config())
    weights = [param for param in model.parameters() if isinstance(param, Int8Weight)]
    assert len(weights) == 7 * model.config.num_hidden_layers
    assert {param.device.type for param in model.parameters()} == {"cpu"}
    assert made
    assert {weight.shape for weight in weights}.isdisjoint(made)
    assert all(0.015 < weight.dequantized().float().std() < 0.025 for weight in weights)
    assert model.model.embed_tokens.weight.detach().float().std().item() == pytest.approx(0.02, rel=0.05)
    assert (model.model.norm.weight == 1).all()


def test_a_look_says_what_there_is() -> None:
    found = worker.result_of(job(task="look", arguments=(*RECIPE, "--max_grad_norm", "1")))
    assert isinstance(found, Look)
    assert (found.device, found.layers, found.rank, found.rows, found.max_length) == (
        "cpu",
        SMALL_LAYERS,
        SMALL_RANK,
        2,
        16,
    )
    assert found.clips
    assert found.weight_bits == 16
    in_8_bits = worker.result_of(job(task="look", arguments=(*RECIPE, "--weight_bits", "8")))
    assert isinstance(in_8_bits, Look)
    assert in_8_bits.weight_bits == 8
    assert found.versions["torch"] == torch.__version__
    if not torch.cuda.is_available():
        whole = worker.result_of(job(task="look", small=False))
        assert isinstance(whole, Look)
        assert (whole.device, whole.layers, whole.rank, whole.model) == (None, 32, 1024, "meta-llama/Llama-2-7b-hf")


# ---- a card, as torch tells of it


def test_what_a_card_had_to_give(trainers: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(worker.result_of(job()), Measured)
    counts = {"max_memory_allocated": 3, "max_memory_reserved": 5, "memory_allocated": 2, "memory_reserved": 4}
    for name, count in counts.items():
        monkeypatch.setattr(torch.cuda, name, lambda count=count: count)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (90, 100))
    watch = worker.StepWatch(on_card=False)
    found = worker._figures(trainers[0], watch, 32, [], True)
    assert (found.allocated, found.reserved, found.resident, found.outside_torch) == (3, 5, 2, 6)


def test_a_smaller_card_is_a_part_of_this_one(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[float] = []
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=80))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", given.append)
    worker._limit_memory(20)
    worker._limit_memory(100)
    assert given == [0.25, 1.0]


@pytest.mark.skipif(os.name == "nt", reason="a shell script stands in for nvidia-smi")
@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("580.1, 450.00 W", ("580.1", "450.00 W")),
        ("580.1, [N/A]", ("580.1", None)),
        ("", (None, None)),
    ],
)
def test_the_driver_is_what_nvidia_smi_says_of_this_card(
    said: str, expected: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its identity: numbers are counted differently."""
    script = tmp_path / "nvidia-smi"
    script.write_text(f'#!/bin/sh\n[ "$1" = --id=GPU-abc ] && echo "{said}"\n', encoding="utf-8")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="abc"))
    assert machine.driver() == expected


# ---- what fails


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["--config", "llama2_7b_oasst2_adamw.yaml"],
            "the recipe's optim is adamw_torch, but hf-galore bench measures",
        ),
        (["--config", "pretrain/llama_60m_c4.yaml"], "hf-galore bench takes those of hf-galore sft"),
        (["--config", "nowhere.yaml"], "there is no such file"),
        ([*RECIPE, "--optin", "x"], "there is no option --optin"),
        ([*RECIPE, "--optim_args", "rank=0"], "rank has to be an integer of at least 1"),
    ],
)
def test_mistakes_are_results_in_words(arguments: list[str], words: str) -> None:
    found = worker.result_of(job(task="look", small=False, arguments=tuple(arguments)))
    assert isinstance(found, Failed)
    assert found.mistake
    assert words in found.reason


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\n 12 MiB"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_running_out_of_memory_is_a_result(error: RuntimeError, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any) -> None:
        raise error

    monkeypatch.setattr(worker, "measured", fails)
    assert worker.result_of(job()) == Failed(OUT_OF_MEMORY, " ".join(str(error).split()))


def test_a_bug_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any) -> None:
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(worker, "measured", fails)
    with pytest.raises(RuntimeError, match="shapes differ"):
        worker.result_of(job())


@pytest.mark.skipif(os.name == "nt", reason="a shell script stands in for Python")
@pytest.mark.parametrize(
    ("script", "expected"),
    [
        (
            "echo before; echo 'RuntimeError: shapes differ' >&2; exit 3",
            Failed("failed with exit status 3", "RuntimeError: shapes differ"),
        ),
        ("kill -9 $$", Failed(f"{OUT_OF_MEMORY}, the machine's own, it seems: the process was killed")),
    ],
)
def test_a_process_that_dies_leaves_its_last_words(
    script: str, expected: Failed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    assert processes.run(job()) == expected


def test_processes_have_one_card_and_segments_that_grow() -> None:
    made = processes.environment({"HOME": "/home", "CUDA_VISIBLE_DEVICES": "2,3"})
    assert made["CUDA_VISIBLE_DEVICES"] == "2"
    assert made["HOME"] == "/home"
    if os.name != "nt":
        assert made["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    # Whoever has told the allocator something is heard.
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        told = processes.environment({name: "max_split_size_mb:64"})
        assert {key: value for key, value in told.items() if key.startswith("PYTORCH")} == {
            name: "max_split_size_mb:64"
        }


# ---- all of it


@pytest.mark.slow
def test_a_small_bench_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "figures.json"
    small = ["bench", "--small", "--layers", "1", "--rounds", "1", "--steps", "1"]
    assert main([*small, "--json", str(file), "--markdown"]) == 0
    lines = capsys.readouterr().out.splitlines()
    found = json.loads(file.read_text(encoding="utf-8"))
    assert [row["contender"] for row in found["rows"]] == [GALORE, ADAMW_8BIT, TRAINERS_OWN]
    assert [row["failed"] for row in found["rows"]] == [None] * 3
    assert all(row["seconds_per_step"] > 0 for row in found["rows"])
    assert {row["allocated_bytes"] for row in found["rows"]} == {None}
    assert found["rows"][1]["ratio_to_adamw_8bit"] == 1
    assert len(lines) == 3
    for line, row in zip(lines, found["rows"], strict=True):
        cells = dict(zip(markdown.COLUMNS, (cell.strip() for cell in line.strip("|").split("|")), strict=True))
        assert cells["card"] == "measured on CPU, a tiny Llama"
        assert float(cells["s / step"]) == pytest.approx(row["seconds_per_step"], abs=1e-3)
        assert cells["allocated GiB"] == cells["planned GiB"] == ""
