"""The long run: 20,000 steps of a small Llama in each storage of the bases, and what drifts or grows in them.

    python -m tests.benchmarks.long --folder long       # five runs; minutes each on an idle core
    python -m tests.benchmarks.long --folder long       # once more: goes on where it was interrupted
    python -m tests.benchmarks.long --folder long --table

A Llama of one layer of 128 reads the sources of the Python standard library as bytes, 4 × 32 of them a step, from the
same weights and with the same batches in every row; the learning rate follows a cosine with 1 % warmup; gradients are
not clipped. Every target's basis is refreshed every 100 steps, and looked at before its next refresh.

The table has, of each row: the loss on held-out files; steps after which the loss or a weight was not finite; the
processor's time of a step, medians of the first and of the last twentieth of the steps, and how many times the step of
a new optimizer the last ones take, by turns at the end, which other programs on the machine cannot make differ;
resident memory, without what is free in it, and the optimizer's bytes after a twentieth and at the end; and
max |PᵀP − I| over all bases, beside the same of as many random orthonormal bases of the same shapes, stored in the same
bits. What is not as it should be is named below it, and the command ends with 1.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import functools
import itertools
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import psutil  # type: ignore[import-untyped, unused-ignore]
import torch
from torch import Tensor, nn

from hf_galore import GaLoreAdamW, GaLoreAdamW8bit
from hf_galore.lowrank.projection import nonzero_columns
from hf_galore.lowrank.quantize import dequantize_basis, quantize_basis
from tests.benchmarks.quality import standard_library
from tests.benchmarks.step import targets

HIDDEN, LAYERS = 128, 1
ROWS, LENGTH = 4, 32  # of a batch, in bytes
HELD_OUT_ROWS = 256
RANK, SCALE, GAP = 32, 0.25, 100
RATE, WARMUP = 4e-3, 0.01
MARKS = (0.01, 0.1, 0.5, 1.0)


@dataclasses.dataclass(frozen=True)
class Row:
    """What one run is made from."""

    name: str
    cls: type[GaLoreAdamW]
    proj_bits: int
    layerwise: bool = False


TABLE = (
    Row("GaLoreAdamW, 16 bits", GaLoreAdamW, 16),
    Row("GaLoreAdamW, 8 bits", GaLoreAdamW, 8),
    Row("GaLoreAdamW, 4 bits", GaLoreAdamW, 4),
    Row("GaLoreAdamW8bit, 4 bits", GaLoreAdamW8bit, 4),
    Row("GaLoreAdamW8bit, 4 bits, layerwise, projected backward", GaLoreAdamW8bit, 4, layerwise=True),
)


# ---- one run


@functools.cache
def text() -> tuple[Tensor, Tensor]:
    """The standard library's sources, to train on and held out, one byte an element."""
    train, held_out = (bytearray("\n".join(texts).encode()) for texts in standard_library())
    return torch.frombuffer(train, dtype=torch.uint8), torch.frombuffer(held_out, dtype=torch.uint8)


def batch(step: int) -> Tensor:
    """The bytes of a step, (`ROWS`, `LENGTH`)."""
    return _places(text()[0], ROWS, step)


def _places(source: Tensor, rows: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(source) - LENGTH, (rows, 1), generator=generator)
    return source[starts + torch.arange(LENGTH)].long()


@torch.no_grad()
def held_out_loss(model: nn.Module) -> float:
    """The loss on `HELD_OUT_ROWS` rows of files that are not trained on."""
    tokens = _places(text()[1], HELD_OUT_ROWS, 0)
    return float(model(input_ids=tokens, labels=tokens).loss)


