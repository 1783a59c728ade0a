"""Whether weights that are several in one are better projected part by part: q, k and v; gate and up; an LSTM's gates.

    python -m tests.benchmarks.stacked energy                          # 2 minutes on an idle core
    python -m tests.benchmarks.stacked loss --results stacked.jsonl    # 90 runs, 7 seconds each on an idle core

Small models read the sources of the Python standard library, byte by byte: Phi-3, which has q, k and v one below the
other and so gate and up; GPT-2, which has q, k and v side by side; an LSTM, which has four gates one below the other.

`energy` trains by AdamW, takes the gradients of the stacked weights every 20 steps, and says which share of their
energy the best bases hold: of the whole, of each part at the same rank, and of the whole at the rank that takes the
bytes of the parts, with moments in 8 bits. "Later" is what those bases hold of the gradients of 20 steps later. A basis
of the whole goes by the part with the most energy, so there is the share of the part that comes off worst, too.

`loss` trains by GaLoreAdamW in these three ways, all matrices projected. Parts are parameters of their own there, put
together in the forward pass: the arithmetic of `view_as`, for columns too. `scale` is the root of width / rank. The
learning rate of whole and parts is the best of three at the first seed and rank; "as many bytes" has the whole's.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import os
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, Phi3Config, Phi3ForCausalLM, get_cosine_schedule_with_warmup

from hf_galore import GaLoreAdamW
from tests.benchmarks.gradient_bits import LENGTH, rows
from tests.benchmarks.runs import Runs

WIDTH, BATCH, WARMUP, MAX_NORM = 128, 4, 0.1, 1.0
RANKS = (WIDTH // 4, WIDTH // 16)
GAP, EVERY = 50, 20
RATES = (1e-3, 2e-3, 4e-3)
WHOLE, PARTS, BYTES = "whole", "parts", "whole, as many bytes"


class CharacterLSTM(nn.Module):
    """An LSTM that predicts the next byte."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, WIDTH)
        self.lstm = nn.LSTM(WIDTH, WIDTH, batch_first=True)
        self.head = nn.Linear(WIDTH, 256)

    def forward(self, chosen: Tensor, weights: dict[str, Tensor]) -> Tensor:
        own = self.lstm._flat_weights
        # nn.LSTM reads this list, and not its attributes: what torch.func.functional_call replaces.
        names = self.lstm._flat_weights_names
        self.lstm._flat_weights = [weights.get(f"lstm.{n}", w) for n, w in zip(names, own, strict=True)]
        hidden, _ = self.lstm(self.embedding(chosen[:, :-1]))
        self.lstm._flat_weights = own
        return nn.functional.cross_entropy(self.head(hidden).flatten(0, 1), chosen[:, 1:].flatten())


def phi3() -> nn.Module:
    config = Phi3Config(
        hidden_size=WIDTH,
        intermediate_size=344,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=256,
        max_position_embeddings=LENGTH,
        original_max_position_embeddings=LENGTH,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
        use_cache=False,
    )
    model: nn.Module = Phi3ForCausalLM(config)
    return model


def gpt2() -> nn.Module:
    config = GPT2Config(
        vocab_size=256,
        n_embd=WIDTH,
        n_layer=2,
        n_head=4,
        n_positions=LENGTH,
        bos_token_id=None,
        eos_token_id=None,
        use_cache=False,
    )
    model: nn.Module = GPT2LMHeadModel(config)
    return model


@dataclasses.dataclass(frozen=True)
class Kind:
    """A model, and its stacked weights: the ends of their names, with the number of parts and their dimension."""

    make: Callable[[], nn.Module]
    stacked: dict[str, tuple[int, int]]

    def ways(self) -> dict[str, list[str]]:
        """The ways of projecting, each with the ends of the names of what is in parts then."""
        alone = {f"parts, {end} alone": [end] for end in self.stacked} if len(self.stacked) == 2 else {}
        return {WHOLE: [], PARTS: list(self.stacked), **alone, BYTES: []}

    def parts_of(self, name: str) -> tuple[int, int] | None:
        return next((found for end, found in self.stacked.items() if name.endswith(end)), None)


