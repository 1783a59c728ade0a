"""Which option at which rank: small Llamas trained from scratch on real text, every optimizer at the best of two rates.

    python -m tests.benchmarks.ranks --results ranks.jsonl        # all of it: minutes on a card, days on CPUs
    python -m tests.benchmarks.ranks --only default "residual=fira" --ranks 64 --lrs 1e-2 --scales .125 .25 --seeds 1
    python -m tests.benchmarks.ranks --results ranks.jsonl --table

A Llama 256 wide of 4 layers (5.3M parameters, vocabulary 4,096) reads the sources of the Python standard library: 600
steps of 16 × 128 tokens, cosine with 10 % warmup, gradients of each model clipped to 1, float32 (on a card the models'
own products in TF32), no weight decay, a refresh every 100 steps. The matrices of attention and MLP learn at scale × η,
everything else at η, with every optimizer: both are swept, and a grid whose best point is at its edge is extended. A
point is the mean of the seeds, which differ in initial weights and in the order of batches.

With --sweep-seeds the grids are of so many seeds, and only the best points of all. The points of a grid and its seeds
are one stack of models (`tests.benchmarks.stack_of_llamas`). With --results every finished run is a line of that file,
and is not repeated.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import statistics
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from tests.benchmarks.contenders import CONTENDERS, GAP, Contender, adapter_rank
from tests.benchmarks.quality import standard_library
from tests.benchmarks.stack_of_llamas import Llamas, ManyRates, Rates, Shape, held_out_losses, train

SHAPE = Shape()
ROWS, LENGTH, STEPS = 16, 128, 600
HELD_OUT_ROWS = 256
RANKS = (64, 16, 4)
LRS = (5e-3, 1e-2, 2e-2)
SCALES = (1 / 16, 1 / 8, 1 / 4, 1 / 2)
# Where a contender's grid begins, if elsewhere.
OWN_LRS = {"AdamW": (1e-3, 2e-3, 4e-3), "LoRA": (5e-3, 1e-2, 2e-2)}
OWN_SCALES = {
    "AdamW, two rates": (1 / 32, 1 / 16, 1 / 8, 1 / 4),
    "Muon": (1 / 4, 1 / 2, 1, 2),
    "rule=muon": (1 / 4, 1 / 2, 1, 2),
    "rule=muon, residual=fira": (1 / 8, 1 / 4, 1 / 2, 1),
    "rule=muon, residual=muon": (1 / 64, 1 / 32, 1 / 16, 1 / 8),
    "rule=muon, residual=muon, 8 bits": (1 / 64, 1 / 32, 1 / 16, 1 / 8),
    "rule=muon, residual=normuon": (1 / 64, 1 / 32, 1 / 16, 1 / 8),
    "rule=muon, residual=normuon, 8 bits, rotate": (1 / 64, 1 / 32, 1 / 16, 1 / 8),
    "rule=muon, residual=normuon, 8 bits": (1 / 64, 1 / 32, 1 / 16, 1 / 8),
    "residual=sign, 1": (1 / 32, 1 / 16, 1 / 8, 1 / 4),
    "LoRA": (1 / 4, 1 / 2, 1, 2),
}
EXTENSIONS = 3  # of a grid, at most
CACHE = Path(tempfile.gettempdir()) / "hf_galore_stdlib_4096.pt"


class Point(NamedTuple):
    """The rates of a run: η, and scale."""

    lr: float
    scale: float


@dataclasses.dataclass(frozen=True)
class Run:
    """What one training is made from."""

    contender: str
    rank: int
    lr: float
    scale: float
    seed: int
    steps: int


# ---- the text


@functools.cache
def tokenized(cache: Path) -> tuple[Tensor, Tensor]:
    """Training and held-out tokens, (rows, `LENGTH`), from a tokenizer trained on the training text."""
    from tokenizers import ByteLevelBPETokenizer

    if not cache.exists():
        train_texts, held_out_texts = standard_library()
        tokenizer = ByteLevelBPETokenizer()
        tokenizer.train_from_iterator(train_texts, vocab_size=SHAPE.vocabulary, show_progress=False)

        def rows(texts: Iterable[str]) -> Tensor:
            ids = torch.tensor([token for text in texts for token in tokenizer.encode(text).ids], dtype=torch.int16)
            return ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)

        held_out = rows(held_out_texts)
        scattered = torch.randperm(len(held_out), generator=torch.Generator().manual_seed(0))[:HELD_OUT_ROWS]
        torch.save((rows(train_texts), held_out[scattered]), cache)
    train_rows, held_out_rows = torch.load(cache, weights_only=True)
    return train_rows.long(), held_out_rows.long()


# ---- runs


class Results:
    """The held-out losses of finished runs, in memory and as lines of a file."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self.losses: dict[Run, float] = {}
        if path is not None and path.exists():
            for line in path.read_text().splitlines():
                found = json.loads(line)
                run = Run(**{field.name: found[field.name] for field in dataclasses.fields(Run)})
                self.losses[run] = found["loss"]

    def add(self, run: Run, loss: float, seconds: float) -> None:
        """Keep what came of a run."""
        self.losses[run] = loss
        if self._path is not None:
            with self._path.open("a") as file:
                file.write(json.dumps({**dataclasses.asdict(run), "loss": loss, "seconds": round(seconds, 2)}) + "\n")

    def points(self, contender: str, rank: int, steps: int, seeds: Sequence[int]) -> dict[Point, list[float]]:
        """The losses of the points that have all seeds."""
        found: dict[Point, dict[int, float]] = {}
        for run, loss in self.losses.items():
            if (run.contender, run.rank, run.steps) == (contender, rank, steps) and run.seed in seeds:
                found.setdefault(Point(run.lr, run.scale), {})[run.seed] = loss
        return {point: list(by.values()) for point, by in found.items() if len(by) == len(seeds)}

    def best(self, contender: str, rank: int, steps: int, seeds: Sequence[int]) -> tuple[Point, list[float]] | None:
        """The point with the lowest mean, and its losses."""
        points = self.points(contender, rank, steps, seeds)
        finite = {point: losses for point, losses in points.items() if all(map(math.isfinite, losses))}
        return min(finite.items(), key=lambda item: statistics.fmean(item[1])) if finite else None