def build(row: Row, gap: int) -> tuple[nn.Module, GaLoreAdamW]:
    """A model with the weights that every row starts from, and its optimizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=HIDDEN * 11 // 4,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        vocab_size=256,
        max_position_embeddings=LENGTH,
        use_cache=False,
    )
    model = LlamaForCausalLM(config)
    projected = targets(model)
    chosen = set(map(id, projected))
    rest = [param for param in model.parameters() if id(param) not in chosen]
    options = {"rank": RANK, "update_proj_gap": gap, "scale": SCALE, "proj_bits": row.proj_bits}
    hooks: dict[str, Any] = {"module": model, "layerwise": True} if row.layerwise else {}
    optimizer = row.cls([{"params": rest}, {"params": projected, **options}], lr=RATE, weight_decay=0.0, **hooks)
    return model, optimizer


def rate(step: int, steps: int) -> float:
    """The learning rate of a step, counted from 0."""
    warm = max(1, round(WARMUP * steps))
    return RATE * min((step + 1) / warm, 0.5 * (1 + math.cos(math.pi * step / steps)))


def basis_defect(basis: Tensor) -> float:
    """max |PᵀP − I| over the columns that stand for a direction: of a gradient of a lower rank the others are zero."""
    columns = basis.double()[:, nonzero_columns(basis)]
    gram = columns.mT @ columns
    return float((gram - torch.eye(len(gram), dtype=gram.dtype)).abs().max()) if len(gram) else 0.0


def largest_defect(optimizer: GaLoreAdamW) -> float:
    """The largest of all bases as they are stored."""
    bases = [basis for target in optimizer.targets() for basis in target.bases() if basis is not None]
    return max(map(basis_defect, bases))


def random_defect(shapes: Sequence[Sequence[int]], bits: Any) -> float:
    """The largest of random orthonormal bases of these shapes, in these bits."""
    generator = torch.Generator().manual_seed(0)
    defects = []
    for shape in shapes:
        basis = torch.linalg.qr(torch.randn(*shape, generator=generator)).Q
        kept = quantize_basis(basis, bits, torch.float32)
        defects.append(basis_defect(dequantize_basis(kept, shape, bits, torch.float32)))
    return max(defects)


def optimizer_bytes(optimizer: torch.optim.Optimizer) -> int:
    """The bytes of its state."""
    return sum(value.nbytes for state in optimizer.state.values() for value in state.values())


def resident() -> int:
    """The bytes of this process that are in memory, once the C library has handed back those that are free.

    It keeps what has been freed, or not, by where things happen to lie: after an evaluation up to 70 MB of it.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's; other libraries hand back by themselves
    if trim is not None:
        trim(0)
    return cast("int", psutil.Process().memory_info().rss)


def saved(path: Path, values: dict[str, Any]) -> None:
    """Write a file whole, or not at all."""
    part = path.with_suffix(".part")
    torch.save(values, part)
    os.replace(part, path)


