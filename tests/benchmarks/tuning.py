"""Which option at which rank, for a model that was pretrained: every optimizer fine-tunes it at the best of its rates.

    python -m tests.benchmarks.texts --out /tmp/texts.pt                                   # no network, 2 minutes
    python -m tests.benchmarks.tuning pretrain --texts /tmp/texts.pt --out /tmp/pretrained.pt --seconds 90
    python -m tests.benchmarks.tuning tune --texts /tmp/texts.pt --pretrained /tmp/pretrained.pt --results tuning.jsonl
    python -m tests.benchmarks.tuning tune ... --results tuning.jsonl --table              # what is there, as tables

A Llama 256 wide of 4 layers (5.3M parameters, vocabulary 4,096) is pretrained on Python and on what its packages say in
English, by AdamW. It is then tuned on each of two tasks (`tests.benchmarks.texts`): conversations, by the held-out loss
of the answers; and which of eight libraries a docstring is from, by held-out accuracy (--tasks
has another of these). 200 steps of 16 rows, a cosine with 10 % warmup, gradients of each model clipped to 1, no weight
decay, float32 (on a card the models' own products in TF32).

The matrices of attention and MLP have one rate, all else another, and every optimizer gets the best of a grid of both:
five rates of the matrices, each twice the one before, by three of all else, each four times the one before; where the
best of them is at an edge, its neighbours are tried too, `EXTENSIONS` times. The best has the lowest mean held-out loss
of the seeds, which differ in the order of the rows and, for LoRA, in the adapters' initial values. The rate of the
matrices is that of what the optimizer makes with a scale of 1: learning rate × scale. galore_torch, which has each
matrix of a stack as a parameter of its own and takes minutes, has the rest's rate of this package's default at the same
rank.

With --sweep-seeds the grids are of so many seeds, and only their best points of all. The points of a grid and its seeds
are one stack of models (`tests.benchmarks.stack_of_llamas`). Finished runs are lines of --results, and are not
repeated, as long as the pretrained model is the same. --short is a trial of minutes on a CPU, and tells nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import hashlib
import itertools
import json
import math
import statistics
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from tests.benchmarks import texts
from tests.benchmarks.contenders import CONTENDERS, GAP, Contender, adapter_rank
from tests.benchmarks.stack_of_llamas import Llamas, ManyRates, Rates, Shape, held_out_losses, tf32, train
from tests.benchmarks.texts import IGNORED, Task

SHAPE = Shape()
TASKS = ("chat", "library", "origin")
RESTS = {"chat": (-1, 0, 1), "library": (1, 2, 3), "origin": (1, 2, 3)}
"""The places of the rest's rate to begin with: an answer of its own asks for more of embeddings and head."""

RANKS = (64, 16, 4)
STEPS, ROWS, EVALUATED_ROWS = 200, 16, 32
PRETRAINING_ROWS, PRETRAINING_RATES = 128, Rates(lr=6e-3, scale=1 / 3)
TIMED_STEPS = SHORT_STEPS = 20

UNIT, MATRICES_FACTOR, REST_FACTOR = 1e-3, 2.0, 4.0
EXTENSIONS = 3
# The middle of the grid of the matrices' rates, as a power of 2 of UNIT; at the largest rank, where there are ranks.
MIDDLES = {
    "AdamW": 0,
    "AdamW, two rates": -1,
    "Muon": 0,
    "LoRA": 2,
    "residual=sign, 1": -2,
    "residual=sign, .1": 0,
}
MIDDLE_OF_OTHERS = 1
# Their steps do not grow with the rank's root: those of full matrices, of signs, and of adapters.
ALIKE_AT_ALL_RANKS = tuple(MIDDLES)
# What takes minutes a grid, and whose rate of the rest it takes, at the same rank.
REST_OF = {"galore_torch": "default"}

console = Console(width=120)


@dataclasses.dataclass(frozen=True)
class Run:
    """What one training is made from."""

    task: str
    contender: str
    rank: int
    rest: float
    matrices: float
    seed: int
    steps: int
    pretrained: str
    """A hash of the model to begin with, and of the texts."""


class Point(NamedTuple):
    """A place in the grid: powers of the factors of the two rates."""

    matrices: int
    rest: int

    def rates(self) -> tuple[float, float]:
        """The matrices' rate, and that of the rest."""
        return UNIT * MATRICES_FACTOR**self.matrices, UNIT * REST_FACTOR**self.rest


# ---- the pretrained model


