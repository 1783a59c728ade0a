"""What weights in 8 bits do to the loss: Llamas trained from scratch, and fine-tuned, with float and with int8 weights.

    python -m tests.benchmarks.int8_quality --results int8.jsonl              # all of it: hours on CPUs
    python -m tests.benchmarks.int8_quality --tasks fine-tuning --seeds 1 --only float int8
    python -m tests.benchmarks.int8_quality --size tiny --seeds 1             # minutes
    python -m tests.benchmarks.int8_quality --results int8.jsonl --table

A Llama 256 wide of 4 layers (5.3M parameters, vocabulary 4,096) learns the sources of the Python standard library: 600
steps of 16 × 128 tokens, AdamW at rank 64 as `galore_adamw_layerwise` has it, a refresh every 100 steps, cosine with
10 % warmup, clipped to a norm of 1. Fine-tuning goes on from weights that AdamW has made of these sources in as many
steps, in float32, with the docstrings of torch and transformers, at a quarter of the rate and half as many steps.

Weights are those of all linear layers but the head. `float` are float32. `int8` are `Int8Weight`s whose values and
products are float32 too: what differs is how weights are kept and updated, and nothing else. `int8, nearest` has
updates rounded to the nearest, which the library does not offer: it shows what random rounding is for. `bfloat16` is a
model of that dtype, with stochastic_rounding=true; `int8 in bfloat16` the same with int8 weights (for a card).

The loss is that of held-out rows, in nats a token; runs of a seed begin with the same values, which for int8 weights
are rounded, and see the same batches.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import functools
import importlib.util
import statistics
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, get_cosine_schedule_with_warmup

from hf_galore import make_optimizer
from hf_galore.int8 import add_int8_
from hf_galore.optim import trained as where_updates_are
from tests.benchmarks.quality import standard_library
from tests.benchmarks.runs import Runs
from tests.benchmarks.texts import docstrings
from tests.support.int8 import in_8_bits

CONTENDERS = ("float", "int8", "int8, nearest", "bfloat16", "int8 in bfloat16")
TASKS = ("pretraining", "fine-tuning")
WARMUP, MAX_NORM = 0.1, 1.0


@dataclasses.dataclass(frozen=True)
class Size:
    """Of a model, its batches and its runs."""

    hidden: int
    layers: int
    intermediate: int
    vocabulary: int
    rows: int
    length: int
    rank: int
    gap: int
    steps: int
    lr: float
    held_out: int
    scale: float = 0.125


SIZES = {
    "small": Size(256, 4, 704, 4096, 16, 128, 64, 100, 600, 1e-2, 256),
    "tiny": Size(64, 2, 176, 256, 8, 64, 16, 25, 150, 1e-2, 64),
}


@dataclasses.dataclass(frozen=True)
class Run:
    """What one training is made from."""

    task: str
    contender: str
    size: str
    steps: int
    lr: float
    seed: int


# ---- texts


def _sources(package: str) -> list[str]:
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    paths = sorted(Path(spec.origin).parent.rglob("*.py"))
    return [path.read_text("utf-8", errors="ignore") for path in paths[::4]]


def texts() -> dict[str, tuple[list[str], list[str]]]:
    """What is learnt in each task, and what of its kind is held out."""
    english = [text for package in ("torch", "transformers") for file in _sources(package) for text in docstrings(file)]
    english = [text for text in dict.fromkeys(english) if len(text) > 100]
    held_out = english[::20]
    return {
        "pretraining": standard_library(),
        "fine-tuning": ([text for index, text in enumerate(english) if index % 20], held_out),
    }


@functools.cache
def tokenized(size: Size) -> dict[str, tuple[Tensor, Tensor]]:
    """Rows of tokens to train on and held-out ones, of each task; bytes where the vocabulary has no more."""
    cache = Path(tempfile.gettempdir()) / f"hf_galore_int8_{size.vocabulary}_{size.length}.pt"
    if not cache.exists():
        from tokenizers import ByteLevelBPETokenizer

        found = texts()
        tokenizer = ByteLevelBPETokenizer()
        if size.vocabulary > 256:
            tokenizer.train_from_iterator(found["pretraining"][0], vocab_size=size.vocabulary, show_progress=False)

        def rows(parts: Iterable[str]) -> Tensor:
            if size.vocabulary > 256:
                ids = torch.tensor([token for part in parts for token in tokenizer.encode(part).ids])
            else:
                ids = torch.frombuffer(bytearray("\n".join(parts).encode()), dtype=torch.uint8)
            return ids[: len(ids) // size.length * size.length].view(-1, size.length).to(torch.int16)

        torch.save({task: (rows(train), rows(held_out)) for task, (train, held_out) in found.items()}, cache)
    loaded = torch.load(cache, weights_only=True)
    some = {}
    for task, (train, held_out) in loaded.items():
        scattered = torch.randperm(len(held_out), generator=torch.Generator().manual_seed(0))[: size.held_out]
        some[task] = train.long(), held_out[scattered].long()
    return some


# ---- models


def llama(size: Size, seed: int) -> LlamaForCausalLM:
    """One as transformers initialises it."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=size.hidden,
            intermediate_size=size.intermediate,
            num_hidden_layers=size.layers,
            num_attention_heads=4,
            vocab_size=size.vocabulary,
            max_position_embeddings=size.length,
            use_cache=False,
        )
    )


