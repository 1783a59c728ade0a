"""Mixtures of experts under GaLore and AdamW: what is projected, what optimizers take, and what losses they come to.

    python -m tests.benchmarks.experts --results experts.jsonl       # the whole table: about ten minutes of one core
    python -m tests.benchmarks.experts --only mixtral --large         # four times as much to learn in the same steps

Small models of four architectures (`SIZES`: 64 wide, 8 experts of 128, 2 layers) learn four languages, each of which
is a random table of what follows what; the first token of a row says which language it is of. Every optimizer has three
learning rates, with a cosine schedule and clipping to a norm of 1; what is compared is the best of each with the first
seed. The rank is a quarter of the width; gap and scale are fitted to so short a run; everything else has its default.

Losses are of rows that nobody trained on; no model can come below `floor`, the entropy of the tables. State is what
`optimizer.state` holds. What is projected at the real size, and state there, is counted on models without weights, at a
quarter of the smaller side of their experts.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from hf_galore import GaLoreConfig, make_optimizer
from hf_galore.integrations.target_modules import find_targets
from hf_galore.integrations.weights import EXPERTS, weights_of
from hf_galore.optim.bases import ON_HOST
from tests.benchmarks.quality import MAX_NORM, WARMUP, Results, Run
from tests.support.zoo import ZOO, made

ROWS, LENGTH = 16, 32
HIDDEN = 64
RANK, GAP, SCALE = HIDDEN // 4, 50, 1.0
FOLLOWERS = (0.4, 0.3, 0.2, 0.1)

ADAMW, GALORE = "AdamW", "GaLore"
RATES = {ADAMW: (1e-2, 2e-2, 4e-2), GALORE: (1e-2, 2e-2, 4e-2)}


@dataclasses.dataclass(frozen=True)
class Task:
    """How much there is to learn: what follows each word of each language."""

    languages: int
    words: int

    @property
    def vocabulary(self) -> int:
        """Tokens: one for each language, and one for each word."""
        return self.languages + self.words


SMALL, LARGE = Task(4, 28), Task(8, 56)

COMMON: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": 2 * HIDDEN,
    "moe_intermediate_size": 2 * HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 2 * LENGTH,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
SIZES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "mixtral": ("MixtralForCausalLM", COMMON),
    "qwen3_moe": ("Qwen3MoeForCausalLM", COMMON),
    "deepseek_v3": (
        "DeepseekV3ForCausalLM",
        {
            **COMMON,
            "head_dim": 8,
            "n_group": 2,
            "topk_group": 2,
            "first_k_dense_replace": 1,
            "q_lora_rank": 32,
            "kv_lora_rank": 32,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 16,
        },
    ),
    "gpt_oss": ("GptOssForCausalLM", COMMON),
}


def small(name: str, task: Task = SMALL) -> nn.Module:
    """A small model of one of the architectures, the same for a seed of torch's."""
    cls, settings = SIZES[name]
    return made(cls, {**settings, "vocab_size": task.vocabulary})


# ---- what is projected, and what optimizers hold


def share_projected(model: nn.Module, rank: int) -> float:
    """The share of the parameters in matrices, embeddings and output head among them, that `all-linear` projects."""
    projected = find_targets(model, "all-linear", GaLoreConfig(rank=rank)).projected.values()
    in_matrices = sum(param.numel() for param in model.parameters() if param.ndim > 1)
    return sum(weight.numel() for weight in projected) / in_matrices


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """What the optimizer's state holds of tensors for the device: moments, and bases with their scales."""
    return sum(
        value.numel() * value.element_size()
        for state in optimizer.state.values()
        for key, value in state.items()
        if torch.is_tensor(value) and key not in ON_HOST and key != "step"
    )


def _adamw(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)


def galore(model: nn.Module, lr: float = 1e-3, rank: int = RANK) -> torch.optim.Optimizer:
    """The optimizer that is compared with AdamW."""
    return make_optimizer(model, optim_args={"rank": rank, "update_proj_gap": GAP, "scale": SCALE}, lr=lr)


OPTIMIZERS: Mapping[str, Callable[[nn.Module, float], torch.optim.Optimizer]] = {ADAMW: _adamw, GALORE: galore}


def share_of_bytes(model: nn.Module, rank: int) -> float:
    """What GaLore's state takes, as a share of AdamW's two moments in float32."""
    return state_bytes(galore(model, rank=rank)) / (8 * sum(param.numel() for param in model.parameters()))


# ---- the task


class Languages:
    """Random tables of what follows what, the same for every seed of a training."""

    def __init__(self, task: Task) -> None:
        generator = torch.Generator().manual_seed(0)
        order = torch.rand(task.languages, task.words, task.words, generator=generator).argsort(-1)
        self._task = task
        self._followers = order[..., : len(FOLLOWERS)] + task.languages  # (language, word, follower)

    def rows(self, number: int, generator: torch.Generator) -> Tensor:
        """New rows: a language, a word, and what follows."""
        first = self._task.languages
        language = torch.randint(first, (number,), generator=generator)
        row = [language, torch.randint(first, self._task.vocabulary, (number,), generator=generator)]
        chances = torch.tensor(FOLLOWERS)
        for _ in range(LENGTH - 2):
            choice = torch.multinomial(chances, number, replacement=True, generator=generator)
            row.append(self._followers[language, row[-1] - first, choice])
        return torch.stack(row, 1)


FLOOR = -sum(chance * math.log(chance) for chance in FOLLOWERS)
"""The loss of who knows the tables."""


