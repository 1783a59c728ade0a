"""What each choice does to the loss: a small Llama trained from scratch on real text by every optimizer in question.

    python -m tests.benchmarks.quality --results quality.jsonl       # the whole table: hours
    python -m tests.benchmarks.quality --short                       # minutes: fewer steps, one seed, the main rows
    python -m tests.benchmarks.quality --only "AdamW, two rates" galore_torch --seeds 1 2

A Llama of 9M parameters reads the sources of the Python standard library. All runs of a seed start from the same
weights and see the same batches; the learning rate follows a cosine with 10 % warmup and gradients are clipped to a
norm of 1. `scale` acts on projected matrices only, so a GaLore run has two learning rates; the row "AdamW, two rates"
gives AdamW the same two. Each row's learning rate is the best of its sweep at the first seed; the rows that change one
option of another take that one's.

With --results every finished run is a line of that file, and a run that is there already is not repeated: the table
can be made in pieces, and after an interruption. A result belongs to the defaults that it was run with.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import multiprocessing
import os
import statistics
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from tests.benchmarks.step import targets

HIDDEN, LAYERS, VOCABULARY = 256, 4, 11264
ROWS, LENGTH = 4, 128  # of a batch
WARMUP, MAX_NORM = 0.1, 1.0
RANK, GAP, SCALE = HIDDEN // 4, 50, 0.25
HELD_OUT_ROWS = 256

CACHE = Path(tempfile.gettempdir()) / "hf_galore_stdlib_tokens.pt"

Build = Callable[[nn.Module, float, dict[str, Any]], torch.optim.Optimizer]


# ---- the optimizers


def _targets_and_rest(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    projected = targets(model)
    chosen = set(map(id, projected))
    return projected, [param for param in model.parameters() if id(param) not in chosen]


def _adamw(model: nn.Module, lr: float, options: dict[str, Any]) -> torch.optim.Optimizer:
    projected, rest = _targets_and_rest(model)
    groups = [{"params": rest}, {"params": projected, "lr": lr * options.get("matrices", 1.0)}]
    return torch.optim.AdamW(groups, lr=lr, weight_decay=0.0, fused=True)


def _published(model: nn.Module, lr: float, options: dict[str, Any]) -> torch.optim.Optimizer:
    import galore_torch

    projected, rest = _targets_and_rest(model)
    group = {"params": projected, "rank": RANK, "update_proj_gap": GAP, "scale": SCALE, "proj_type": "std", **options}
    return cast(
        "torch.optim.Optimizer",
        galore_torch.GaLoreAdamW([{"params": rest}, group], lr=lr, no_deprecation_warning=True),
    )


def _ours(model: nn.Module, lr: float, options: dict[str, Any]) -> torch.optim.Optimizer:
    from hf_galore import GaLoreAdamW, GaLoreAdamW8bit

    options = dict(options)
    cls = GaLoreAdamW8bit if options.pop("optim_bits", 32) == 8 else GaLoreAdamW
    projected, rest = _targets_and_rest(model)
    group = {"params": projected, "rank": RANK, "update_proj_gap": GAP, "scale": SCALE, **options}
    return cls([{"params": rest, "optim_bits": 32}, group], lr=lr, weight_decay=0.0)


def _lora(model: nn.Module, lr: float, options: dict[str, Any]) -> torch.optim.Optimizer:
    """Adapters with as many elements as GaLore's low-rank gradients; what GaLore trains full-rank is trained here."""
    from peft import LoraConfig, inject_adapter_in_model

    projected, rest = _targets_and_rest(model)
    elements = sum(RANK * max(weight.shape) for weight in projected)
    rank = round(elements / sum(sum(weight.shape) for weight in projected))
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = LoraConfig(r=rank, lora_alpha=rank, lora_dropout=0.0, target_modules=names)
    inject_adapter_in_model(config, cast("Any", model))
    for param in rest:
        param.requires_grad_(True)
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0, fused=True)


@dataclasses.dataclass(frozen=True)
class Contender:
    """One row: an optimizer with its options, and the learning rates to try or the row whose rate it takes."""

    name: str
    build: Build
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    rates: tuple[float, ...] = ()
    rate_of: str | None = None


# The published algorithm in this package's words, and what a group without these keys gets.
PUBLISHED = {"refresh": "svd", "moments": "keep", "stagger": False, "proj_bits": 16}
PLAIN, DEFAULT = "GaLoreAdamW as published", "GaLoreAdamW by default"


def _changed(**change: Any) -> Contender:
    ((key, value),) = change.items()
    return Contender(f"  {key}={str(value).lower()}", _ours, {**PUBLISHED, **change}, rate_of="galore_torch")


def _default_but(**change: Any) -> Contender:
    ((key, value),) = change.items()
    return Contender(f"  default but {key}={str(value).lower()}", _ours, change, rate_of=DEFAULT)