def run(row: Row, steps: int, folder: Path) -> dict[str, Any]:
    """Train, or go on training, and return what was seen; all of it is in a file of `folder` too.

    Returns:
        Tensors with an entry a step (`cpu`, `wall`); lists with one a mark (`losses`) or a look (`defect`, `resident`,
        `bytes`, with the steps in `looks`); `nonfinite` steps, the number of `refreshes`, the steps that the run was
        `resumed` at, a random basis's defect (`random`), the `gap`, and what `times_a_new_one` says (`times_new`).
    """
    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{row.name.replace(' ', '-').replace(',', '')}-{steps}.pt"
    known = torch.load(path, weights_only=True) if path.exists() else None
    if known is not None and known["step"] == steps:
        return cast("dict[str, Any]", known["seen"])
    gap = max(1, min(GAP, steps // 6))
    model, optimizer = build(row, gap)
    seen: dict[str, Any] = {name: torch.zeros(steps) for name in ("cpu", "wall")}
    marks = [max(1, round(mark * steps)) for mark in MARKS]
    seen.update(losses=[], looks=[], defect=[], resident=[], bytes=[], nonfinite=0, resumed=[], gap=gap)
    start = 0
    if known is not None:
        seen, start = known["seen"], known["step"]
        seen["resumed"].append(start)
        model.load_state_dict(known["model"])
        optimizer.load_state_dict(known["optimizer"])
    weights = list(model.parameters())
    text()  # is read before the first step is timed
    for step in range(start, steps):
        cpu, wall = time.process_time(), time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = rate(step, steps)
        loss = take_step(model, optimizer, step)
        seen["cpu"][step], seen["wall"][step] = time.process_time() - cpu, time.perf_counter() - wall
        norms = torch.stack(cast("list[Tensor]", torch._foreach_norm(cast("list[Tensor]", weights))))
        seen["nonfinite"] += not bool(torch.isfinite(norms).all() and torch.isfinite(loss))
        done = step + 1
        if done in marks:
            seen["losses"].append(held_out_loss(model))
        if done % gap == 0 or done in (steps, steps // 20):
            seen["looks"].append(done)
            seen["defect"].append(largest_defect(optimizer))
            seen["resident"].append(resident())
            seen["bytes"].append(optimizer_bytes(optimizer))
        if done % max(1, steps // 20) == 0 and done < steps:
            values = {"step": done, "seen": seen, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
            saved(path, values)
    shapes = [basis.shape for target in optimizer.targets() for basis in target.bases() if basis is not None]
    seen["refreshes"] = int(sum(float(state.get("refreshes", 0)) for state in optimizer.state.values()))
    seen["random"] = random_defect(shapes * (seen["refreshes"] // len(shapes)), row.proj_bits)
    seen["times_new"] = times_a_new_one(row, model, optimizer, steps)
    saved(path, {"step": steps, "seen": seen})
    return seen


def take_step(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> Tensor:
    """Train on the batch of a step, and return its loss."""
    tokens = batch(step)
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return cast("Tensor", loss.detach())


def times_a_new_one(row: Row, model: nn.Module, optimizer: GaLoreAdamW, steps: int) -> float:
    """How many times the step of a new optimizer one of this takes: the median of up to 500 of each, by turns."""
    pairs = [(model, optimizer), build(row, 10**9)]
    for group in itertools.chain.from_iterable(one.param_groups for _, one in pairs):
        group["lr"] = 0.0
        if "update_proj_gap" in group:
            group["update_proj_gap"] = 10**9  # no refresh in between
    ratios = []
    for step in range(min(500, steps)):
        seconds = []
        for one in pairs:
            begin = time.process_time()
            take_step(*one, step)
            seconds.append(time.process_time() - begin)
        ratios.append(seconds[0] / seconds[1])
    return statistics.median(ratios)


# ---- the table


@dataclasses.dataclass(frozen=True)
class Figures:
    """One row of the table."""

    losses: tuple[float, ...]
    """At each of `MARKS`."""
    nonfinite: int
    cpu: tuple[float, float]
    """Seconds of the processor a step, medians of the first and of the last twentieth."""
    wall: tuple[float, float]
    """The same by the clock."""
    resident: tuple[int, int]
    """Bytes, after a twentieth and at the end."""
    state: tuple[int, int]
    """Bytes of the optimizer's state, then."""
    defect: float
    random: float
    refreshes: int
    times_new: float

    @classmethod
    def of(cls, seen: dict[str, Any]) -> Figures:
        """What there is to say of what `run` has seen."""
        part = max(1, len(seen["cpu"]) // 20)

        def ends(values: Tensor) -> tuple[float, float]:
            return float(values[:part].median()), float(values[-part:].median())

        early = seen["looks"].index(part)
        return cls(
            losses=tuple(seen["losses"]),
            nonfinite=seen["nonfinite"],
            cpu=ends(seen["cpu"]),
            wall=ends(seen["wall"]),
            resident=(seen["resident"][early], seen["resident"][-1]),
            state=(seen["bytes"][early], seen["bytes"][-1]),
            defect=max(seen["defect"]),
            random=seen["random"],
            refreshes=seen["refreshes"],
            times_new=seen["times_new"],
        )

    def faults(self) -> list[str]:
        """What is not as it should be."""
        found = []
        if self.nonfinite or not all(map(math.isfinite, self.losses)):
            found.append(f"{self.nonfinite} steps with a number that is not finite, losses {self.losses}")
        if not all(later < earlier for earlier, later in itertools.pairwise(self.losses)):
            found.append(f"the loss does not fall: {self.losses}")
        if self.state[0] != self.state[1]:
            found.append(f"the optimizer's bytes change: {self.state}")
        if self.resident[1] > 1.02 * self.resident[0]:  # of some 500 MB; a sound run takes less than 1 MB more
            found.append(f"resident memory grows: {self.resident}")
        if self.defect > 1.5 * self.random:
            found.append(f"a basis is off by {self.defect:.2g}, where a random one is by {self.random:.2g}")
        if self.times_new > 1.1:
            found.append(f"a step takes {self.times_new:.2f} times a new optimizer's")
        return found


def markdown(rows: Sequence[tuple[Row, Figures]]) -> str:
    """The table, with a column for each run."""

    def milliseconds(figures: Figures) -> str:
        first, last = (1000 * seconds for seconds in figures.cpu)
        return f"{first:.2f} → {last:.2f} ({last / first:.2f})"

    def loss(mark: int) -> Callable[[Figures], str]:
        return lambda figures: f"{figures.losses[mark]:.3f}"

    lines: dict[str, Callable[[Figures], str]] = {
        **{f"held-out loss at {share:.0%} of the steps": loss(mark) for mark, share in enumerate(MARKS)},
        "steps with a number that is not finite": lambda figures: str(figures.nonfinite),
        "processor's ms a step, first → last twentieth": milliseconds,
        "a step at the end ÷ one of a new optimizer": lambda figures: f"{figures.times_new:.2f}",
        "resident MiB, after a twentieth → at the end": lambda figures: _change(figures.resident, 2**20),
        "optimizer's KiB, then": lambda figures: _change(figures.state, 2**10),
        "max \\|PᵀP − I\\|, all bases": lambda figures: f"{figures.defect:.2g}",
        "… of random bases in these bits": lambda figures: f"{figures.random:.2g}",
        "refreshes": lambda figures: f"{figures.refreshes:,}",
    }
    table = [["", *(row.name for row, _ in rows)], ["---"] * (1 + len(rows))]
    table += [[name, *(cell(figures) for _, figures in rows)] for name, cell in lines.items()]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in table)


def _change(sizes: tuple[int, int], unit: int) -> str:
    return " → ".join(f"{size / unit:,.0f}" for size in sizes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="for the runs, finished or not, and table.md")
    parser.add_argument("--steps", type=int, default=20_000)
    names = [row.name for row in TABLE]
    parser.add_argument("--only", nargs="+", choices=names, metavar="ROW", help=f"of: {'; '.join(names)}")
    parser.add_argument("--table", action="store_true", help="only the rows that are finished")
    args = parser.parse_args()
    figures: list[tuple[Row, Figures]] = []
    faults: list[str] = []
    for row in (row for row in TABLE if args.only is None or row.name in args.only):
        path = args.folder / f"{row.name.replace(' ', '-').replace(',', '')}-{args.steps}.pt"
        if args.table and not (path.exists() and torch.load(path, weights_only=True)["step"] == args.steps):
            continue
        found = Figures.of(run(row, args.steps, args.folder))
        figures.append((row, found))
        faults += [f"{row.name}: {fault}" for fault in found.faults()]
    versions = f"torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}"
    table = f"{markdown(figures)}\n\n{args.steps:,} steps, rank {RANK} of {HIDDEN}; {versions}, one thread\n"
    (args.folder / "table.md").write_text(table)
    print(table)
    print("\n".join(faults) or "Nothing grows, drifts or is not finite.")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
