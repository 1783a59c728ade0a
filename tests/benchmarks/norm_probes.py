"""How near the norm is that norm probes estimate, and what they cost a step.

    python -m tests.benchmarks.norm_probes error                       # 10 minutes on one core
    python -m tests.benchmarks.norm_probes cost                        # 5 minutes
    python -m tests.benchmarks.norm_probes cost --device cuda --dtype bfloat16 --hidden 4096 --rank 1024

`error`: the Llama of `tests.benchmarks.quality` (28 matrices to project) learns the sources of the Python standard
library, layerwise, clipped to a norm of 1, and every few steps the gradient itself is computed of a copy. Its norm is
compared with the one that clipping goes by, and with what other numbers of probes would say of the same gradient;
printed are the mean of the quotient and the root mean square of its distance from 1.

`cost`: copies of one Llama, which differ in `norm_probes` only, take a step each in turn (no refresh); printed is the
median over the rounds of the quotient of their times. On a CPU these are the times that the process has had of it,
which others on the machine change less.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from hf_galore import make_optimizer
from hf_galore.lowrank.probes import probes_for
from hf_galore.lowrank.projection import project, with_columns
from hf_galore.optim.optimizer import GaLoreOptimizer
from tests.benchmarks.quality import CACHE, HIDDEN, LAYERS, LENGTH, MAX_NORM, ROWS, VOCABULARY, tokenized
from tests.benchmarks.step import NEVER, llama

COUNTS = (0, 2, 4, 8, 16)
OF_THE_RUN = "of the run, 8"


def small_llama(seed: int) -> LlamaForCausalLM:
    """The model of `tests.benchmarks.quality`."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=HIDDEN,
            intermediate_size=HIDDEN * 11 // 4,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            vocab_size=VOCABULARY,
            max_position_embeddings=LENGTH,
            use_cache=False,
        )
    )


def told(optimizer: GaLoreOptimizer, gradients: dict[Tensor, Tensor], seed: int) -> dict[str, float]:
    """The norms that numbers of probes would say of these gradients, in the optimizer's present bases."""
    projected = {target.param: target for target in optimizer.targets()}
    rest = sum(float(gradient.square().sum()) for param, gradient in gradients.items() if param not in projected)
    squares = dict.fromkeys(COUNTS, rest)
    for index, (param, target) in enumerate(projected.items()):
        bases = target.bases()
        squares[0] += float(project(gradients[param], bases).square().sum())
        for count in COUNTS[1:]:
            probes = probes_for(bases, count, 1000 * seed + 2 * index)
            squares[count] += float(project(gradients[param], with_columns(bases, probes)).square().sum())
    return {f"{count}": square**0.5 for count, square in squares.items()}