KINDS = {
    "Phi-3": Kind(phi3, {"qkv_proj.weight": (3, 0), "gate_up_proj.weight": (2, 0)}),
    "GPT-2": Kind(gpt2, {"c_attn.weight": (3, 1)}),
    "LSTM": Kind(CharacterLSTM, {"weight_ih_l0": (4, 0), "weight_hh_l0": (4, 0)}),
}


def loss_of(model: nn.Module, chosen: Tensor, weights: dict[str, Tensor]) -> Tensor:
    """The loss, with `weights` in place of the model's by those names."""
    if isinstance(model, CharacterLSTM):
        found: Tensor = model(chosen, weights)
        return found
    output = torch.func.functional_call(model, weights, kwargs={"input_ids": chosen, "labels": chosen})
    loss: Tensor = output.loss
    return loss


def is_projected(name: str, param: Tensor) -> bool:
    """Whether a parameter is a matrix, and neither an embedding nor the output head."""
    return param.ndim == 2 and not any(part in name for part in ("embed", "wte", "wpe", "head"))


def batches(seed: int, steps: int) -> list[Tensor]:
    train_rows, _ = text()
    order = torch.randperm(len(train_rows), generator=torch.Generator().manual_seed(seed))
    return [train_rows[order[torch.arange(step * BATCH, (step + 1) * BATCH) % len(order)]] for step in range(steps)]


@functools.cache
def text() -> tuple[Tensor, Tensor]:
    return rows()


# ---- energy


def leading(gradient: Tensor, rank: int, of_rows: bool) -> Tensor:
    """The leading directions of a gradient's rows, or of its columns: orthonormal columns."""
    u, _, v = torch.linalg.svd(gradient, full_matrices=False)
    basis: Tensor = v[:rank].mT if of_rows else u[:, :rank]
    return basis


def held(gradient: Tensor, basis: Tensor, of_rows: bool) -> float:
    """The energy of a gradient in a basis of the directions of its rows, or of its columns."""
    product = gradient @ basis if of_rows else basis.mT @ gradient
    return float(product.square().sum())


def shares_held(parts: Sequence[Tensor], bases: Sequence[Tensor], of_rows: bool) -> tuple[float, float]:
    """The share of energy in the bases, of all parts together and of the one with the least."""
    totals = [float(part.square().sum()) for part in parts]
    found = [held(part, basis, of_rows) for part, basis in zip(parts, bases, strict=True)]
    return sum(found) / sum(totals), min(part / total for part, total in zip(found, totals, strict=True))


def as_many_bytes(shape: torch.Size, count: int, dim: int, rank: int, moment_bytes: int) -> int:
    """The rank at which the whole takes the bytes that its parts take at `rank`, with bases in 4 bits."""
    m, n = shape
    part = (m // count, n) if dim == 0 else (m, n // count)

    def needed(sides: tuple[int, ...], rank: int) -> float:
        return rank * (2 * moment_bytes * max(sides) + min(sides) / 2)

    return round(count * needed(part, rank) / needed((m, n), 1))


LEAST, LATER = "the least of a part", "later"

Shares = dict[tuple[str, int, tuple[str, ...]], list[float]]
"""The shares of energy, by the end of a weight's name, the rank, and what they are of."""


def energies(kind: Kind, steps: int, seed: int, shares: Shares) -> None:
    """Train, and add to `shares`."""
    torch.manual_seed(seed)
    model = kind.make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATES[1], weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, int(WARMUP * steps), steps)
    watched = {name: param for name, param in model.named_parameters() if kind.parts_of(name)}
    bases: dict[tuple[str, int, str], list[Tensor]] = {}
    for step, chosen in enumerate(batches(seed, steps), start=1):
        loss_of(model, chosen, {}).backward()
        for name, param in watched.items() if step % EVERY == 0 else ():
            assert param.grad is not None
            end = next(end for end in kind.stacked if name.endswith(end))
            count, dim = kind.stacked[end]
            gradient = param.grad.clone()
            parts = gradient.chunk(count, dim)
            # The smaller side, of the whole and of its parts: parts below each other have their rows' directions in
            # common, parts side by side those of their columns.
            of_rows = dim == 0
            for rank in RANKS:
                more = as_many_bytes(param.shape, count, dim, rank, 1)
                new = {
                    WHOLE: [leading(gradient, rank, of_rows)] * count,
                    PARTS: [leading(part, rank, of_rows) for part in parts],
                    BYTES: [leading(gradient, more, of_rows)] * count,
                }
                for way, found in new.items():
                    old = bases.get((name, rank, way))
                    bases[name, rank, way] = found
                    for key, basis in (((way,), found), ((way, LATER), old)):
                        if basis is not None:
                            share, least = shares_held(parts, basis, of_rows)
                            shares.setdefault((end, rank, key), []).append(share)
                            shares.setdefault((end, rank, (*key, LEAST)), []).append(least)
        nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