CONTENDERS = (
    Contender("AdamW", _adamw, rates=(5e-4, 1e-3, 2e-3)),
    Contender("AdamW, two rates", _adamw, {"matrices": SCALE}, rates=(1e-3, 2e-3, 4e-3)),
    Contender("LoRA", _lora, rates=(5e-4, 1e-3, 2e-3)),
    Contender("galore_torch", _published, rates=(2e-3, 4e-3, 8e-3)),
    Contender(PLAIN, _ours, PUBLISHED, rate_of="galore_torch"),
    _changed(refresh="randomized"),
    _changed(refresh="subspace"),
    _changed(stagger=True),
    _changed(moments="rotate"),
    _changed(moments="reset"),
    _changed(proj_bits=8),
    _changed(proj_bits=4),
    _changed(lazy_refresh=True),
    Contender(DEFAULT, _ours, {}, rates=(2e-3, 4e-3, 8e-3)),
    _default_but(proj_bits=16),
    _default_but(proj_bits=8),
    _default_but(moments="rotate"),
    _default_but(lazy_refresh=True),
    _default_but(optim_bits=8),
)
MAIN = ("AdamW, two rates", "galore_torch", DEFAULT)


# ---- the text


def standard_library() -> tuple[list[str], list[str]]:
    """The standard library's sources to train on, and every twentieth of them to be tested on."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__"}
    files = sorted(path for path in folder.rglob("*.py") if not skipped.intersection(path.relative_to(folder).parts))
    texts = [path.read_text(encoding="utf-8", errors="ignore") for path in files]
    return [t for i, t in enumerate(texts) if i % 20], [t for i, t in enumerate(texts) if not i % 20]


@functools.cache
def tokenized(cache: Path) -> tuple[Tensor, Tensor]:
    """Training and held-out tokens, (rows, `LENGTH`), from a tokenizer trained on the training text."""
    from tokenizers import ByteLevelBPETokenizer

    if not cache.exists():
        train, held_out = standard_library()
        tokenizer = ByteLevelBPETokenizer()
        tokenizer.train_from_iterator(train, vocab_size=VOCABULARY, show_progress=False)

        def rows(texts: Iterable[str]) -> Tensor:
            ids = torch.tensor([token for text in texts for token in tokenizer.encode(text).ids])
            return ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)

        cache.parent.mkdir(parents=True, exist_ok=True)
        scattered = torch.randperm(len(rows(held_out)), generator=torch.Generator().manual_seed(0))[:HELD_OUT_ROWS]
        torch.save((rows(train), rows(held_out)[scattered]), cache)
    train_rows, held_out_rows = torch.load(cache, weights_only=True)
    return train_rows, held_out_rows


# ---- one run


@dataclasses.dataclass(frozen=True)
class Run:
    """What one training is made from."""

    name: str
    lr: float
    seed: int
    steps: int


def train(run: Run, cache: Path) -> dict[str, Any]:
    """Train, and return the held-out loss with what led to it."""
    from transformers import LlamaConfig, LlamaForCausalLM, get_cosine_schedule_with_warmup

    torch.set_num_threads(1)
    contender = next(c for c in CONTENDERS if c.name == run.name)
    rows, held_out = tokenized(cache)
    torch.manual_seed(run.seed)
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=HIDDEN * 11 // 4,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        vocab_size=VOCABULARY,
        max_position_embeddings=LENGTH,
        use_cache=False,
    )
    model = LlamaForCausalLM(config)
    batches = torch.randperm(len(rows), generator=torch.Generator().manual_seed(run.seed))
    optimizer = contender.build(model, run.lr, contender.options)
    schedule = get_cosine_schedule_with_warmup(optimizer, int(WARMUP * run.steps), run.steps)
    start = time.perf_counter()
    for step in range(run.steps):
        chosen = batches[torch.arange(step * ROWS, (step + 1) * ROWS) % len(batches)]
        loss = model(input_ids=rows[chosen], labels=rows[chosen]).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if not math.isfinite(loss.item()):
            break
    seconds = time.perf_counter() - start
    model.eval()
    with torch.no_grad():
        losses = [model(input_ids=part, labels=part).loss.item() for part in held_out.split(16)]
    return {**dataclasses.asdict(run), "loss": statistics.fmean(losses), "seconds": round(seconds, 1)}


# ---- the table


class Results:
    """The finished runs, in memory and as lines of a file."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._lines: dict[Run, dict[str, Any]] = {}
        if path is not None and path.exists():
            for line in path.read_text().splitlines():
                self._keep(json.loads(line))

    def _keep(self, line: dict[str, Any]) -> None:
        self._lines[Run(**{field.name: line[field.name] for field in dataclasses.fields(Run)})] = line

    def add(self, line: dict[str, Any]) -> None:
        self._keep(line)
        if self._path is not None:
            with self._path.open("a") as file:
                file.write(json.dumps(line) + "\n")

    def missing(self, runs: Iterable[Run]) -> list[Run]:
        return [run for run in dict.fromkeys(runs) if run not in self._lines]

    def loss(self, run: Run) -> float | None:
        line = self._lines.get(run)
        return None if line is None else float(line["loss"])

    def best_rate(self, contender: Contender, seed: int, steps: int) -> float | None:
        """The learning rate with the lowest loss, of the sweep or of the row that it is taken from."""
        if contender.rate_of is not None:
            contender = next(c for c in CONTENDERS if c.name == contender.rate_of)
        tried = [(self.loss(Run(contender.name, lr, seed, steps)), lr) for lr in contender.rates]
        known = [(loss, lr) for loss, lr in tried if loss is not None and math.isfinite(loss)]
        return min(known)[1] if known else None