def errors(rank: int, steps: int, every: int, options: str) -> dict[str, list[float]]:
    """What is said of the norm, by who says it, in parts of the gradient's."""
    rows, _ = tokenized(CACHE)
    model = small_llama(0)
    twin = copy.deepcopy(model)
    optimizer = make_optimizer(
        model,
        ["attn", "mlp"],
        optim="galore_adamw_layerwise",
        optim_args=f"rank={rank}, update_proj_gap=50, {options}",
        lr=1e-2,
        hold_gradients=True,
    )
    batches = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    found: dict[str, list[float]] = {}
    for step in track(range(steps), f"rank {rank}", transient=True):
        batch = rows[batches[torch.arange(step * ROWS, (step + 1) * ROWS) % len(batches)]]
        model(input_ids=batch, labels=batch).loss.backward()
        if step % every == 0:
            twin.load_state_dict(model.state_dict())
            twin.zero_grad()
            twin(input_ids=batch, labels=batch).loss.backward()
            pairs = zip(model.parameters(), twin.parameters(), strict=True)
            gradients = {own: other.grad for own, other in pairs if other.grad is not None}
            true = sum(float(gradient.square().sum()) for gradient in gradients.values()) ** 0.5
            norm = optimizer.grad_norm()
            assert norm is not None
            for who, said in {**told(optimizer, gradients, step), OF_THE_RUN: float(norm)}.items():
                found.setdefault(who, []).append(said / true)
        optimizer.clip_grad_norm_(MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
    return found


def print_errors(args: argparse.Namespace, console: Console) -> None:
    """The table of `error`."""
    table = Table("probes", title=f"The norm that is told, of the gradient's; {args.options}")
    found = {rank: errors(rank, args.steps, args.every, args.options) for rank in args.ranks}
    for rank in args.ranks:
        for header in (f"rank {rank}: mean", "off by"):
            table.add_column(header, justify="right")
    for who in (*map(str, COUNTS), OF_THE_RUN):
        cells = []
        for rank in args.ranks:
            ratios = torch.tensor(found[rank][who])
            cells += [f"{ratios.mean():.4f}", f"{(ratios - 1).square().mean().sqrt():.2%}"]
        table.add_row(who, *cells)
    console.print(table)


def clock(device: str) -> float:
    """Seconds; of a card when it has done what it was asked for."""
    if device == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def print_costs(args: argparse.Namespace, console: Console) -> None:
    """The table of `cost`."""
    torch.set_num_threads(args.threads)
    dtype = getattr(torch, args.dtype)
    template = llama(args.hidden, args.layers, vocabulary=2048).to(dtype).train()
    ids = torch.randint(0, 2048, (max(1, args.tokens // 256), min(args.tokens, 256)), device=args.device)
    table = Table("", "probes", title=f"{args.device}, {args.dtype}, hidden {args.hidden}, rank {args.rank}")
    for header in ("ms a step", "× without"):
        table.add_column(header, justify="right")
    for held in (False, True):
        contenders: dict[int, tuple[nn.Module, Any]] = {}
        for count in args.counts:
            model = copy.deepcopy(template).to(args.device)
            options = {"rank": args.rank, "update_proj_gap": NEVER, "stagger": False, "norm_probes": count}
            optimizer = make_optimizer(
                model,
                ["attn", "mlp"],
                optim=args.optim,
                optim_args={**options, "refresh": "random"},
                lr=1e-5,
                hold_gradients=held,
            )
            contenders[count] = model, optimizer
        seconds: dict[int, list[float]] = {count: [] for count in contenders}
        for number in track(range(args.rounds + 3), "Rounds", transient=True):
            order = list(contenders) if number % 2 else list(reversed(contenders))
            for count in order:
                model, optimizer = contenders[count]
                start = clock(args.device)
                model(input_ids=ids, labels=ids).loss.backward()
                if held:
                    optimizer.clip_grad_norm_(1.0)
                optimizer.step()
                optimizer.zero_grad()
                taken = clock(args.device) - start
                if number >= 3:  # the first make bases
                    seconds[count].append(taken)
        without = seconds[args.counts[0]]
        for count, own in seconds.items():
            ratio = statistics.median(a / b for a, b in zip(own, without, strict=True))
            words = "clipped" if held else "at once"
            table.add_row(words, str(count), f"{1000 * statistics.median(own):.1f}", f"{ratio:.4f}")
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    error = commands.add_parser("error")
    error.set_defaults(run=print_errors)
    error.add_argument("--ranks", type=int, nargs="+", default=[4, 16, 64, 128])
    error.add_argument("--steps", type=int, default=200)
    error.add_argument("--every", type=int, default=4)
    error.add_argument("--options", default="proj_bits=4", help="of optim_args, besides")
    cost = commands.add_parser("cost")
    cost.set_defaults(run=print_costs)
    cost.add_argument("--optim", default="galore_adamw_8bit_layerwise")
    cost.add_argument("--device", default="cpu")
    cost.add_argument("--dtype", default="float32")
    cost.add_argument("--hidden", type=int, default=1024)
    cost.add_argument("--layers", type=int, default=2)
    cost.add_argument("--rank", type=int, default=256)
    cost.add_argument("--tokens", type=int, default=1024, help="tokens a step")
    cost.add_argument("--rounds", type=int, default=30)
    cost.add_argument("--threads", type=int, default=1)
    cost.add_argument("--counts", type=int, nargs="+", default=[0, 8, 16], help="of probes; the first is the measure")
    args = parser.parse_args()
    console = Console(width=140)
    args.run(args, console)


if __name__ == "__main__":
    main()