def print_energies(models: list[str], steps: int, seeds: list[int], console: Console) -> None:
    found: dict[str, Shares] = {model: {} for model in models}
    for model in models:
        for seed in seeds:
            energies(KINDS[model], steps, seed, found[model])
    keys = [(way, *more) for more in ((), (LATER,), (LEAST,), (LATER, LEAST)) for way in (WHOLE, PARTS, BYTES)]
    for rank in RANKS:
        table = Table("of", "projected", title=f"Captured energy, in %, of {steps} steps: rank {rank} of {WIDTH}")
        for model in models:
            for end in KINDS[model].stacked:
                table.add_column(f"{model}, {end.removesuffix('.weight')}", justify="right")
        for way, *more in keys:
            means = [
                100 * statistics.fmean(found[model][end, rank, (way, *more)])
                for model in models
                for end in KINDS[model].stacked
            ]
            table.add_row(", ".join(more), way, *(f"{mean:.1f}" for mean in means))
        console.print(table)


# ---- loss


@dataclasses.dataclass(frozen=True)
class Run:
    """What one training is made from."""

    model: str
    way: str
    rank: int
    lr: float
    seed: int
    steps: int


def train(run: Run) -> dict[str, Any]:
    """Train, and return the held-out loss with the bytes of the optimizer's moments and bases of stacked weights."""
    torch.set_num_threads(1)
    kind = KINDS[run.model]
    torch.manual_seed(run.seed)
    model = kind.make()
    stacked = {name: param for name, param in model.named_parameters() if kind.parts_of(name)}
    rest = [param for name, param in model.named_parameters() if not is_projected(name, param)]
    plain = [p for name, p in model.named_parameters() if is_projected(name, p) and name not in stacked]
    ranks = dict.fromkeys(stacked, run.rank)
    pieces: dict[str, list[Tensor]] = {name: [param] for name, param in stacked.items()}
    for name, param in stacked.items():
        count, dim = kind.parts_of(name) or (1, 0)
        if name.endswith(tuple(kind.ways()[run.way])):
            pieces[name] = [nn.Parameter(part.detach().clone()) for part in param.chunk(count, dim)]
        elif run.way == BYTES:
            ranks[name] = as_many_bytes(param.shape, count, dim, run.rank, 4)
    options = {"update_proj_gap": GAP, "scale": math.sqrt(WIDTH / run.rank)}
    groups: list[dict[str, Any]] = [{"params": rest}]
    groups += [{"params": pieces[name], "rank": ranks[name], **options} for name in stacked]
    if plain:
        groups.append({"params": plain, "rank": run.rank, **options})
    optimizer = GaLoreAdamW(groups, lr=run.lr, weight_decay=0.0)
    trained = [param for group in optimizer.param_groups for param in group["params"]]
    of_stacked = {id(param) for parts in pieces.values() for param in parts}
    nbytes = sum(
        value.numel() * value.element_size()
        for param, state in optimizer.state.items()
        if id(param) in of_stacked
        for value in state.values()
        if isinstance(value, Tensor)
    )

    def weights() -> dict[str, Tensor]:
        divided = {name: parts for name, parts in pieces.items() if len(parts) > 1}
        return {name: torch.cat(parts, (kind.parts_of(name) or (1, 0))[1]) for name, parts in divided.items()}

    schedule = get_cosine_schedule_with_warmup(optimizer, int(WARMUP * run.steps), run.steps)
    for chosen in batches(run.seed, run.steps):
        loss_of(model, chosen, weights()).backward()
        nn.utils.clip_grad_norm_(trained, MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    _, held_out = text()
    with torch.no_grad():
        loss = float(loss_of(model, held_out, weights()))
    return {"loss": loss, "bytes": nbytes}


def best_rate(model: str, way: str, seed: int, steps: int, runs: Runs[Run]) -> float | None:
    """The rate of the lowest loss at `seed` and the first of `RANKS`."""
    way = PARTS if KINDS[model].ways()[way] else WHOLE
    found = runs.of(Run(model, way, RANKS[0], lr, seed, steps) for lr in RATES)
    return None if found is None else min(zip((line["loss"] for line in found), RATES, strict=True))[1]


def print_losses(models: list[str], seeds: list[int], steps: int, runs: Runs[Run], console: Console) -> None:
    table = Table("model", "rank", "projected", title=f"Held-out loss after {steps} steps, nats a byte")
    for header in ("lr", *(f"seed {seed}" for seed in seeds), "mean", "beside the whole", "KiB"):
        table.add_column(header, justify="right")
    for model in models:
        for rank in RANKS:
            reference: list[float] = []
            for way in KINDS[model].ways():
                lr = best_rate(model, way, seeds[0], steps, runs)
                found = None if lr is None else runs.of(Run(model, way, rank, lr, seed, steps) for seed in seeds)
                if lr is None or found is None:
                    continue
                losses = [line["loss"] for line in found]
                reference = reference or losses
                changes = [100 * (loss / other - 1) for loss, other in zip(losses, reference, strict=True)]
                spread = statistics.stdev(changes) if len(changes) > 1 else 0.0
                table.add_row(
                    model,
                    str(rank),
                    way,
                    f"{lr:.0e}",
                    *(f"{loss:.4f}" for loss in losses),
                    f"{statistics.fmean(losses):.4f}",
                    "" if way == WHOLE else f"{statistics.fmean(changes):+.2f} ± {spread:.2f} %",
                    f"{found[0]['bytes'] / 1024:,.0f}",
                )
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["energy", "loss"])
    parser.add_argument("--models", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="the first one chooses the rates")
    parser.add_argument("--results", type=Path, help="a file of finished runs to read and to add to")
    parser.add_argument("--table", action="store_true", help="print what --results holds, and run nothing")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="runs at a time, of one thread each")
    args = parser.parse_args()
    console = Console(width=170)
    if args.what == "energy":
        torch.set_num_threads(1)
        print_energies(args.models, args.steps, args.seeds, console)
        return
    runs: Runs[Run] = Runs(Run, args.results)
    if not args.table:
        sweep = [
            Run(model, way, RANKS[0], lr, args.seeds[0], args.steps)
            for model in args.models
            for way in (WHOLE, PARTS)
            for lr in RATES
        ]
        runs.perform(sweep, train, args.workers, console)
        final = []
        for rank in RANKS:
            for seed in args.seeds:
                for model in args.models:
                    for way in KINDS[model].ways():
                        lr = best_rate(model, way, args.seeds[0], args.steps, runs)
                        if lr is not None:
                            final.append(Run(model, way, rank, lr, seed, args.steps))
        runs.perform(final, train, args.workers, console)
    print_losses(args.models, args.seeds, args.steps, runs, console)


if __name__ == "__main__":
    main()