def pretrain(args: argparse.Namespace) -> None:
    """Train one model, and write it down."""
    task = texts.load(args.texts)["pretraining"]
    rows, held_out = (tokens.to(args.device) for tokens in (task.rows, task.held_out_rows))
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).to(args.device)
    count = args.rows

    def batch(step: int) -> tuple[Tensor, Tensor]:
        chosen = order[torch.arange(step * count, (step + 1) * count, device=args.device) % len(order)]
        ids = rows[chosen].long()[None]
        return ids, ids

    def trained(steps: int) -> Llamas:
        model = Llamas(SHAPE, [0]).to(args.device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, weight_decay=0.0)
        train(model, ManyRates(optimizer, model, [PRETRAINING_RATES]), batch, steps)
        if model.get_parameter("embed").isnan().any():  # which also waits for the device
            raise SystemExit("The loss is no number any more.")
        return model

    steps = args.steps
    if steps is None:
        trained(TIMED_STEPS)
        start = time.perf_counter()
        trained(TIMED_STEPS)
        steps = max(1, int(args.seconds / (time.perf_counter() - start) * TIMED_STEPS))
    start = time.perf_counter()
    model = trained(steps)
    seconds = time.perf_counter() - start
    (loss,) = held_out_losses(model, held_out.long(), held_out.long(), EVALUATED_ROWS)
    torch.save({name: param.detach()[0].cpu() for name, param in model.named_parameters()}, args.out)
    console.print(
        f"{args.out}: {steps} steps of {count} × {rows.shape[1]} tokens ({steps * count / len(rows):.1f} times the "
        f"text) in {seconds:.0f} s; held-out loss {loss:.4f}"
    )


class FewLearnt(Llamas):
    """Llamas whose head is asked for the tokens that are learnt, and no others.

    One in 64 where libraries are told from each other, and one in six in conversations: logits of all tokens would be
    most of what a step reads and writes.
    """

    learnt: int = 0
    """The most tokens of a batch that are learnt."""

    def losses(self, ids: Tensor, labels: Tensor) -> Tensor:
        """Those of `Llamas`."""
        wanted = torch.nn.functional.pad(labels[:, :, 1:], (0, 1), value=IGNORED).flatten(1)
        places = (wanted != IGNORED).int().topk(min(self.learnt, wanted.shape[1]), dim=1).indices
        wanted = wanted.gather(1, places)
        logits = self.logits_at(ids, places)
        each = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), wanted.flatten(), reduction="none", ignore_index=IGNORED
        )
        return each.view(len(ids), -1).sum(1) / (wanted != IGNORED).sum(1)

    def logits_at(self, ids: Tensor, places: Tensor) -> Tensor:
        """The logits, k × c × vocabulary, after the tokens at k × c places among rows · length."""
        hidden = self.hidden(ids)
        return hidden.gather(1, places[..., None].expand(-1, -1, hidden.shape[-1])) @ self.get_parameter("head").mT


def stack(pretrained: dict[str, Tensor], seeds: Sequence[int], adapters: int, device: str) -> FewLearnt:
    """Models that all begin with the pretrained weights; adapters differ by seed.

    Args:
        pretrained: one model's parameters, by name.
        seeds: one a model.
        adapters: their rank, or 0.
        device: to be on.
    """
    different = sorted(set(seeds))
    model = FewLearnt(SHAPE, different, adapters).to(device)
    places = torch.tensor([different.index(seed) for seed in seeds], device=device)
    for name, param in model.named_parameters():
        if name in pretrained:
            param.data = pretrained[name].to(device).expand(len(seeds), *param.shape[1:]).clone()
        else:
            param.data = param.data[places]
    model.seeds = tuple(seeds)
    return model


# ---- one stack


def tune(runs: Sequence[Run], task: Task, pretrained: dict[str, Tensor], device: str) -> list[dict[str, float]]:
    """Train the runs of one contender at one rank on one task, and return what came of each."""
    contender = CONTENDERS[runs[0].contender]
    adapters = adapter_rank(contender, runs[0].rank, SHAPE.hidden, SHAPE.intermediate)
    model = stack(pretrained, [run.seed for run in runs], adapters, device)
    torch.manual_seed(0)
    rates = [Rates(run.rest, run.matrices / run.rest) for run in runs]
    optimizer = ManyRates(contender.make(model, runs[0].rank), model, rates)
    rows, labels = task.rows.to(device), task.labels.to(device)
    generators = {run.seed: torch.Generator().manual_seed(run.seed) for run in runs}
    needed = math.ceil(runs[0].steps * ROWS / len(rows))
    orders = {
        seed: torch.cat([torch.randperm(len(rows), generator=generator) for _ in range(needed)])
        for seed, generator in generators.items()
    }
    counts = (task.labels[:, 1:] != IGNORED).sum(1)
    used = runs[0].steps * ROWS
    model.learnt = max(int(counts[order[:used]].view(-1, ROWS).sum(1).max()) for order in orders.values())
    order = torch.stack([orders[run.seed] for run in runs]).to(device)

    def batch(step: int) -> tuple[Tensor, Tensor]:
        chosen = order[:, step * ROWS : (step + 1) * ROWS]
        return rows[chosen].long(), labels[chosen].long()

    train(model, optimizer, batch, runs[0].steps)
    return evaluated(model, task, device)