def perform(runs: list[Run], results: Results, workers: int, cache: Path, console: Console) -> None:
    runs = results.missing(runs)
    if not runs:
        return
    tokenized(cache)  # once, before the workers ask for it
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        futures = [pool.submit(train, run, cache) for run in runs]
        for future in track(as_completed(futures), "Runs", total=len(futures), console=console, transient=True):
            line = future.result()
            results.add(line)
            console.print(f"{line['name']:46} lr {line['lr']:.0e}  seed {line['seed']}  {line['loss']:.4f}")


def print_table(chosen: list[Contender], results: Results, seeds: list[int], steps: int, console: Console) -> None:
    table = Table("optimizer", title=f"Held-out loss after {steps} steps")
    for header in ("lr", *(f"seed {seed}" for seed in seeds), "mean", "× two rates"):
        table.add_column(header, justify="right")
    baseline = next(c for c in CONTENDERS if c.name == "AdamW, two rates")

    def mean(contender: Contender) -> float | None:
        lr = results.best_rate(contender, seeds[0], steps)
        losses = [] if lr is None else [results.loss(Run(contender.name, lr, seed, steps)) for seed in seeds]
        known = [loss for loss in losses if loss is not None]
        return statistics.fmean(known) if known and len(known) == len(seeds) else None

    for contender in chosen:
        lr = results.best_rate(contender, seeds[0], steps)
        if lr is None:
            continue
        losses = [results.loss(Run(contender.name, lr, seed, steps)) for seed in seeds]
        own, other = mean(contender), mean(baseline)
        table.add_row(
            contender.name,
            f"{lr:.0e}",
            *("" if loss is None else f"{loss:.4f}" for loss in losses),
            "" if own is None else f"{own:.4f}",
            "" if own is None or other is None else f"{own / other:.4f}",
        )
    console.print(table)
    sweeps = Table("optimizer", "lr: loss", title=f"Learning rates, seed {seeds[0]}")
    for contender in chosen:
        tried = [(lr, results.loss(Run(contender.name, lr, seeds[0], steps))) for lr in contender.rates]
        if contender.rates:
            sweeps.add_row(contender.name, ", ".join(f"{lr:.0e}: {loss:.4f}" for lr, loss in tried if loss is not None))
    console.print(sweeps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2], help="the first one chooses the learning rates")
    names = [contender.name.strip() for contender in CONTENDERS]
    parser.add_argument("--only", nargs="+", choices=names, metavar="ROW", help=f"of: {'; '.join(names)}")
    parser.add_argument("--results", type=Path, help="a file of finished runs to read and to add to")
    parser.add_argument("--table", action="store_true", help="print what --results holds, and run nothing")
    parser.add_argument("--short", action="store_true", help="200 steps, one seed, the three main rows, one rate each")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="runs at a time, of one thread each")
    parser.add_argument("--cache", type=Path, default=CACHE, help="a file for the tokens")
    args = parser.parse_args()
    console = Console(width=120)
    steps, seeds = (200, args.seeds[:1]) if args.short else (args.steps, args.seeds)
    only = args.only or (MAIN if args.short else None)
    chosen = [c for c in CONTENDERS if only is None or c.name.strip() in only]
    needed = {c.rate_of for c in chosen}
    sweeping = [c for c in CONTENDERS if c in chosen or c.name in needed]
    if args.short:
        sweeping = chosen = [dataclasses.replace(c, rates=c.rates[1:2]) for c in chosen]
    console.print(
        f"torch {torch.__version__}; Llama of {HIDDEN} × {LAYERS} layers, vocabulary {VOCABULARY}; {ROWS} × {LENGTH} "
        f"tokens a step; rank {RANK}, gap {GAP}, scale {SCALE}"
    )
    results = Results(args.results)
    if args.table:
        print_table(chosen, results, seeds, steps, console)
        return
    perform(
        [Run(c.name, lr, seeds[0], steps) for c in sweeping for lr in c.rates],
        results,
        args.workers,
        args.cache,
        console,
    )
    rates = {c.name: results.best_rate(c, seeds[0], steps) for c in chosen}
    final = [Run(name, lr, seed, steps) for seed in seeds for name, lr in rates.items() if lr is not None]
    perform(final, results, args.workers, args.cache, console)
    print_table(chosen, results, seeds, steps, console)


if __name__ == "__main__":
    main()
