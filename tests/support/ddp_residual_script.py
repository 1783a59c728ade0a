"""Run by test_ddp.py in two processes: residuals and scaling in each way there is, beside one process with the batch.

All in float64, so that what differs is no more than the order of sums.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from hf_galore import GaLoreAdamW
from hf_galore.backward.linear import ProjectedLinear

OPTIONS: dict[str, dict[str, Any]] = {
    "fira": {"residual": "fira", "proj_bits": 16},
    "sign": {"residual": "sign", "residual_scale": 0.1, "proj_bits": 16},
    "muon": {"rule": "muon", "residual": "muon", "proj_bits": 16},
    "muon, momentum": {"rule": "muon", "residual": "muon", "residual_bits": 8, "proj_bits": 16},
    "normuon": {"rule": "muon", "residual": "normuon", "residual_bits": 8, "moments": "rotate", "proj_bits": 16},
    "channel": {"scaling": "channel"},
    "tensor": {"scaling": "tensor"},
}
STEPS, ROWS = 8, 12


class Net(nn.Module):
    """Two targets with an option, one without, and a stack."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.other = nn.Linear(12, 20), nn.Linear(20, 12), nn.Linear(12, 12)
        self.stack = nn.Parameter(torch.randn(2, 12, 12) / 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.down(torch.tanh(self.up(x)))
        x = x + torch.bmm(x.expand(2, -1, -1), self.stack.mT).sum(0)
        made: Tensor = self.other(x)
        return made


def trained(option: dict[str, Any], *, wrap: bool, **way: Any) -> tuple[nn.Module, list[float]]:
    """A model after some steps, and the norms of its gradients; wrapped, or with the batches of all processes."""
    torch.manual_seed(0)
    net = Net().double()
    group = {"rank": 3, "update_proj_gap": 3, "basis_seed": 0}
    groups = [
        {"params": [net.up.weight, net.down.weight, net.stack], **group, **option},
        {"params": [net.other.weight], **group, "proj_bits": 16},
        {"params": [net.up.bias, net.down.bias, net.other.bias]},
    ]
    optimizer = GaLoreAdamW(groups, lr=1e-2, module=net, **way)
    if way.get("layerwise"):
        projected = way.get("projected_backward") is not False
        assert [isinstance(layer, ProjectedLinear) for layer in (net.up, net.other)] == [False, projected]
    model: nn.Module = DistributedDataParallel(net) if wrap else net
    generator, norms = torch.Generator().manual_seed(1), []
    for _ in range(STEPS):
        batch = torch.randn(ROWS, 12, generator=generator, dtype=torch.float64)
        if wrap:
            batch = batch.chunk(distributed.get_world_size())[distributed.get_rank()]
        (model(batch) - 1).square().mean().backward()
        norm = optimizer.grad_norm()
        assert norm is not None
        norms.append(norm.item())
        optimizer.step()
        optimizer.zero_grad()
    optimizer.close()
    return net, norms


def main(output: Path) -> None:
    distributed.init_process_group("gloo")
    found: dict[str, float] = {}
    for name, option in OPTIONS.items():
        alone, _ = trained(option, wrap=False)
        for words, way in {
            "plain": {},
            "layerwise": {"layerwise": True},
            "layerwise, gradients built": {"layerwise": True, "projected_backward": False},
        }.items():
            net, _ = trained(option, wrap=True, **way)
            weights = dict(net.named_parameters())
            differences = [(param - weights[key]).abs().max().item() for key, param in alone.named_parameters()]
            found[f"{name}, {words}"] = max(differences)
    if distributed.get_rank() == 0:
        torch.save(found, output / "differences.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
