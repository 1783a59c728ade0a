"""What `gradient_bits=8` does to the loss: a small Llama learns real text, with low-rank gradients in 16 or 8 bits.

    python -m tests.benchmarks.gradient_bits                                  # 20 minutes on one core
    python -m tests.benchmarks.gradient_bits --accumulate 4 --steps 100 --seeds 1

A Llama of two layers of 128 reads the sources of the Python standard library, byte by byte, in micro-batches of one row
of 128, several to a step; layerwise, clipped to a norm of 1, rank 32, a refresh every 50 steps, a cosine with 10 %
warmup. Runs of a seed have the same weights to begin with, and the same rows. The loss is that of 64 rows of files that
are not trained on, in nats a byte. "16 bits" stand for the weights' own dtype: float32, if --dtype says nothing else.
"""

from __future__ import annotations

import argparse
import statistics
import sysconfig
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, get_cosine_schedule_with_warmup

from hf_galore import make_optimizer

LENGTH, HELD_OUT_ROWS = 128, 64
RATE, WARMUP, MAX_NORM = 4e-3, 0.1, 1.0
OPTIM_ARGS = "rank=32, update_proj_gap=50, scale=0.25"


def rows() -> tuple[Tensor, Tensor]:
    """Rows to train on and held-out ones, of bytes."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    parts = [b"".join(file.read_bytes() for file in files[start::8]) for start in range(8)]
    held_out, train = parts[0], b"".join(parts[1:])

    def cut(text: bytes) -> Tensor:
        numbers = torch.frombuffer(bytearray(text), dtype=torch.uint8).to(torch.int64)
        return numbers[: len(numbers) // LENGTH * LENGTH].view(-1, LENGTH)

    scattered = torch.randperm(len(cut(held_out)), generator=torch.Generator().manual_seed(0))
    return cut(train), cut(held_out)[scattered[:HELD_OUT_ROWS]]


def trained(bits: int, accumulate: int, seed: int, steps: int, dtype: torch.dtype) -> float:
    """The held-out loss of a run."""
    train_rows, held_out = rows()
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=344,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=256,
        max_position_embeddings=LENGTH,
        use_cache=False,
    )
    model = LlamaForCausalLM(config).to(dtype)
    optimizer = make_optimizer(
        model,
        ["attn", "mlp"],
        optim="galore_adamw_layerwise",
        optim_args=f"{OPTIM_ARGS}, gradient_bits={bits}",
        lr=RATE,
        hold_gradients=True,
    )
    schedule = get_cosine_schedule_with_warmup(optimizer, int(WARMUP * steps), steps)
    order = torch.randperm(len(train_rows), generator=torch.Generator().manual_seed(seed))
    for step in range(steps):
        for part in range(accumulate):
            row = train_rows[order[(step * accumulate + part) % len(order)]].unsqueeze(0)
            (model(input_ids=row, labels=row).loss / accumulate).backward()
        optimizer.clip_grad_norm_(MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    optimizer.close()
    with torch.no_grad():
        return float(model(input_ids=held_out, labels=held_out).loss)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--accumulate", type=int, nargs="+", default=[4, 32], help="micro-batches a step")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    args = parser.parse_args()
    torch.set_num_threads(1)
    console = Console(width=100)
    table = Table("micro-batches", "bits", title=f"Held-out loss after {args.steps} steps, {args.dtype} weights")
    for header in (*(f"seed {seed}" for seed in args.seeds), "mean"):
        table.add_column(header, justify="right")
    for accumulate in args.accumulate:
        for bits in (16, 8):
            losses = []
            for seed in args.seeds:
                losses.append(trained(bits, accumulate, seed, args.steps, getattr(torch, args.dtype)))
                console.print(f"{accumulate} micro-batches, {bits} bits, seed {seed}: {losses[-1]:.4f}")
            means = [*losses, statistics.fmean(losses)]
            table.add_row(str(accumulate), str(bits), *(f"{loss:.4f}" for loss in means))
    console.print(table)


if __name__ == "__main__":
    main()
