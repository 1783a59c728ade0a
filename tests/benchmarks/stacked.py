"""Whether weights that are several in one are better projected part by part: q, k and v; gate and up; an LSTM's gates.

    python -m tests.benchmarks.stacked energy                          # minutes
    python -m tests.benchmarks.stacked loss --results stacked.jsonl    # half an hour on 2 idle cores

Small models read the sources of the Python standard library, byte by byte: Phi-3, which has q, k and v one below the
other and so gate and up; GPT-2, which has q, k and v side by side; an LSTM, which has four gates one below the other.

`energy` trains by AdamW, takes the gradients of the stacked weights every 20 steps, and says which share of their
energy the best bases hold: of the whole, of each part at the same rank, and of the whole at the rank that takes the
bytes of the parts. "Later" is what those bases hold of the gradients of 20 steps later.

`loss` trains by GaLoreAdamW in these three ways, all matrices projected. Parts are parameters of their own there, put
together in the forward pass: the arithmetic of `view_as`, for columns too. `scale` is the root of width / rank. The
learning rate of each way is the best of three at the first seed and rank; "as many bytes" has the whole's.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import os
import statistics
from collections.abc import Callable
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
WAYS = (WHOLE, PARTS, BYTES)


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
    return Phi3ForCausalLM(config)


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
    return GPT2LMHeadModel(config)


@dataclasses.dataclass(frozen=True)
class Kind:
    """A model, and its stacked weights: the ends of their names, with the number of parts and their dimension."""

    make: Callable[[], nn.Module]
    stacked: dict[str, tuple[int, int]]

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


def leading(gradient: Tensor, rank: int) -> Tensor:
    """The leading singular vectors of the smaller side, as columns."""
    u, _, v = torch.linalg.svd(gradient, full_matrices=False)
    return u[:, :rank] if gradient.shape[0] < gradient.shape[1] else v[:rank].mT


def held(gradient: Tensor, basis: Tensor) -> float:
    """The energy of a gradient in a basis of its smaller side."""
    product = basis.mT @ gradient if gradient.shape[0] < gradient.shape[1] else gradient @ basis
    return float(product.square().sum())


def as_many_bytes(shape: torch.Size, count: int, dim: int, rank: int, moment_bytes: int) -> int:
    """The rank at which the whole takes the bytes that its parts take at `rank`, with bases in 4 bits."""
    m, n = shape
    part = (m // count, n) if dim == 0 else (m, n // count)

    def needed(sides: tuple[int, ...], rank: int) -> float:
        return rank * (2 * moment_bytes * max(sides) + min(sides) / 2)

    return round(count * needed(part, rank) / needed((m, n), 1))


def energies(kind: Kind, rank: int, steps: int, seed: int) -> dict[str, dict[str, list[float]]]:
    """The shares of energy, by the end of a weight's name and the way of projecting it; later ones with "later"."""
    torch.manual_seed(seed)
    model = kind.make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATES[1], weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, int(WARMUP * steps), steps)
    watched = {name: param for name, param in model.named_parameters() if kind.parts_of(name)}
    shares: dict[str, dict[str, list[float]]] = {end: {} for end in kind.stacked}
    bases: dict[tuple[str, str], list[Tensor]] = {}
    for step, chosen in enumerate(batches(seed, steps), start=1):
        loss_of(model, chosen, {}).backward()
        if step % EVERY == 0:
            for name, param in watched.items():
                count, dim = kind.parts_of(name) or (1, 0)
                assert param.grad is not None
                whole, parts = [param.grad.clone()], list(param.grad.clone().chunk(count, dim))
                end = next(end for end in kind.stacked if name.endswith(end))
                total = float(param.grad.square().sum())
                for way, pieces, r in (
                    (WHOLE, whole, rank),
                    (PARTS, parts, rank),
                    (f"{BYTES} (moments in 32 bits)", whole, as_many_bytes(param.shape, count, dim, rank, 4)),
                    (f"{BYTES} (in 8 bits)", whole, as_many_bytes(param.shape, count, dim, rank, 1)),
                ):
                    if (name, way) in bases:
                        old = sum(map(held, pieces, bases[name, way]))
                        shares[end].setdefault(f"{way}, later", []).append(old / total)
                    bases[name, way] = [leading(piece, r) for piece in pieces]
                    shares[end].setdefault(way, []).append(sum(map(held, pieces, bases[name, way])) / total)
        nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return shares


