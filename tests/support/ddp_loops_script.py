"""Run by test_ddp.py: a small model trained by a loop of one's own in each way there is, under torchrun or alone.

Without torchrun it trains the whole batch, unwrapped, and from weights that differ by rounding too. With it each
process of `DistributedDataParallel` trains its part, and all are to end with the same weights. The weights are saved
by the first process.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.state import GradientState
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from hf_galore.optim.classes import GaLoreAdafactor, GaLoreAdamW, GaLoreAdamW8bit
from hf_galore.optim.optimizer import GaLoreOptimizer

PROCESSES = int(os.environ.get("WORLD_SIZE", "0"))
RANK = int(os.environ.get("RANK", "0"))
ROWS, LENGTH, VOCABULARY, STEPS = 12, 9, 32, 20


class Net(nn.Module):
    """An embedding tied to the head, and three matrices to project: wide, tall and square."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.up, self.norm, self.down = (
            nn.Linear(width, 2 * width),
            nn.LayerNorm(2 * width),
            nn.Linear(2 * width, width),
        )
        self.square = nn.Linear(width, width, bias=False)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        x = x + self.down(torch.relu(self.norm(self.up(x))))
        logits: Tensor = self.head(x + torch.tanh(self.square(x)))
        return logits

    def targets(self) -> list[Tensor]:
        return [self.up.weight, self.down.weight, self.square.weight]


class Way(NamedTuple):
    """How a model is trained."""

    optimizer: Any
    options: dict[str, Any]
    accumulation: int = 1
    max_norm: float | None = None
    wrapped_first: bool = False
    width: int = 24


def ways() -> Iterator[tuple[str, Way]]:
    """Every way, and AdamW in the same."""
    hooked: dict[str, dict[str, Any]] = {
        "plain": {},
        "layerwise": {"layerwise": True},
        "layerwise, gradients built": {"layerwise": True, "projected_backward": False},
        "projected": {"projected_backward": True},
        "low_rank": {"exchange": "low_rank"},
        "layerwise, gradients built, low_rank": {
            "layerwise": True,
            "projected_backward": False,
            "exchange": "low_rank",
        },
    }
    for accumulation in (1, 4):
        for max_norm in (None, 0.3):
            situation = f"accumulation {accumulation}, clipped at {max_norm}"
            yield f"AdamW, {situation}", Way(torch.optim.AdamW, {}, accumulation, max_norm)
            for words, options in hooked.items():
                yield f"{words}, {situation}", Way(GaLoreAdamW, options, accumulation, max_norm)
    for words, options in list(hooked.items())[:2]:
        yield f"{words}, wrapped first", Way(GaLoreAdamW, options, wrapped_first=True)
        yield f"{words}, 8-bit", Way(GaLoreAdamW8bit, options, width=64)
        yield f"{words}, 8-bit, accumulated", Way(GaLoreAdamW8bit, options, 4, 0.3, width=64)
        yield f"{words}, adafactor", Way(GaLoreAdafactor, options)
    yield "held in 8 bits", Way(GaLoreAdamW, {"layerwise": True, "gradient_bits": 8}, 4, width=64)
    yield "quantised bases", Way(GaLoreAdamW, {"layerwise": True, "proj_bits": 4}, width=64)
    yield "lazy, rotated", Way(GaLoreAdamW, {"layerwise": True, "lazy_refresh": True, "moments": "rotate"})


def optimizer_for(net: Net, way: Way) -> torch.optim.Optimizer:
    """The optimizer, with an epsilon that keeps rounding small where gradients are."""
    epsilon: dict[str, Any] = {} if way.optimizer is GaLoreAdafactor else {"eps": 1e-4}
    if way.optimizer is torch.optim.AdamW:
        return torch.optim.AdamW(net.parameters(), lr=1e-2, **epsilon)
    of_groups = ("gradient_bits", "proj_bits", "lazy_refresh", "moments")
    of_target = {key: value for key, value in way.options.items() if key in of_groups}
    options = {key: value for key, value in way.options.items() if key not in of_groups}
    group = {"rank": way.width // 6 if way.width == 24 else 16, "update_proj_gap": 5, "proj_bits": 16, **of_target}
    made: torch.optim.Optimizer = way.optimizer(
        net.parameters(),
        lr=1e-2,
        module=net,
        param_options=dict.fromkeys(net.targets(), group),
        hold_gradients=way.max_norm is not None,
        **epsilon,
        **options,
    )
    return made


def train(way: Way, disturbed: float = 0.0) -> dict[str, Tensor]:
    """The weights after training."""
    torch.manual_seed(0)
    net = Net(way.width)
    with torch.no_grad():
        for param in net.parameters():
            # What the other processes have before the first sends them its own.
            param.mul_(1 + disturbed * torch.randn_like(param)).add_(0.1 * RANK)
    model: Any = net
    if PROCESSES and way.wrapped_first:
        model = DistributedDataParallel(net)
    optimizer = optimizer_for(net, way)
    if PROCESSES and not way.wrapped_first:
        model = DistributedDataParallel(net)
    for step in range(STEPS):
        for micro in range(way.accumulation):
            generator = torch.Generator().manual_seed(100 * step + micro)
            tokens = torch.randint(VOCABULARY, (ROWS, LENGTH), generator=generator)
            tokens = tokens.chunk(PROCESSES)[RANK] if PROCESSES else tokens
            last = micro == way.accumulation - 1
            # As accelerate's accumulate() has it.
            GradientState()._set_sync_gradients(last)
            local = isinstance(model, DistributedDataParallel) and not last
            with model.no_sync() if local else contextlib.nullcontext():
                logits = model(tokens[:, :-1]).flatten(0, 1)
                loss = nn.functional.cross_entropy(logits, tokens[:, 1:].flatten())
                (loss / way.accumulation).backward()
        if way.max_norm is not None:
            if isinstance(optimizer, GaLoreOptimizer):
                optimizer.clip_grad_norm_(way.max_norm)
            else:
                nn.utils.clip_grad_norm_(net.parameters(), way.max_norm)
        optimizer.step()
        optimizer.zero_grad()
    GradientState()._set_sync_gradients(True)
    weights = {name: param.detach().clone() for name, param in net.named_parameters()}
    if isinstance(optimizer, GaLoreOptimizer):
        optimizer.close()
    return weights


def assert_same_everywhere(weights: dict[str, Tensor], words: str) -> None:
    """All processes have the same weights, to the bit."""
    flat = torch.cat([weight.flatten().double() for weight in weights.values()])  # exact
    of_all = [torch.empty_like(flat) for _ in range(PROCESSES)]
    distributed.all_gather(of_all, flat)
    assert all(torch.equal(flat, other) for other in of_all), words


def main(output: Path) -> None:
    if PROCESSES:
        distributed.init_process_group("gloo")
    saved: dict[str, dict[str, Tensor]] = {}
    nearby: dict[str, dict[str, Tensor]] = {}
    for words, way in ways():
        saved[words] = train(way)
        if PROCESSES:
            assert_same_everywhere(saved[words], words)
        else:
            nearby[words] = train(way, disturbed=1e-7)
    if RANK == 0:
        torch.save({"weights": saved, "nearby": nearby}, output)
    if PROCESSES:
        distributed.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