def _loss(model: Any, rows: Tensor) -> Tensor:
    # The first word is anybody's guess.
    logits = model(input_ids=rows).logits[:, 1:-1]
    return nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 2:].flatten())


def train(name: str, optimizer_name: str, run: Run, task: Task = SMALL) -> dict[str, Any]:
    """Train, and return the held-out loss with what led to it."""
    from transformers import get_cosine_schedule_with_warmup

    torch.manual_seed(run.seed)
    model = small(name, task)
    languages = Languages(task)
    generator = torch.Generator().manual_seed(run.seed)
    optimizer = OPTIMIZERS[optimizer_name](model, run.lr)
    schedule = get_cosine_schedule_with_warmup(optimizer, int(WARMUP * run.steps), run.steps)
    start = time.perf_counter()
    for _ in range(run.steps):
        loss = _loss(model, languages.rows(ROWS, generator))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    seconds = time.perf_counter() - start
    model.eval()
    held_out = languages.rows(16 * ROWS, torch.Generator().manual_seed(10_000))
    with torch.no_grad():
        loss = _loss(model, held_out)
    return {
        **dataclasses.asdict(run),
        "loss": float(loss),
        "seconds": round(seconds, 1),
        "state_bytes": state_bytes(optimizer),
    }


# ---- the table


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is trained for the table."""

    names: list[str]
    seeds: list[int]
    steps: int
    task: Task

    def run(self, name: str, optimizer_name: str, lr: float, seed: int) -> Run:
        """One of its runs."""
        return Run(f"{name} {optimizer_name}" + " large" * (self.task == LARGE), lr, seed, self.steps)

    def best_rate(self, results: Results, name: str, optimizer_name: str) -> float:
        """The learning rate with the lowest loss."""
        tried = {lr: results.loss(self.run(name, optimizer_name, lr, self.seeds[0])) for lr in RATES[optimizer_name]}
        finite = {lr: loss for lr, loss in tried.items() if loss is not None and math.isfinite(loss)}
        return min(finite, key=finite.__getitem__)


def perform(plan: Plan, results: Results, console: Console) -> None:
    """What of the runs is missing: all rates with the first seed, the best one with the others."""

    def run(trainings: list[tuple[str, str, float, int]]) -> None:
        missing = [one for one in trainings if results.missing([plan.run(*one)])]
        for name, optimizer, lr, seed in track(missing, "Runs", console=console, transient=True):
            line = train(name, optimizer, plan.run(name, optimizer, lr, seed), plan.task)
            results.add(line)
            console.print(f"{line['name']:22} lr {lr:.0e}  seed {seed}  {line['loss']:.4f}")

    both = [(name, optimizer) for name in plan.names for optimizer in RATES]
    run([(*one, lr, plan.seeds[0]) for one in both for lr in RATES[one[1]]])
    run([(*one, plan.best_rate(results, *one), seed) for one in both for seed in plan.seeds[1:]])


def table(plan: Plan, results: Results) -> Table:
    """Each architecture's figures."""
    title = f"After {plan.steps} steps; {len(plan.seeds)} seed(s); the best of three rates of each"
    shown = Table("", title=title)
    columns = ("projected", "real size", "state / AdamW's", "real size", "AdamW", "GaLore", "GaLore / AdamW", "rates")
    for column in columns:
        shown.add_column(column, justify="right")
    for name in plan.names:
        rates = {optimizer: plan.best_rate(results, name, optimizer) for optimizer in RATES}
        losses = {
            optimizer: statistics.fmean(
                loss for seed in plan.seeds if (loss := results.loss(plan.run(name, optimizer, lr, seed))) is not None
            )
            for optimizer, lr in rates.items()
        }
        model, real = small(name, plan.task), ZOO[name].make_real()
        rank = quarter(real)
        shown.add_row(
            name,
            f"{100 * share_projected(model, RANK):.1f} %",
            f"{100 * share_projected(real, rank):.1f} %",
            f"{100 * share_of_bytes(model, RANK):.1f} %",
            f"{100 * share_of_bytes(real, rank):.1f} %",
            f"{losses[ADAMW]:.4f}",
            f"{losses[GALORE]:.4f}",
            f"{losses[GALORE] / losses[ADAMW]:.4f}",
            ", ".join(f"{lr:.0e}" for lr in rates.values()),
        )
    return shown


def quarter(model: nn.Module) -> int:
    """A quarter of the smaller side of a model's experts, in which most of its parameters are."""
    experts = [weight for weight in weights_of(model) if weight.kind == EXPERTS and weight.param.ndim == 3]
    return min(min(weight.param.shape[1:]) for weight in experts) // 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1], help="the first one chooses the rates")
    parser.add_argument("--only", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--large", action="store_true", help="eight languages of 56 words, in place of four of 28")
    parser.add_argument("--results", type=Path, help="a file of finished runs to read and to add to")
    args = parser.parse_args()
    torch.set_num_threads(1)
    console = Console(width=140)
    console.print(
        f"torch {torch.__version__}; {ROWS} × {LENGTH} tokens a step; rank {RANK}, gap {GAP}, scale {SCALE}; "
        f"floor {FLOOR:.4f}"
    )
    results = Results(args.results)
    plan = Plan(args.only, args.seeds, args.steps, LARGE if args.large else SMALL)
    perform(plan, results, console)
    console.print(table(plan, results))


if __name__ == "__main__":
    main()
