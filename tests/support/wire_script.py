"""Run by test_wire.py under torchrun: counts bytes of steps under DDP and FSDP2, and the memory of AdamW's.

The model is plain torch. No transformers: it takes longer to import, in each process, than all of this.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from hf_galore.optim.classes import GaLoreAdamW
from tests.support.live import LiveBytes, held_by
from tests.support.wire import CountedBytes

WIDTH, INNER, TOKENS, LAYERS = 128, 341, 30, 3  # on 4 ranks shards of 341 and of 30 rows are uneven


class Layer(nn.Module):
    """A layer with a buffer, which DDP broadcasts."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH, bias=False)
        self.register_buffer("scale", torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        """x, and what the layer adds to it."""
        y: Tensor = x + self.down(self.up(x).relu())
        return y


class Model(nn.Module):
    """An embedding, some layers, a norm and a head, named as models of transformers name theirs."""

    _no_split_modules = ("Layer",)

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(TOKENS, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, TOKENS, bias=False)

    def get_input_embeddings(self) -> nn.Module:
        """The embedding."""
        return self.embedding

    def get_output_embeddings(self) -> nn.Module:
        """The head."""
        return self.head

    def forward(self, tokens: Tensor) -> Tensor:
        """The loss of predicting each token from itself."""
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        return nn.functional.cross_entropy(self.head(self.norm(x)), tokens)


def sharded() -> nn.Module:
    """A model under FSDP2, divided as accelerate does it (`hf_galore.integrations.fsdp_units`)."""
    model = Model()
    for layer in model.layers:
        fully_shard(layer)
    fully_shard(model.embedding, reshard_after_forward=True)
    fully_shard([model.norm, model.head], reshard_after_forward=False)  # type: ignore[call-overload, unused-ignore]
    fully_shard(model)
    return model


def counted(model: Any, micro_batches: int) -> dict[str, dict[str, int]]:
    """Of the fourth step bytes and calls, of the fifth the memory, and what the rank holds.

    After the first step DDP lays out its buckets anew.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    for _ in range(4):
        with CountedBytes() as found:
            _backward(model, micro_batches)
            optimizer.step()
            optimizer.zero_grad()
    with LiveBytes(held_by(optimizer)) as live:
        between = live.now
        _backward(model, micro_batches)
        backward = live.peak
        dist.barrier()  # what was sent is freed when the other end has it, by a thread of gloo's
        time.sleep(0.2)
        live.peak = 0
        optimizer.step()
    local = {"weights": list(model.parameters()), "moments": [*_moments(optimizer)]}
    return {
        "bytes": dict(found.bytes),
        "calls": dict(found.calls),
        "memory": {"between": between, "backward": backward, "update": live.peak},
        "local": {
            what: sum((t.to_local() if isinstance(t, DTensor) else t).nbytes for t in tensors)
            for what, tensors in local.items()
        },
    }


def _backward(model: Any, micro_batches: int) -> None:
    """The forward and backward passes of a step, of which only the last is reduced."""
    for number in range(1, micro_batches + 1):
        last = number == micro_batches
        if isinstance(model, DistributedDataParallel):
            model.require_backward_grad_sync = last  # what `no_sync` does
        else:
            model.set_requires_gradient_sync(last)
        model(torch.arange(dist.get_rank(), TOKENS)).backward()


def _moments(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    return (value for state in optimizer.state.values() for value in state.values() if value.ndim)


# Keywords of GaLore's optimizers, and options of what is projected: under DDP what each reduces, and under FSDP2.
NEEDS_GRADIENTS: dict[str, dict[str, Any]] = {
    "plain, fira": {"group": {"residual": "fira"}},
    "plain, channel": {"group": {"scaling": "channel", "proj_bits": 4}},
}
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "layerwise": {"layerwise": True},
    "layerwise, dense": {"layerwise": True, "projected_backward": False},
    "plain, low_rank": {"exchange": "low_rank"},
    **NEEDS_GRADIENTS,
}
FSDP_WAYS: dict[str, dict[str, Any]] = {
    "plain": WAYS["plain"],
    "layerwise": {"layerwise": True, "projected_backward": False},
    "projected": {"layerwise": True, "projected_backward": True, "hold_gradients": True},
    **NEEDS_GRADIENTS,
}
GAP = 4


def galore(model: nn.Module, way: dict[str, Any], *, proj_type: str = "std") -> GaLoreAdamW:
    """An optimizer that projects the layers, whose gap is longer than there are targets: some steps refresh none."""
    options = dict(way)
    group = {"rank": 6, "update_proj_gap": GAP, "proj_type": proj_type, "proj_bits": 16, "stagger": False}
    group |= options.pop("group", {})
    named = model.named_parameters()
    targets: dict[Tensor, dict[str, Any]] = {
        param: group for name, param in named if "layers" in name and param.ndim == 2
    }
    return GaLoreAdamW(model.parameters(), lr=1e-2, module=model, param_options=targets, **options)


def counted_galore(way: dict[str, Any], micro_batches: int, *, fsdp: bool) -> list[dict[str, Any]]:
    """Bytes of each of some steps, and which targets it refreshes."""
    model: Any = sharded() if fsdp else Model()
    optimizer = galore(model, way)
    wrapped: Any = model if fsdp else DistributedDataParallel(model)
    found = []
    for _ in range(GAP + 2):
        refreshing = [target.name for target in optimizer.targets() if target.due()]
        with CountedBytes() as counted:
            for number in range(1, micro_batches + 1):
                last = number == micro_batches
                if fsdp:
                    model.set_requires_gradient_sync(last)
                else:
                    wrapped.require_backward_grad_sync = last
                wrapped(torch.arange(dist.get_rank(), TOKENS)).backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append({"bytes": dict(counted.bytes), "calls": dict(counted.calls), "refreshing": refreshing})
    optimizer.close()
    return found


def main(output: Path) -> None:
    """Write what each rank counted."""
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    of_galore = {}
    for words, way in WAYS.items():
        for micro_batches in (1, 3):
            of_galore[f"ddp {words} {micro_batches}"] = counted_galore(way, micro_batches, fsdp=False)
    for words, way in FSDP_WAYS.items():
        for micro_batches in (1, 3):
            of_galore[f"fsdp {words} {micro_batches}"] = counted_galore(way, micro_batches, fsdp=True)
    (output / f"galore-{dist.get_rank()}.json").write_text(json.dumps(of_galore))
    found = {}
    for micro_batches in (1, 3):
        found[f"ddp {micro_batches}"] = counted(DistributedDataParallel(Model()), micro_batches)
        found[f"fsdp {micro_batches}"] = counted(sharded(), micro_batches)
    (output / f"{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