def train_stack(runs: Sequence[Run], cache: Path, device: str) -> list[float]:
    """Train the runs of one contender at one rank, and return their held-out losses."""
    contender = CONTENDERS[runs[0].contender]
    rows, held_out = (tokens.to(device) for tokens in tokenized(cache))
    adapters = adapter_rank(contender, runs[0].rank, SHAPE.hidden, SHAPE.intermediate)
    model = Llamas(SHAPE, [run.seed for run in runs], adapters).to(device)
    torch.manual_seed(0)
    optimizer = ManyRates(contender.make(model, runs[0].rank), model, [Rates(run.lr, run.scale) for run in runs])
    steps = runs[0].steps
    generators = {run.seed: torch.Generator().manual_seed(run.seed) for run in runs}
    orders = {seed: torch.randperm(len(rows), generator=generator) for seed, generator in generators.items()}
    order = torch.stack([orders[run.seed] for run in runs]).to(device)

    def batch(step: int) -> tuple[Tensor, Tensor]:
        ids = rows[order[:, torch.arange(step * ROWS, (step + 1) * ROWS, device=device) % len(rows)]]
        return ids, ids

    train(model, optimizer, batch, steps)
    return held_out_losses(model, held_out, held_out)


def sweep(contender: Contender, rank: int, points: set[Point], results: Results, args: argparse.Namespace) -> None:
    """Do the points of a grid, more of them while the best one is at its edge, and then all seeds of the best."""

    def runs(point: Point, seeds: Sequence[int]) -> list[Run]:
        return [Run(contender.name, rank, point.lr, point.scale, seed, args.steps) for seed in seeds]

    seeds = args.seeds[: args.sweep_seeds]
    for _ in range(1 + (EXTENSIONS if args.extend else 0)):
        perform([run for point in sorted(points) for run in runs(point, seeds)], results, args)
        found = results.best(contender.name, rank, args.steps, seeds)
        if found is None:
            return
        best, losses = found
        points = _beyond(best, set(results.points(contender.name, rank, args.steps, seeds)), contender)
        if not points:
            break
    perform(runs(best, args.seeds), results, args)
    losses = results.points(contender.name, rank, args.steps, args.seeds).get(best, losses)
    at = f"η {best.lr:.2g} scale {best.scale:.4g}"
    console.print(f"{contender.name:26} rank {rank:3}  {at}  {statistics.fmean(losses):.4f}")


