"""What a card makes of GaLore at 7B's shapes, taken apart: its kernels, launches and libraries, as text and JSON.

    python -m tests.benchmarks.gpu                    # all tables
    python -m tests.benchmarks.gpu --only refresh launches
    HF_GALORE_CARD=cpu python -m tests.benchmarks.gpu # small sizes on a CPU, to try it out

`bench`: what `hf-galore bench` prints, the recipe's steps and memory beside other optimizers'. Weights and tokens are
random everywhere. `options`: a steady step of four layers with what the options add, by turns. `outside`: what of the
card is taken beside what torch's allocator reserves. `card`: what it copies and multiplies, for comparison. `int8`:
what is done with a weight in 8 bits, by our kernels and in plain torch, beside one in bfloat16. `refresh`: new bases of
one matrix, by the card's own clock, and what orthonormalises them. `launches`: kernels a layer in a steady step.
`host`: the same step of narrow layers, so that the time is the host's. Both are of a Llama with Llama-2-7B's layers, 16
sequences of 256 tokens, activations checkpointed, rank 1024.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from hf_galore.bench.jobs import Job
from hf_galore.bench.session import begin, look_at, measure
from hf_galore.cli.bench import show
from hf_galore.int8 import Int8Weight, add_int8_, int8_linear, times_weight
from hf_galore.kernels import where
from hf_galore.lowrank.orthonormal import by_products, by_reflections, defect
from hf_galore.lowrank.projection import Side, side_of
from hf_galore.lowrank.quantize import dequantize_basis, quantize_basis
from hf_galore.lowrank.refresh import new_bases
from hf_galore.lowrank.rounding import add_rounded_
from hf_galore.optim import GaLoreAdamW8bit
from tests.support.card import (
    DEVICE,
    ON_CARD,
    RECIPE,
    SMALL,
    SMALL_RANK,
    llama,
    options_of,
    seconds_of,
    sized,
    tokens,
)

TABLES = (
    "bench",
    "options",
    "outside",
    "card",
    "int8",
    "refresh",
    "launches",
    "host",
)  # first what is to have the card to itself
RANK = sized(1024, SMALL_RANK)
ROWS, LENGTH = sized((16, 256), (2, 16))
MATRICES: tuple[tuple[int, int], ...] = sized(((4096, 4096), (11008, 4096), (4096, 11008)), ((64, 64), (256, 64)))
NEVER = 10**6

Build = Callable[[nn.Module], torch.optim.Optimizer]


def adamw_8bit(model: nn.Module) -> torch.optim.Optimizer:
    from bitsandbytes.optim.adamw import AdamW8bit

    return cast("torch.optim.Optimizer", AdamW8bit(model.parameters(), lr=1e-5, weight_decay=0.0))


def galore(
    layerwise: bool = True,
    rank: int = RANK,
    gap: int = 200,
    weight_decay: float = 0.0,
    hold_gradients: bool = False,
    **options: Any,
) -> Build:
    """A GaLoreAdamW8bit; options are those of a group."""

    def build(model: nn.Module) -> torch.optim.Optimizer:
        return GaLoreAdamW8bit(
            model.parameters(),
            lr=1e-5,
            weight_decay=weight_decay,
            param_options=options_of(model, rank, update_proj_gap=gap, scale=2.0, **options),
            module=model,
            layerwise=layerwise,
            hold_gradients=hold_gradients,
        )

    return build


class Training:
    """A model and its optimizer, and a step of both."""

    def __init__(self, layers: int, build: Build, rows: int = ROWS, length: int = LENGTH, **overrides: Any) -> None:
        self.model = llama(layers, **overrides)
        self.model.gradient_checkpointing_enable()
        self.model.train()
        self.ids = tokens(self.model, rows, length)
        self.optimizer = build(self.model)

    def step(self) -> None:
        self.model(input_ids=self.ids, labels=self.ids).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.model.zero_grad()  # where the optimizer has none of its parameters


def freed() -> None:
    gc.collect()
    if ON_CARD:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def milliseconds(function: Callable[[], object], rounds: int = 10) -> float:
    """The median time on the device, after a warm-up."""
    function()
    times = []
    for _ in range(rounds):
        if not ON_CARD:
            times.append(seconds_of(function) * 1000)
            continue
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


# ---- the tables


def bench(args: argparse.Namespace) -> dict[str, Any]:
    """All of `hf-galore bench`, which prints its own tables."""
    job = Job(task="look", arguments=("--config", RECIPE.name), small=not ON_CARD)
    look = look_at(job)
    if look.device is None:
        return {"failed": "torch sees no GPU"}
    report = begin(look, job)
    measure(report, job)
    show(report, Console(width=150))
    return report.as_dict()


def options(args: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of a step of four layers, medians of rounds in which all have their turn."""
    builds: dict[str, Build] = {
        "bitsandbytes AdamW8bit": adamw_8bit,
        "layerwise": galore(gap=NEVER),
        "layerwise, norm_probes=0": galore(gap=NEVER, norm_probes=0),
        "layerwise, held": galore(gap=NEVER, hold_gradients=True),
        "layerwise, held, norm_probes=0": galore(gap=NEVER, hold_gradients=True, norm_probes=0),
        "layerwise, residual=fira": galore(gap=NEVER, residual="fira"),
        "layerwise, residual=sign": galore(gap=NEVER, residual="sign"),
        "layerwise, scaling=channel": galore(gap=NEVER, scaling="channel"),
        "layerwise, scaling=tensor, rank 1": galore(gap=NEVER, rank=1, scaling="tensor"),
        "layerwise, rule=muon": galore(gap=NEVER, rule="muon"),
        "layerwise, rule=muon, residual=muon": galore(gap=NEVER, rule="muon", residual="muon"),
        "layerwise, rule=muon, residual=normuon, residual_bits=8": galore(
            gap=NEVER, rule="muon", residual="normuon", residual_bits=8
        ),
    }
    trainings = {name: Training(4, build) for name, build in builds.items()}
    times: dict[str, list[float]] = {name: [] for name in trainings}
    for training in trainings.values():
        for _ in range(2):
            training.step()
    for _ in range(args.rounds):
        for name, training in trainings.items():
            times[name].append(seconds_of(training.step) * 1000)
    first = statistics.median(times["layerwise"])
    medians = {name: statistics.median(some) for name, some in times.items()}
    return {name: {"ms a step": median, "× layerwise": median / first} for name, median in medians.items()}