@torch.no_grad()
def evaluated(model: FewLearnt, task: Task, device: str) -> list[dict[str, float]]:
    """The held-out loss of each model and, where an answer is one of some tokens, the share that is right."""
    k = len(model.seeds)
    total, right = (torch.zeros(k, dtype=torch.float64, device=device) for _ in range(2))
    counted = 0
    rows, labels = task.held_out_rows.to(device).long(), task.held_out_labels.to(device).long()
    answers = torch.tensor(task.answers, device=device)
    for some_rows, some_labels in zip(rows.split(EVALUATED_ROWS), labels.split(EVALUATED_ROWS), strict=True):
        row, place = (some_labels[:, 1:] != IGNORED).nonzero(as_tuple=True)
        wanted, places = some_labels[row, place + 1], row * rows.shape[1] + place
        with tf32():
            found = model.logits_at(some_rows.expand(k, *some_rows.shape), places.expand(k, -1))
        each = torch.nn.functional.cross_entropy(found.flatten(0, 1), wanted.repeat(k), reduction="none")
        total += each.view(k, -1).double().sum(1)
        counted += len(wanted)
        if task.answers:
            right += (answers[found[..., answers].argmax(-1)] == wanted).sum(1)
    losses = (total / counted).tolist()
    if not task.answers:
        return [{"loss": loss} for loss in losses]
    return [{"loss": loss, "accuracy": share} for loss, share in zip(losses, (right / counted).tolist(), strict=True)]


# ---- the grid