def print_energies(steps: int, seeds: list[int], console: Console) -> None:
    for rank in RANKS:
        table = Table("model", "weight", title=f"Captured energy, in %, of {steps} steps: rank {rank} of {WIDTH}")
        ways = [WHOLE, PARTS, f"{BYTES} (moments in 32 bits)", f"{BYTES} (in 8 bits)"]
        for header in (*ways, f"{WHOLE}, later", f"{PARTS}, later"):
            table.add_column(header, justify="right")
        for model, kind in KINDS.items():
            found = [energies(kind, rank, steps, seed) for seed in seeds]
            for end in kind.stacked:
                means = [
                    100 * statistics.fmean(share for shares in found for share in shares[end][way])
                    for way in (*ways, f"{WHOLE}, later", f"{PARTS}, later")
                ]
                table.add_row(model, end, *(f"{mean:.1f}" for mean in means))
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
    pieces = {name: [param] for name, param in stacked.items()}
    for name, param in stacked.items():
        count, dim = kind.parts_of(name) or (1, 0)
        if run.way == PARTS:
            pieces[name] = [nn.Parameter(part.detach().clone()) for part in param.chunk(count, dim)]
        elif run.way == BYTES:
            ranks[name] = as_many_bytes(param.shape, count, dim, run.rank, 4)
    options = {"update_proj_gap": GAP, "scale": math.sqrt(WIDTH / run.rank)}
    groups = [{"params": rest}]
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
        if run.way != PARTS:
            return {}
        return {name: torch.cat(parts, (kind.parts_of(name) or (1, 0))[1]) for name, parts in pieces.items()}

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
    way = WHOLE if way == BYTES else way
    found = runs.of(Run(model, way, RANKS[0], lr, seed, steps) for lr in RATES)
    return None if found is None else min(zip((line["loss"] for line in found), RATES, strict=True))[1]


def print_losses(seeds: list[int], steps: int, runs: Runs[Run], console: Console) -> None:
    table = Table("model", "rank", "projected", title=f"Held-out loss after {steps} steps, nats a byte")
    for header in ("lr", *(f"seed {seed}" for seed in seeds), "mean", "beside the whole", "KiB"):
        table.add_column(header, justify="right")
    for model in KINDS:
        for rank in RANKS:
            reference: list[float] = []
            for way in WAYS:
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
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="the first one chooses the rates")
    parser.add_argument("--results", type=Path, help="a file of finished runs to read and to add to")
    parser.add_argument("--table", action="store_true", help="print what --results holds, and run nothing")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="runs at a time, of one thread each")
    args = parser.parse_args()
    console = Console(width=140)
    if args.what == "energy":
        torch.set_num_threads(1)
        print_energies(args.steps, args.seeds, console)
        return
    runs: Runs[Run] = Runs(Run, args.results)
    if not args.table:
        sweep = [
            Run(model, way, RANKS[0], lr, args.seeds[0], args.steps)
            for model in KINDS
            for way in (WHOLE, PARTS)
            for lr in RATES
        ]
        runs.perform(sweep, train, args.workers, console)
        final = []
        for rank in RANKS:
            for seed in args.seeds:
                for model in KINDS:
                    for way in WAYS:
                        lr = best_rate(model, way, args.seeds[0], args.steps, runs)
                        if lr is not None:
                            final.append(Run(model, way, rank, lr, seed, args.steps))
        runs.perform(final, train, args.workers, console)
    print_losses(args.seeds, args.steps, runs, console)


if __name__ == "__main__":
    main()
