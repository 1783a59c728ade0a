"""Whether a residual can be added without its gradient being kept: with the scale of the step before.

    python -m tests.benchmarks.delayed --rank 64 --lr 1e-2 --scale .125     # minutes on a card, hours on CPUs

Layerwise with accumulation or clipping holds R of a window, and not G, so that `residual=fira`, which scales the
residual by what the rule makes of the whole window's R, has nothing left to scale. But the residual is linear in G:
with the channels' scales of the step before, each micro-batch's could be added to the weight as it passes. This trains
the Llamas of `tests.benchmarks.ranks` both ways, 4 micro-batches a step: `exact`, from the whole gradient; `delayed`,
where the micro-batches of a window already see the weights that the residuals of those before them have moved, and
nothing limits the growth of the residual, as the norm of the sum is not known either; `limited` limits each
micro-batch's by the norm that such a one had a step before.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from hf_galore.lowrank.projection import add_projected_back_, project
from hf_galore.lowrank.scales import channel_norms, growth_limit, ratios
from hf_galore.optim import GaLoreAdamW
from tests.benchmarks.contenders import CONTENDERS, GAP
from tests.benchmarks.ranks import CACHE, ROWS, SHAPE, STEPS, tokenized
from tests.benchmarks.stack_of_llamas import Llamas, ManyRates, Rates, cosine, held_out_losses, train

MICRO_BATCHES = 4


class Delayed(ManyRates):
    """Adds the residuals of micro-batches by the scales of the step before, and what is projected by an optimizer's.

    Args:
        limited: whether the residual of a micro-batch is limited by the norm of those of the step before.
    """

    def __init__(
        self, optimizer: GaLoreAdamW, model: Llamas, rates: Sequence[Rates], steps: int, limited: bool
    ) -> None:
        super().__init__(optimizer, model, rates)
        self._targets = optimizer.targets()
        self._rates = torch.tensor([rate.lr * rate.scale for rate in rates], device=self._targets[0].param.device)
        self._steps = steps
        self._limited = limited
        self._scales: dict[int, Tensor] = {}
        self._norms: dict[int, Tensor] = {}
        self._sums: dict[int, Tensor] = {}
        self._unclipped: dict[int, Tensor] = {}

    @torch.no_grad()
    def after_backward(self, step: int) -> None:
        """Add the residual of a micro-batch to the weights."""
        rate = self._rates * cosine(step, self._steps)
        for target in self._targets:
            key, gradient = id(target), target.param.grad
            assert gradient is not None
            target.param.grad = None
            if key in self._scales:
                bases = target.bases_here()
                residual = gradient.clone()
                add_projected_back_(residual, project(gradient, bases), bases, -1.0)
                residual.mul_(self._scales[key])
                if self._limited:
                    norm = torch.linalg.vector_norm(residual, dim=(-2, -1))
                    limit = growth_limit(norm, self._norms.get(key, torch.zeros_like(norm)))
                    residual.mul_(limit[:, None, None])
                    self._norms[key] = norm * limit
                target.param.sub_(rate[:, None, None] * residual)
            self._sums[key] = gradient if key not in self._sums else self._sums[key].add_(gradient)

    def give_back(self) -> None:
        """Let the sums of the window be what is clipped and stepped with."""
        self._unclipped = {key: gradient.clone() for key, gradient in self._sums.items()}
        for target in self._targets:
            target.param.grad = self._sums.pop(id(target))

    @torch.no_grad()
    def step(self, factor: float) -> None:
        """One step, and the scales for the next."""
        super().step(factor)
        for target in self._targets:
            state, group = target.state, target.group
            count = int(state["step"].item())
            (first, second), eps = group["betas"], group["eps"]
            mean = state["exp_avg"] / (1 - first**count)
            direction = mean / ((state["exp_avg_sq"] / (1 - second**count)).sqrt() + eps)
            low_rank = project(self._unclipped[id(target)], target.bases_here())
            of_direction, of_low_rank = (channel_norms(matrix, target.side) for matrix in (direction, low_rank))
            self._scales[id(target)] = ratios(of_direction, of_low_rank, torch.zeros_like(of_low_rank))


def run(way: str, args: argparse.Namespace) -> list[float]:
    """Train by one way, with all seeds."""
    rows, held_out = (tokens.to(args.device) for tokens in tokenized(args.cache))
    model = Llamas(SHAPE, args.seeds).to(args.device)
    rates = [Rates(args.lr, args.scale)] * len(args.seeds)
    torch.manual_seed(0)
    orders = [torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)) for seed in args.seeds]
    order = torch.stack(orders).to(args.device)

    def batch(step: int) -> tuple[Tensor, Tensor]:
        ids = rows[order[:, torch.arange(step * ROWS, (step + 1) * ROWS, device=args.device) % len(rows)]]
        return ids, ids

    options: dict[str, Any] = {"micro_batches": MICRO_BATCHES}
    if way == "exact":
        optimizer = ManyRates(CONTENDERS["residual=fira"].make(model, args.rank), model, rates)
    elif way == "none":
        optimizer = ManyRates(CONTENDERS["default"].make(model, args.rank), model, rates)
    else:
        group = {"params": model.matrices(), "rank": args.rank, "scale": 1.0, "update_proj_gap": GAP}
        made = GaLoreAdamW([{"params": model.rest()}, group], lr=1.0, weight_decay=0.0)
        optimizer = delayed = Delayed(made, model, rates, args.steps, limited=way == "limited")
        options |= {"after_backward": delayed.after_backward, "before_clipping": delayed.give_back}
    train(model, optimizer, batch, args.steps, **options)
    return held_out_losses(model, held_out, held_out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--scale", type=float, default=0.125)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--ways", nargs="+", default=["none", "exact", "delayed", "limited"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--cache", type=Path, default=CACHE, help="a file for the tokens")
    args = parser.parse_args()
    console = Console(width=120)
    for way in args.ways:
        losses = run(way, args)
        each = "  ".join(f"{loss:.4f}" for loss in losses)
        console.print(
            f"rank {args.rank}, η {args.lr:g}, scale {args.scale:g}: {way:8} {statistics.fmean(losses):.4f}   {each}"
        )


if __name__ == "__main__":
    main()