class Results:
    """What came of finished runs, in memory and as lines of a file."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self.found: dict[Run, dict[str, Any]] = {}
        if path is not None and path.exists():
            for line in map(json.loads, path.read_text().splitlines()):
                self.found[Run(**{field.name: line[field.name] for field in dataclasses.fields(Run)})] = line

    def add(self, run: Run, came: dict[str, Any]) -> None:
        """Keep what came of a run."""
        self.found[run] = {**dataclasses.asdict(run), **came}
        if self._path is not None:
            with self._path.open("a") as file:
                file.write(json.dumps(self.found[run]) + "\n")


@dataclasses.dataclass(frozen=True)
class Sweep:
    """An optimizer at a rank, on a task."""

    task: str
    contender: Contender
    rank: int
    seeds: tuple[int, ...]
    steps: int
    pretrained: str
    swept: int | None = None
    """How many of the seeds the grid is of, if not all; the others are for its best point."""
    rests: tuple[int, ...] = (-1, 0, 1)
    """The places of the rest's rate to begin with; one alone is the only one."""

    def grid(self) -> list[Point]:
        """The points to begin with."""
        middle = MIDDLES.get(self.contender.name, MIDDLE_OF_OTHERS)
        if self.contender.name not in ALIKE_AT_ALL_RANKS:
            middle += round(math.log2(RANKS[0] / self.rank) / 2)  # as long a step at another rank: `scale=auto`
        matrices = range(middle - 2, middle + 3)
        if self.contender.one_rate:
            return [Point(number, 0) for number in matrices]
        return [Point(number, rest) for number in matrices for rest in self.rests]

    def runs(self, point: Point, seeds: Sequence[int] | None = None) -> list[Run]:
        """Those of a point: one a seed, of all by default."""
        matrices, rest = point.rates()
        rest = matrices if self.contender.one_rate else rest
        of = (self.task, self.contender.name, self.rank, rest, matrices)
        return [Run(*of, seed, self.steps, self.pretrained) for seed in seeds or self.seeds]

    def points(self, results: Results) -> dict[Point, list[dict[str, Any]]]:
        """What came of the points that are finished, within reach of the grid."""
        grid = self.grid()
        reach = range(-2 - 2 * EXTENSIONS, 3 + 2 * EXTENSIONS)
        middle = grid[len(grid) // 2]
        near = [Point(middle.matrices + i, middle.rest + j) for i, j in itertools.product(reach, reach)]
        seeds = self.seeds[: self.swept]
        places = dict.fromkeys([*grid, *near])
        found = {point: [results.found.get(run) for run in self.runs(point, seeds)] for point in places}
        if self.contender.one_rate:
            found = {point: lines for point, lines in found.items() if point.rest == 0}
        known = {point: [line for line in lines if line is not None] for point, lines in found.items()}
        return {point: lines for point, lines in known.items() if len(lines) == len(seeds)}

    def best(self, results: Results) -> tuple[Point, list[dict[str, Any]]] | None:
        """The point with the lowest mean loss, and what came of all its seeds that are known."""

        def mean(item: tuple[Point, list[dict[str, Any]]]) -> float:
            return statistics.fmean(line["loss"] for line in item[1])

        finite = {p: lines for p, lines in self.points(results).items() if all(math.isfinite(x["loss"]) for x in lines)}
        if not finite:
            return None
        point = min(finite.items(), key=mean)[0]
        return point, [results.found[run] for run in self.runs(point) if run in results.found]

    def beyond(self, results: Results) -> list[Point]:
        """The points next to the best one that are not known: none, where the best is at no edge."""
        best = self.best(results)
        if best is None:
            return []
        known, (matrices, rest) = self.points(results), best[0]
        near = [Point(matrices - 1, rest), Point(matrices + 1, rest)]
        if not self.contender.one_rate and len(self.rests) > 1:
            near += [Point(matrices, rest - 1), Point(matrices, rest + 1)]
        missing = [point for point in near if point not in known]
        if missing and missing[0].rest == rest:
            # Along with an edge of the matrices' rate, a point beyond it: a further extension costs a stack of its own.
            step = missing[0].matrices - matrices
            missing.append(Point(matrices + 2 * step, rest))
        return missing


def perform(
    sweep: Sweep, results: Results, task: Task, pretrained: dict[str, Tensor], args: argparse.Namespace
) -> None:
    """Do what is missing of a grid, and extend it while the best point is at its edge."""
    points = sweep.grid()
    if args.short:
        points = points[len(points) // 2 :][:1]
    seeds = sweep.seeds[: sweep.swept]

    def do(runs: list[Run]) -> None:
        missing = [run for run in runs if run not in results.found]
        for some in _parts(missing, args.at_once):
            if time.monotonic() > args.ends:
                return
            start = time.perf_counter()
            came = tune(some, task, pretrained, args.device)
            gc.collect()  # an optimizer and its hooks are a cycle, with gigabytes
            seconds = time.perf_counter() - start
            for run, one in zip(some, came, strict=True):
                results.add(run, {**one, "seconds": round(seconds / len(some), 3), "device": args.device_name})
            console.print(
                f"{sweep.task:6} {sweep.contender.name:26} rank {sweep.rank:3}: {len(some)} in {seconds:.1f} s"
            )

    for _ in range(1 + (0 if args.short else EXTENSIONS)):
        do([run for point in points for run in sweep.runs(point, seeds)])
        points = sweep.beyond(results)
        if not points:
            break
    best = sweep.best(results)
    if best is not None:
        do(sweep.runs(best[0]))


def _parts(runs: list[Run], at_once: int) -> Iterable[list[Run]]:
    return (runs[start : start + at_once] for start in range(0, len(runs), at_once))


def completed(sweep: Sweep, results: Results) -> Sweep:
    """The sweep with its rate of the rest, where that is another's."""
    other = REST_OF.get(sweep.contender.name)
    if other is None:
        return sweep
    best = dataclasses.replace(sweep, contender=CONTENDERS[other]).best(results)
    return dataclasses.replace(sweep, rests=(0 if best is None else best[0].rest,))


# ---- tables


def print_tables(sweeps: Sequence[Sweep], results: Results) -> None:
    """The best of each contender at each rank by task; and what the loss is along the matrices' rate."""
    for name in dict.fromkeys(sweep.task for sweep in sweeps):
        of_task = [(sweep, sweep.best(results)) for sweep in sweeps if sweep.task == name]
        known = [(sweep, *best) for sweep, best in of_task if best is not None]
        steps = of_task[0][0].steps
        table = Table("optimizer", "rank", "matrices", "rest", "loss", "±", title=f"{name}: after {steps} steps")
        with_accuracy = any("accuracy" in line for _, _, lines in known for line in lines)
        for header in ("accuracy", "±") if with_accuracy else ():
            table.add_column(header)
        table.add_column("at an edge")
        along = Table("optimizer", "rank", "rest", "matrices' rate: loss", title=f"{name}: by rate")
        for sweep, point, lines in known:
            matrices, rest = point.rates()
            rest = matrices if sweep.contender.one_rate else rest
            cells = [sweep.contender.name, str(sweep.rank or ""), f"{matrices:.3g}", f"{rest:.3g}"]
            for key, digits in (("loss", 4), ("accuracy", 4))[: 2 if with_accuracy else 1]:
                values = [line[key] for line in lines]
                spread = statistics.stdev(values) if len(values) > 1 else math.nan
                cells += [f"{statistics.fmean(values):.{digits}f}", f"{spread:.{digits}f}"]
            table.add_row(*cells, "yes" if sweep.beyond(results) else "")
            points = sorted(sweep.points(results).items())
            row = ((p.rates()[0], found) for p, found in points if p.rest == point.rest)
            losses = (f"{rate:.3g}: {statistics.fmean(one['loss'] for one in found):.4f}" for rate, found in row)
            along.add_row(sweep.contender.name, str(sweep.rank or ""), f"{rest:.3g}", ", ".join(losses))
        console.print(table)
        console.print(along)


# ---- the command


def sweeps_of(args: argparse.Namespace, fingerprint: str) -> list[Sweep]:
    """What is to be done, what takes longest last."""
    chosen = [CONTENDERS[name] for name in args.only or CONTENDERS]
    found = []
    for rank in args.ranks:
        for contender in chosen:
            if contender.has_rank and contender.name == "scaling=tensor":
                own = 1  # APOLLO-Mini
            else:
                own = rank if contender.has_rank else 0
            own_seeds, swept = tuple(args.seeds), args.sweep_seeds
            of = (contender, own, own_seeds, args.steps, fingerprint, swept)
            found += [Sweep(task, *of, rests=RESTS[task]) for task in args.tasks]
    return sorted(dict.fromkeys(found), key=lambda sweep: sweep.contender.name in REST_OF)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    first, second = commands.add_parser("pretrain"), commands.add_parser("tune")
    for command in (first, second):
        command.add_argument("--texts", type=Path, required=True, help="the file of tests.benchmarks.texts")
        command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    first.add_argument("--out", type=Path, required=True, help="the file for the model")
    first.add_argument("--steps", type=int, help="or as many as --seconds allow")
    first.add_argument("--seconds", type=float, default=90, help="to train for, about")
    first.add_argument("--rows", type=int, default=PRETRAINING_ROWS, help="of a step")
    second.add_argument("--pretrained", type=Path, required=True, help="the file that pretrain has written")
    second.add_argument("--results", type=Path, help="a file of finished runs to read and to add to")
    second.add_argument("--table", action="store_true", help="print what --results holds, and run nothing")
    second.add_argument("--steps", type=int, default=STEPS)
    second.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    second.add_argument("--sweep-seeds", type=int, help="how many of the seeds the grids are done with; all by default")
    second.add_argument("--ranks", type=int, nargs="+", default=list(RANKS))
    second.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS[:2]))
    second.add_argument("--only", nargs="+", choices=list(CONTENDERS), metavar="OPTIMIZER", help=", ".join(CONTENDERS))
    second.add_argument(
        "--short", action="store_true", help=f"one point, one seed, one rank, {SHORT_STEPS} steps: minutes on a CPU"
    )
    second.add_argument("--at-once", type=int, help="models in a stack, at most; 48 on a card, 3 on CPUs")
    second.add_argument("--deadline", type=float, default=math.inf, help="seconds after which no stack is begun")
    args = parser.parse_args()
    if args.command == "pretrain":
        pretrain(args)
        return
    args.ends = time.monotonic() + args.deadline
    args.at_once = args.at_once or (48 if args.device == "cuda" else 3)
    args.device_name = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    if args.short:
        args.seeds, args.ranks, args.steps = args.seeds[:1], args.ranks[:2][-1:], min(args.steps, SHORT_STEPS)
    fingerprint = hashlib.sha256(args.pretrained.read_bytes() + args.texts.read_bytes()).hexdigest()[:8]
    results, tasks = Results(args.results), texts.load(args.texts)
    pretrained = torch.load(args.pretrained, weights_only=True)
    sweeps = sweeps_of(args, fingerprint)
    if not args.table:
        console.print(
            f"torch {torch.__version__}, {args.device_name}; {len(sweeps)} optimizers, ranks and tasks; {args.steps} "
            f"steps of {ROWS} rows, gap {GAP}, seeds {args.seeds}, pretrained {fingerprint}"
        )
        for sweep in sweeps:
            perform(completed(sweep, results), results, tasks[sweep.task], pretrained, args)
    print_tables([completed(sweep, results) for sweep in sweeps], results)


if __name__ == "__main__":
    main()