def outside(args: argparse.Namespace) -> dict[str, Any]:
    """MiB that are there after each, in this process if the card is ours alone."""
    if not ON_CARD:
        return {}
    found = {}
    matrix = torch.randn(1024, 256, device=DEVICE)
    for name, function in {
        "CUDA's context": lambda: None,
        "and cuBLAS": lambda: matrix.mT @ matrix,
        "and cuSOLVER's QR": lambda: torch.linalg.qr(matrix),
    }.items():
        seconds = seconds_of(function)
        free, total = torch.cuda.mem_get_info()
        found[f"{name}, MiB"] = (total - free - torch.cuda.memory_reserved()) / 2**20
        found[f"{name}, s at first"] = seconds
    return found


def card(args: argparse.Namespace) -> dict[str, Any]:
    size = sized(8192, 256)
    a, b = (torch.randn(size, size, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    block = torch.empty(sized(2**30, 2**20), dtype=torch.uint8, device=DEVICE)
    other = torch.empty_like(block)
    return {
        "copy, GB/s": 2 * block.numel() / milliseconds(lambda: other.copy_(block)) / 1e6,
        "bf16 product, TFLOP/s": 2 * size**3 / milliseconds(lambda: a @ b) / 1e9,
        "float32 product, TFLOP/s": 2 * size**3 / milliseconds(lambda: a.float() @ b.float(), 3) / 1e9,
    }


def int8(args: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds for each matrix of a 7B layer: forward, the input's gradient, an update, and what all do: read."""
    return {
        f"{m} × {n}, {name}": beside_bfloat16(*both)
        for m, n in MATRICES
        for name, both in uses_of_a_weight(m, n).items()
    }


def uses_of_a_weight(m: int, n: int) -> dict[str, tuple[Callable[[], object], Callable[[], object]]]:
    """Each in bfloat16, and in 8 bits."""
    weight = (0.02 * torch.randn(m, n, device=DEVICE)).bfloat16()
    blocks = Int8Weight.from_float(weight)
    x, delta = (torch.randn(ROWS * LENGTH, size, device=DEVICE).bfloat16() for size in (n, m))
    update = torch.randn(m, n, device=DEVICE).bfloat16()
    generator = torch.Generator(DEVICE).manual_seed(0)
    how: dict[str, Any] = {"alpha": -1e-6, "decay": 0.999, "skip": None, "generator": generator}
    return {
        "forward": (lambda: x @ weight.mT, lambda: int8_linear(x, blocks.blocks, None)),
        "forward of a token": (lambda: x[:1] @ weight.mT, lambda: int8_linear(x[:1], blocks.blocks, None)),
        "input's gradient": (lambda: delta @ weight, lambda: times_weight(delta, blocks.blocks)),
        "update, rounded at random": (
            lambda: add_rounded_(weight, update.__getitem__, **how),
            lambda: add_int8_(blocks, update.__getitem__, **how),
        ),
        "read": (lambda: weight.clone(), lambda: blocks.dequantized()),
    }


def beside_bfloat16(in_bfloat16: Callable[[], object], in_8_bits: Callable[[], object]) -> dict[str, float]:
    bfloat16, ours = milliseconds(in_bfloat16), milliseconds(in_8_bits)
    with mock.patch.object(where, "_look", return_value=False):
        plain = milliseconds(in_8_bits)
    return {
        "bf16 ms": bfloat16,
        "int8 ms": ours,
        "int8, plain torch ms": plain,
        "× bf16": ours / bfloat16,
        "plain × bf16": plain / bfloat16,
    }


def refresh(args: argparse.Namespace) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for shape in MATRICES:
        gradient = torch.randn(shape, device=DEVICE).bfloat16()
        side: Side = side_of(shape, "std")
        old = new_bases(gradient, side, RANK, "subspace", None)
        basis = old.left if old.left is not None else old.right
        assert basis is not None
        kept = quantize_basis(basis, 4, torch.bfloat16)
        found[f"refresh {shape[0]} × {shape[1]}, ms"] = milliseconds(
            lambda gradient=gradient, side=side, old=old: new_bases(gradient, side, RANK, "subspace", old)  # type: ignore[misc]
        )
        found[f"basis of {shape[0]} × {shape[1]} out of 4 bits, ms"] = milliseconds(
            lambda kept=kept, shape=tuple(basis.shape): dequantize_basis(kept, shape, 4, torch.bfloat16)  # type: ignore[misc]
        )
    tall = torch.randn(MATRICES[0][0], RANK, device=DEVICE)
    found["QR, ms"] = milliseconds(lambda: by_reflections(tall))
    for runs in (2, 3):
        found[f"Cholesky QR, {runs} runs, ms"] = milliseconds(lambda runs=runs: by_products(tall.clone(), runs))  # type: ignore[misc]
        found[f"Cholesky QR, {runs} runs, defect as a share of what is allowed"] = defect(
            by_products(tall.clone(), runs)
        ).item()
    found["the check of a basis, ms"] = milliseconds(lambda: defect(tall))
    found["4 bits of a basis, ms"] = milliseconds(lambda: quantize_basis(tall, 4, torch.bfloat16))
    square = torch.randn(MATRICES[0], device=DEVICE)
    found["full SVD, ms"] = seconds_of(lambda: torch.linalg.svd(square, full_matrices=False)) * 1000
    return found


def launches(args: argparse.Namespace) -> dict[str, Any]:
    """Of a layer: the difference between models of two and of one."""
    found: dict[str, Any] = {}
    contenders: dict[str, Build] = {
        "no optimizer": lambda model: torch.optim.SGD([nn.Parameter(torch.zeros(1, device=DEVICE))]),
        "bitsandbytes AdamW8bit": adamw_8bit,
        "GaLoreAdamW8bit, layerwise": galore(gap=NEVER),
        "GaLoreAdamW8bit, layerwise, decayed": galore(gap=NEVER, weight_decay=0.01),
        "GaLoreAdamW8bit, plain": galore(layerwise=False, gap=NEVER),
    }
    for name, build in contenders.items():
        counted = []
        for layers in (1, 2):
            freed()
            training = Training(layers, build)
            for _ in range(2):
                training.step()
            counted.append(counted_kernels(training))
            del training
        found[name] = {
            "launches a layer": counted[1][0] - counted[0][0],
            "device ms a layer": counted[1][1] - counted[0][1],
        }
    return found


def counted_kernels(training: Training) -> tuple[int, float]:
    """The kernels of one step, copies and fills included, and their time on the device."""
    from torch.profiler import ProfilerActivity, profile

    activity = ProfilerActivity.CUDA if ON_CARD else ProfilerActivity.CPU
    with profile(activities=[activity]) as profiler:
        seconds_of(training.step)
    kernels = [event for event in profiler.events() or () if "cuda" in str(event.device_type).lower() or not ON_CARD]
    return len(kernels), sum(event.device_time_total for event in kernels) / 1000


def host(args: argparse.Namespace) -> dict[str, Any]:
    builds = {
        "bitsandbytes AdamW8bit": adamw_8bit,
        "GaLoreAdamW8bit, layerwise": galore(rank=64, gap=NEVER),
        "GaLoreAdamW8bit, layerwise, decayed": galore(rank=64, gap=NEVER, weight_decay=0.01),
    }
    return {name: {"host ms a layer": host_ms_a_layer(build, args.rounds)} for name, build in builds.items()}


def host_ms_a_layer(build: Build, rounds: int) -> float:
    """The milliseconds a layer where the device has next to nothing to do."""
    narrow = {**SMALL, "hidden_size": 256, "intermediate_size": 688}
    middle = []
    for layers in (4, 12):
        freed()
        training = Training(layers, build, rows=1, length=16, **narrow)
        for _ in range(3):
            training.step()
        middle.append(statistics.median(seconds_of(training.step) for _ in range(rounds)))
    return (middle[1] - middle[0]) / 8 * 1000


# ---- what is printed


def shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return "" if value is None else str(value)


def print_table(title: str, figures: dict[str, Any], console: Console) -> None:
    if figures and all(isinstance(row, dict) for row in figures.values()):
        columns = list(dict.fromkeys(key for row in figures.values() for key in row))
        table = Table("", *columns, title=title)
        for name, row in figures.items():
            table.add_row(name, *(shown(row.get(column)) for column in columns))
    else:
        table = Table("", "", title=title)
        for name, value in figures.items():
            table.add_row(name, shown(value))
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--only", nargs="+", choices=TABLES, default=TABLES)
    parser.add_argument("--json", type=Path, help="a file for the figures")
    args = parser.parse_args()
    console = Console(width=150)
    figures: dict[str, Any] = {}
    functions = {table.__name__: table for table in (bench, options, outside, card, int8, refresh, launches, host)}
    for name in (name for name in TABLES if name in args.only):
        if name != "bench":
            freed()
        try:
            figures[name] = functions[name](args)
        except Exception as error:  # one table less is no reason to lose the others
            figures[name] = {"failed": f"{type(error).__name__}: {error}"}
        if name != "bench" or "failed" in figures[name]:
            print_table(name, figures[name], console)
        if args.json is not None:
            args.json.write_text(json.dumps(figures, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