def learn(
    model: LlamaForCausalLM, optimizer: torch.optim.Optimizer, rows: Tensor, steps: int, seed: int, batch: int
) -> None:
    """Train a model."""
    device = model.lm_head.weight.device
    schedule = get_cosine_schedule_with_warmup(optimizer, int(WARMUP * steps), steps)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    clip = getattr(optimizer, "clip_grad_norm_", None)
    for step in range(steps):
        ids = rows[order[torch.arange(step * batch, (step + 1) * batch) % len(order)]].to(device)
        model(input_ids=ids, labels=ids).loss.backward()
        if clip is None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        else:
            clip(MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, rows: Tensor) -> float:
    """The mean loss of rows."""
    parts = rows.to(model.lm_head.weight.device).split(32)
    losses = [float(model(input_ids=part, labels=part).loss.double()) * len(part) for part in parts]
    return sum(losses) / len(rows)


def pretrained(size_name: str, steps: int, seed: int, device: str) -> LlamaForCausalLM:
    """A model that AdamW has trained in float32; kept in a file."""
    size = SIZES[size_name]
    cache = Path(tempfile.gettempdir()) / f"hf_galore_int8_{size_name}_{steps}_{seed}.pt"
    model = llama(size, seed).to(device)
    if cache.exists():
        model.load_state_dict(torch.load(cache, weights_only=True))
        return model
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.0)
    learn(model, optimizer, tokenized(size)["pretraining"][0], steps, seed, size.rows)
    torch.save(model.state_dict(), cache)
    return model


def as_contender(model: LlamaForCausalLM, contender: str) -> LlamaForCausalLM:
    """The model with the weights that a contender has."""
    if contender.startswith("int8"):
        in_8_bits(model, but=["lm_head"])
    return model.bfloat16() if "bfloat16" in contender else model


@contextlib.contextmanager
def rounding_of(contender: str) -> Iterator[None]:
    """Within, updates are rounded as a contender has it."""

    def to_nearest(*args: Any, generator: Any = None, **kwargs: Any) -> None:
        add_int8_(*args, **kwargs)

    if contender == "int8, nearest":
        with mock.patch.object(where_updates_are, "add_int8_", to_nearest):
            yield
    else:
        yield


def train(run: Run, device: str = "cpu", start: LlamaForCausalLM | None = None) -> dict[str, Any]:
    """Train, and return the losses before and after.

    Args:
        start: what to begin with, of which a copy is trained; by default what the task says.
    """
    torch.set_num_threads(1)
    size = SIZES[run.size]
    rows, held_out = tokenized(size)[run.task]
    if start is not None:
        model = copy.deepcopy(start)
    elif run.task == "fine-tuning":
        model = pretrained(run.size, size.steps, run.seed, device)
    else:
        model = llama(size, run.seed).to(device)
    as_contender(model, run.contender)
    before = held_out_loss(model, held_out)
    torch.manual_seed(run.seed)
    optimizer = make_optimizer(
        model,
        ["attn", "mlp"],
        optim="galore_adamw_layerwise",
        optim_args=f"rank={size.rank}, update_proj_gap={size.gap}, scale={size.scale}"
        + (", stochastic_rounding=true" if "bfloat16" in run.contender else ""),
        lr=run.lr,
        hold_gradients=True,
    )
    with rounding_of(run.contender):
        learn(model, optimizer, rows, run.steps, run.seed, size.rows)
    optimizer.close()
    return {"before": before, "loss": held_out_loss(model, held_out)}


# ---- tables


def runs_of(task: str, contender: str, args: argparse.Namespace) -> list[Run]:
    """The runs of a row of the table."""
    size = SIZES[args.size]
    part = 1 if task == "pretraining" else 2
    steps = args.steps or size.steps // part
    lr = size.lr if task == "pretraining" else size.lr / 4
    return [Run(task, contender, args.size, steps, lr, seed) for seed in args.seeds]


def print_table(results: Runs[Run], args: argparse.Namespace, console: Console) -> None:
    """The losses of each contender, and their ratio to those of float weights."""
    for task in args.tasks:
        table = Table("weights", "before", "loss", "ratio to float", "by seed", title=f"{task}, held-out loss")
        base = results.of(runs_of(task, "float", args))
        for contender in args.only:
            lines = results.of(runs_of(task, contender, args))
            if lines is None:
                continue
            losses = [line["loss"] for line in lines]
            ratios: Sequence[float] = [] if base is None else [a / b["loss"] for a, b in zip(losses, base, strict=True)]
            table.add_row(
                contender,
                f"{statistics.fmean(line['before'] for line in lines):.4f}",
                f"{statistics.fmean(losses):.4f}",
                f"{statistics.fmean(ratios):.4f}" if ratios else "",
                ", ".join(f"{ratio:.4f}" for ratio in ratios),
            )
        console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), default="small")
    parser.add_argument("--steps", type=int, help="by default what the size says, and half of that to fine-tune")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=list(CONTENDERS[:3]))
    parser.add_argument("--results", type=Path, help="a file of finished runs to read and to add to")
    parser.add_argument("--table", action="store_true", help="print what --results holds, and run nothing")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    console = Console(width=120)
    results = Runs(Run, args.results)
    if not args.table:
        size = SIZES[args.size]
        tokenized(size)
        if "fine-tuning" in args.tasks:  # once, and not by each of several workers
            for seed in args.seeds:
                pretrained(args.size, size.steps, seed, args.device)
        runs = [run for task in args.tasks for name in args.only for run in runs_of(task, name, args)]
        results.perform(runs, functools.partial(train, device=args.device), args.workers, console)
    print_table(results, args, console)


if __name__ == "__main__":
    main()
