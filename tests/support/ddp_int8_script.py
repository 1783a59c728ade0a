"""Run by tests/int8/test_processes.py: a net with int8 weights in each way to train it, under torchrun or alone.

Alone it trains on whole batches. With torchrun each process trains on its part, from weights and a seed of its own;
the first process's are to be everybody's.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.state import GradientState
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from hf_galore.int8 import is_int8
from hf_galore.optim import GaLoreAdamW, GaLoreAdamW8bit
from tests.support.ddp_loops_script import PROCESSES, RANK, assert_same_everywhere
from tests.support.int8 import Net, batch, net, snapshot

STEPS = 5


class Way(NamedTuple):
    """How the net is trained."""

    options: dict[str, Any]
    cls: Any = GaLoreAdamW
    group: dict[str, Any] | None = None
    accumulation: int = 1
    max_norm: float | None = None
    wrapped_first: bool = False
    dtype: torch.dtype = torch.float64


def ways() -> Iterator[tuple[str, Way]]:
    hooked: dict[str, dict[str, Any]] = {
        "plain": {},
        "layerwise": {"layerwise": True},
        "layerwise, gradients built": {"layerwise": True, "projected_backward": False},
        "projected": {"projected_backward": True},
    }
    for words, options in hooked.items():
        yield words, Way(options)
        yield f"{words}, accumulated and clipped", Way(options, accumulation=2, max_norm=0.1)
    for words in ("plain", "layerwise"):
        yield f"{words}, wrapped first", Way(hooked[words], wrapped_first=True)
    yield "8-bit", Way({"layerwise": True}, GaLoreAdamW8bit, dtype=torch.float32)
    yield "fira", Way({}, group={"residual": "fira"})
    yield "random", Way({"layerwise": True}, group={"refresh": "random"})


def optimizer_for(model: Net, way: Way) -> Any:
    group = {"rank": 8, "update_proj_gap": 3, "proj_bits": 16, **(way.group or {})}
    return way.cls(
        model.parameters(),
        lr=3e-3,
        eps=1e-4,
        weight_decay=0.1,
        module=model,
        param_options=dict.fromkeys(model.targets(), group),
        hold_gradients=way.max_norm is not None,
        **way.options,
    )


def train(way: Way) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = net(way.dtype)
    with torch.no_grad():
        for param in model.parameters():
            # What the other processes have before the first sends them its own.
            param.copy_(param + 0.25 * RANK)
    torch.manual_seed(100 + RANK)
    run: Any = DistributedDataParallel(model) if PROCESSES and way.wrapped_first else model
    optimizer = optimizer_for(model, way)
    if PROCESSES and not way.wrapped_first:
        run = DistributedDataParallel(model)
    for step in range(STEPS):
        parts = batch(step, way.dtype)
        for micro in range(way.accumulation):
            # The same micro-batches: a basis is of a window's first.
            inputs, wanted = (part.chunk(PROCESSES)[RANK] if PROCESSES else part for part in parts)
            last = micro == way.accumulation - 1
            GradientState()._set_sync_gradients(last)
            local = isinstance(run, DistributedDataParallel) and not last
            with run.no_sync() if local else contextlib.nullcontext():
                (nn.functional.mse_loss(run(inputs), wanted) / way.accumulation).backward()
        GradientState()._set_sync_gradients(True)
        if way.max_norm is not None:
            optimizer.clip_grad_norm_(way.max_norm)
        optimizer.step()
        optimizer.zero_grad()
    optimizer.close()
    return snapshot(model)


def main(output: Path) -> None:
    if PROCESSES:
        distributed.init_process_group("gloo")
    saved: dict[str, Any] = {"start": snapshot(net(torch.float64))}
    saved["int8"] = [name for name, param in net().named_parameters() if is_int8(param)]
    for words, way in ways():
        saved[words] = train(way)
        if PROCESSES:
            assert_same_everywhere(saved[words], words)
    if RANK == 0:
        torch.save(saved, output)
    if PROCESSES:
        distributed.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