def perform(runs: Sequence[Run], results: Results, args: argparse.Namespace) -> None:
    """Do the runs that are missing, until time is over."""
    missing = [run for run in runs if run not in results.losses]
    for start in range(0, len(missing), args.at_once):
        if time.monotonic() > args.ends:
            return
        some, began = missing[start : start + args.at_once], time.perf_counter()
        losses = train_stack(some, args.cache, args.device)
        seconds = (time.perf_counter() - began) / len(some)
        for run, loss in zip(some, losses, strict=True):
            results.add(run, loss, seconds)


def _beyond(best: Point, known: set[Point], contender: Contender) -> set[Point]:
    """The neighbours of the best point that are not known yet."""
    neighbours = {Point(best.lr * 2, best.scale), Point(best.lr / 2, best.scale)}
    if not contender.one_rate:
        neighbours |= {Point(best.lr, best.scale * 2), Point(best.lr, best.scale / 2)}
        neighbours |= {Point(best.lr * 2, best.scale / 2), Point(best.lr / 2, best.scale * 2)}
    close = [other for other in neighbours if not any(_same(other, point) for point in known)]
    return set(close)


def _same(one: Point, other: Point) -> bool:
    return all(math.isclose(a, b, rel_tol=1e-6) for a, b in zip(one, other, strict=True))


# ---- tables


def print_tables(results: Results, args: argparse.Namespace) -> None:
    """The best of each contender at each rank; and at the best η the loss by scale."""
    best = Table("optimizer", "rank", "η", "scale", "loss", "±", title=f"Held-out loss after {args.steps} steps")
    by_scale = Table("optimizer", "rank", "η", "scale: loss", title="By scale, at the best η")
    for name in args.only or CONTENDERS:
        for rank in args.ranks if CONTENDERS[name].has_rank else (0,):
            found = results.best(name, rank, args.steps, args.seeds)
            if found is None:
                continue
            point, losses = found
            spread = statistics.stdev(losses) if len(losses) > 1 else 0.0
            cells = (name, str(rank or ""), f"{point.lr:.2g}", f"{point.scale:.4g}")
            best.add_row(*cells, f"{statistics.fmean(losses):.4f}", f"{spread:.4f}")
            points = results.points(name, rank, args.steps, args.seeds)
            along = sorted((p.scale, statistics.fmean(v)) for p, v in points.items() if math.isclose(p.lr, point.lr))
            by_scale.add_row(*cells[:3], ", ".join(f"{scale:.4g}: {loss:.4f}" for scale, loss in along))
    console.print(best)
    console.print(by_scale)


console = Console(width=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--sweep-seeds", type=int, help="how many of the seeds the grids are done with; all by default")
    parser.add_argument("--ranks", type=int, nargs="+", default=list(RANKS))
    parser.add_argument("--only", nargs="+", choices=list(CONTENDERS), metavar="OPTIMIZER", help=", ".join(CONTENDERS))
    parser.add_argument("--lrs", type=float, nargs="+", help="the rates η to begin with")
    parser.add_argument("--scales", type=float, nargs="+", help="the scales to begin with")
    parser.add_argument("--no-extend", dest="extend", action="store_false", help="do not extend a grid")
    parser.add_argument("--results", type=Path, help="a file of finished runs to read and to add to")
    parser.add_argument("--table", action="store_true", help="print what --results holds, and run nothing")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--at-once", type=int, help="models in a stack, at most; 36 on a card, 3 on CPUs")
    parser.add_argument("--deadline", type=float, default=math.inf, help="seconds after which no stack is begun")
    parser.add_argument("--cache", type=Path, default=CACHE, help="a file for the tokens")
    args = parser.parse_args()
    args.ends = time.monotonic() + args.deadline
    args.at_once = args.at_once or (36 if args.device == "cuda" else 3)
    results = Results(args.results)
    if not args.table:
        console.print(
            f"torch {torch.__version__}, {args.device}; Llamas of {SHAPE.hidden} × {SHAPE.layers} layers, {ROWS} × "
            f"{LENGTH} tokens a step, {args.steps} steps, gap {GAP}, seeds {args.seeds}"
        )
        for rank in args.ranks:
            for name in args.only or CONTENDERS:
                contender = CONTENDERS[name]
                if not contender.has_rank and rank != args.ranks[0]:
                    continue
                lrs = args.lrs or OWN_LRS.get(name, LRS)
                scales = (1.0,) if contender.one_rate else args.scales or OWN_SCALES.get(name, SCALES)
                points = {Point(lr, scale) for lr in lrs for scale in scales}
                sweep(contender, rank if contender.has_rank else 0, points, results, args)
    print_tables(results, args)


if __name__ == "__main__":
    main()
