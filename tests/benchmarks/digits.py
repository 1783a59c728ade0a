"""A ResNet and a vision transformer on real images: GaLore beside AdamW, each at the best of three learning rates.

    python -m tests.benchmarks.digits --results digits.jsonl     # 100 runs, 7 seconds each on an idle core
    python -m tests.benchmarks.digits --results digits.jsonl --table

scikit-learn's handwritten digits: 1,797 images of 8 × 8 pixels, in five stratified folds. A run trains on three of
them; the fourth chooses the learning rate, and the fifth is tested. Five runs with the folds in turn test every image
once. The rate is the one with the most right in the five validation parts at the first seed; at that rate come the
other seeds, each with folds, weights and batches of its own. So a mean over three seeds is of 5,391 tested images, and
its difference from AdamW's of 15 pairs of runs.

`all-linear`, the rank a quarter of the width, and transformers' own models from tiny configs with random weights. The
ResNet sees images of 32 × 32, for its stem halves them twice. With --results every finished run is a line of that file,
and a run that is there already is not repeated.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import os
import statistics
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import StratifiedKFold
from torch import Tensor, nn
from transformers import (
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    get_cosine_schedule_with_warmup,
)

from hf_galore import make_optimizer
from tests.benchmarks.runs import Runs

FOLDS, BATCH, WARMUP = 5, 64, 0.1
GAP, SCALE = 20, 2
OPTIMIZERS = ADAMW, GALORE = "AdamW", "galore_adamw"


@dataclasses.dataclass(frozen=True)
class Setting:
    """A model, how large its images are, how long it trains, and what is tried."""

    model: Any
    config: Any
    pixels: int
    epochs: int
    rank: int
    rates: tuple[float, ...]


SETTINGS = {
    "ResNet": Setting(
        ResNetForImageClassification,
        ResNetConfig(
            num_channels=1,
            num_labels=10,
            embedding_size=32,
            hidden_sizes=[64, 128],
            depths=[1, 1],
            layer_type="basic",
        ),
        pixels=32,
        epochs=15,
        rank=32,
        rates=(1e-3, 3e-3, 1e-2),
    ),
    "ViT": Setting(
        ViTForImageClassification,
        ViTConfig(
            image_size=8,
            patch_size=2,
            num_channels=1,
            num_labels=10,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
        ),
        pixels=8,
        epochs=30,
        rank=16,
        rates=(3e-4, 1e-3, 3e-3),
    ),
}


@dataclasses.dataclass(frozen=True)
class Run:
    """What one training is made from."""

    model: str
    optimizer: str
    lr: float
    seed: int
    fold: int
    epochs: int


@functools.cache
def images(pixels: int) -> tuple[Tensor, Tensor]:
    """All images, N × 1 × `pixels` × `pixels` from -1 to 1, and their labels."""
    data = load_digits()
    small = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    return nn.functional.interpolate(small, size=pixels, mode="nearest"), torch.tensor(data.target)


def parts(seed: int, fold: int) -> tuple[Tensor, Tensor, Tensor]:
    """The numbers of the images to train on, to choose the learning rate by, and to test."""
    _, labels = images(8)
    splitter = StratifiedKFold(FOLDS, shuffle=True, random_state=seed)
    folds = [torch.as_tensor(chosen) for _, chosen in splitter.split(labels, labels)]
    validated = (fold + 1) % FOLDS
    trained = [chosen for number, chosen in enumerate(folds) if number not in (fold, validated)]
    return torch.cat(trained), folds[validated], folds[fold]


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """The bytes of all tensors of an optimizer's state."""
    tensors = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def train(run: Run) -> dict[str, Any]:
    """Train, and return what is right of the validation and test parts, with the bytes of the optimizer's state."""
    torch.set_num_threads(1)
    setting = SETTINGS[run.model]
    pictures, labels = images(setting.pixels)
    trained, validated, tested = parts(run.seed, run.fold)
    torch.manual_seed(FOLDS * run.seed + run.fold)
    model = setting.model(setting.config)
    projected = 0
    if run.optimizer == GALORE:
        options = {"rank": setting.rank, "update_proj_gap": GAP, "scale": SCALE}
        galore = make_optimizer(model, "all-linear", optim=GALORE, optim_args=options, lr=run.lr)
        optimizer: torch.optim.Optimizer = galore
        projected = galore.memory().targets
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=run.lr, weight_decay=0.0)
    steps = run.epochs * math.ceil(len(trained) / BATCH)
    schedule = get_cosine_schedule_with_warmup(optimizer, int(WARMUP * steps), steps)
    model.train()
    for _ in range(run.epochs):
        for chosen in trained[torch.randperm(len(trained))].split(BATCH):
            model(pixel_values=pictures[chosen], labels=labels[chosen]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    model.eval()

    def right(chosen: Tensor) -> tuple[int, float]:
        with torch.no_grad():
            scores = model(pixel_values=pictures[chosen]).logits
        loss = nn.functional.cross_entropy(scores, labels[chosen], reduction="sum")
        return int((scores.argmax(-1) == labels[chosen]).sum()), float(loss)

    validation_right, validation_loss = right(validated)
    test_right, test_loss = right(tested)
    return {
        "validation_right": validation_right,
        "validation_loss": validation_loss,
        "validation_images": len(validated),
        "test_right": test_right,
        "test_loss": test_loss,
        "test_images": len(tested),
        "state_bytes": state_bytes(optimizer),
        "projected": projected,
    }


# ---- the table


def folds(model: str, optimizer: str, lr: float, seed: int) -> list[Run]:
    """The runs that test every image once."""
    return [Run(model, optimizer, lr, seed, fold, SETTINGS[model].epochs) for fold in range(FOLDS)]


def per_cent(lines: list[dict[str, Any]], part: str) -> float:
    """What is right of all images of a part of the runs, in %."""
    right, images = (sum(int(line[f"{part}_{what}"]) for line in lines) for what in ("right", "images"))
    return 100 * right / images


def best_rate(model: str, optimizer: str, seed: int, runs: Runs[Run]) -> float | None:
    """The rate with the most right in the validation parts, of equals the one of the lowest loss there."""
    tried = []
    for lr in SETTINGS[model].rates:
        lines = runs.of(folds(model, optimizer, lr, seed))
        if lines is None:
            return None
        tried.append((per_cent(lines, "validation"), -sum(line["validation_loss"] for line in lines), lr))
    return max(tried)[2]


def print_tables(models: list[str], seeds: list[int], runs: Runs[Run], console: Console) -> None:
    table = Table("model", "optimizer", title="Accuracy on the tested fifth, every image once for each seed, in %")
    for header in ("lr", *(f"seed {seed}" for seed in seeds), "mean", "state, KiB", "projected"):
        table.add_column(header, justify="right")
    swept = Table("model", "optimizer", "lr: % right in validation parts", title=f"Learning rates, seed {seeds[0]}")
    notes = []
    for model in models:
        pairs: list[list[float]] = []
        for optimizer in OPTIMIZERS:
            sweep = {lr: runs.of(folds(model, optimizer, lr, seeds[0])) for lr in SETTINGS[model].rates}
            told = [f"{lr:.0e}: {per_cent(lines, 'validation'):.2f}" for lr, lines in sweep.items() if lines]
            swept.add_row(model, optimizer, ", ".join(told))
            lr = best_rate(model, optimizer, seeds[0], runs)
            found = [] if lr is None else [runs.of(folds(model, optimizer, lr, seed)) for seed in seeds]
            of_seeds = [lines for lines in found if lines is not None]
            if lr is None or len(of_seeds) < len(seeds):
                continue
            means = [per_cent(lines, "test") for lines in of_seeds]
            pairs.append([per_cent([line], "test") for lines in of_seeds for line in lines])
            table.add_row(
                model,
                optimizer,
                f"{lr:.0e}",
                *(f"{mean:.2f}" for mean in means),
                f"{statistics.fmean(means):.2f}",
                f"{of_seeds[0][0]['state_bytes'] / 1024:,.0f}",
                str(of_seeds[0][0]["projected"]),
            )
        if len(pairs) == len(OPTIMIZERS):
            differences = [ours - theirs for theirs, ours in zip(*pairs, strict=True)]
            error = statistics.stdev(differences) / math.sqrt(len(differences))
            mean = statistics.fmean(differences)
            notes.append(f"{model}: {mean:+.2f} ± {error:.2f} points (standard error over {len(differences)} pairs)")
    console.print(table, swept, *notes, sep="\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="the first one chooses the rates")
    parser.add_argument("--results", type=Path, help="a file of finished runs to read and to add to")
    parser.add_argument("--table", action="store_true", help="print what --results holds, and run nothing")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="runs at a time, of one thread each")
    args = parser.parse_args()
    console = Console(width=120)
    runs: Runs[Run] = Runs(Run, args.results)
    if not args.table:
        rows = [(model, optimizer) for model in args.models for optimizer in args.optimizers]
        sweep = [run for m, o in rows for lr in SETTINGS[m].rates for run in folds(m, o, lr, args.seeds[0])]
        runs.perform(sweep, train, args.workers, console)
        final = []
        for seed in args.seeds:
            for model, optimizer in rows:
                lr = best_rate(model, optimizer, args.seeds[0], runs)
                final += [] if lr is None else folds(model, optimizer, lr, seed)
        runs.perform(final, train, args.workers, console)
    print_tables(args.models, args.seeds, runs, console)


if __name__ == "__main__":
    main()
