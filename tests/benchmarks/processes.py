"""One training step of several processes, side by side: AdamW and GaLore, under DDP and under FSDP2.

    python -m tests.benchmarks.processes                                # 2 processes
    python -m tests.benchmarks.processes --hidden 512 --tokens 512 --rounds 4

Every row trains its own copy of one Llama in float32, each process on its own batch, over gloo on this machine. In each
round each takes one step (no refresh), so that the machine's moods hit all alike; printed are the median seconds, and
the median over the rounds of the ratio to the step of AdamW under the same engine. *Sent* is the payload of all
collectives of a step in one process, counted. *Peak* is what the first process's resident memory rises to above what it
was before there was a model, in three steps, the first of which makes the bases: each row in processes of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaForCausalLM

from hf_galore import GaLoreAdamW, GaLoreAdamW8bit
from tests.benchmarks.step import llama, targets
from tests.support.wire import CountedBytes

NEVER = 10**9
# The engine, the optimizer, and what makes it of the latter's keywords; `None` for AdamW.
ROWS: dict[tuple[str, str], tuple[type[GaLoreAdamW] | None, dict[str, Any]]] = {
    ("DDP", "AdamW"): (None, {}),
    ("DDP", "GaLore, gradients exchanged"): (GaLoreAdamW, {}),
    ("DDP", "GaLore, low-rank ones exchanged"): (GaLoreAdamW, {"exchange": "low_rank"}),
    ("DDP", "GaLore layerwise"): (GaLoreAdamW, {"layerwise": True}),
    ("DDP", "GaLore layerwise, gradients exchanged"): (
        GaLoreAdamW,
        {"layerwise": True, "projected_backward": False, "exchange": "dense"},
    ),
    ("DDP", "GaLore 8-bit layerwise"): (GaLoreAdamW8bit, {"layerwise": True}),
    ("FSDP2", "AdamW"): (None, {}),
    ("FSDP2", "GaLore"): (GaLoreAdamW, {}),
    ("FSDP2", "GaLore layerwise"): (GaLoreAdamW, {"layerwise": True}),
    ("FSDP2", "GaLore 8-bit layerwise"): (GaLoreAdamW8bit, {"layerwise": True}),
}


def is_used(row: tuple[str, str], args: argparse.Namespace) -> bool:
    return any(text in ", ".join(row) for text in args.only)


def build(row: tuple[str, str], args: argparse.Namespace) -> Callable[[], None]:
    """The function that takes a step."""
    engine, _ = row
    cls, options = ROWS[row]
    net: LlamaForCausalLM = llama(args.hidden, args.layers, vocabulary=2048)
    net.train()
    generator = torch.Generator().manual_seed(distributed.get_rank())
    ids = torch.randint(2048, (args.tokens // 256 or 1, min(args.tokens, 256)), generator=generator)
    if engine == "FSDP2":
        for layer in net.model.layers:
            fully_shard(layer)
        fully_shard(net)
    optimizer = optimizer_for(net, cls, options, args.rank or args.hidden // 8)
    model: Any = net if engine == "FSDP2" else DistributedDataParallel(net)

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def optimizer_for(
    net: nn.Module, cls: type[GaLoreAdamW] | None, options: dict[str, Any], rank: int
) -> torch.optim.Optimizer:
    if cls is None:
        return torch.optim.AdamW(net.parameters(), lr=1e-4, weight_decay=0.0)
    group = {"rank": rank, "update_proj_gap": NEVER, "scale": 0.25}
    chosen: dict[Tensor, dict[str, Any]] = dict.fromkeys(targets(net), group)
    return cls(net.parameters(), lr=1e-4, weight_decay=0.0, module=net, param_options=chosen, **options)


def resident(field: str) -> int:
    """A figure of this process's memory in bytes."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) * 1024


def times(args: argparse.Namespace) -> dict[str, Any]:
    steps = {row: build(row, args) for row in ROWS if is_used(row, args)}
    sent = {}
    for row, step in steps.items():
        step()  # makes the bases
        with CountedBytes() as counted:
            step()
        sent[row] = sum(counted.bytes.values())
    seconds: dict[tuple[str, str], list[float]] = {row: [] for row in steps}
    for _ in range(args.rounds):
        for row, step in steps.items():
            distributed.barrier()
            start = time.perf_counter()
            step()
            distributed.barrier()
            seconds[row].append(time.perf_counter() - start)
    return {"seconds": list(seconds.items()), "sent": list(sent.items())}


def memory(args: argparse.Namespace) -> dict[str, Any]:
    (row,) = (row for row in ROWS if " | ".join(row) == args.memory)
    # What the libraries take when they first run is nobody's.
    distributed.all_reduce(torch.zeros(1))
    Path("/proc/self/clear_refs").write_text("5")  # the peak is that from now on
    before = resident("VmRSS")
    step = build(row, args)
    for _ in range(3):
        step()
    return {"peak": resident("VmHWM") - before}


def launched(args: argparse.Namespace, *more: str) -> dict[str, Any]:
    """What the first of several processes has found."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "found.json")
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
        command = [*launcher, str(args.processes), "-m", "tests.benchmarks.processes", *sys.argv[1:], *more]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_GALORE_BENCHMARK": str(out)}
        subprocess.run(command, check=True, env=environment)
        found: dict[str, Any] = json.loads(out.read_text())
        return found


def show(args: argparse.Namespace) -> None:
    console = Console(width=110)
    found = launched(args)
    seconds = {tuple(row): values for row, values in found["seconds"]}
    sent = {tuple(row): value for row, value in found["sent"]}
    console.print(
        f"torch {torch.__version__}, {args.processes} processes of 1 thread, gloo, {os.cpu_count()} cores, "
        f"{platform.machine()}; hidden {args.hidden}, {args.layers} layers, rank {args.rank or args.hidden // 8}, "
        f"{args.tokens} tokens a process, float32, {args.rounds} rounds"
    )
    table = Table("engine", "optimizer")
    for header in ("s / step", "× AdamW", "sent MiB", "peak MiB"):
        table.add_column(header, justify="right")
    for row, values in seconds.items():
        control = seconds[row[0], "AdamW"]
        ratio = statistics.median(a / b for a, b in zip(values, control, strict=True))
        peak = launched(args, "--memory", " | ".join(row))["peak"]
        figures = (f"{statistics.median(values):.2f}", f"{ratio:.2f}")
        table.add_row(*row, *figures, f"{sent[row] / 2**20:,.1f}", f"{peak / 2**20:,.0f}")
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=1024, help="hidden size h")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=1024, help="tokens a step and process")
    parser.add_argument("--rank", type=int, help="default: h/8")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", default=[""], help="rows whose name holds one of these")
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    args = parser.parse_args()
    out = os.environ.get("HF_GALORE_BENCHMARK")
    if out is None:
        show(args)
        return
    distributed.init_process_group("gloo")
    found = times(args) if args.memory is None else memory(args)
    if distributed.get_rank() == 0:
        Path(out).write_text(json.dumps(found))
    distributed.barrier()
    sys.stdout.flush()
    # Without taking the group apart: gloo waits for ever now and then where one process is gone before the other.
    os._exit(0)


if __name__ == "__main__":
    main()
