"""Run by test_fsdp2_gradients.py in 3 processes: residuals and scaling of sharded matrices, beside one process.

All in float64, so that what differs is no more than the order of sums. The first process saves how far they are apart.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard

from hf_galore import GaLoreAdamW

OPTIONS: dict[str, dict[str, Any]] = {
    "fira": {"residual": "fira", "proj_bits": 16},
    "fira, both sides": {"residual": "fira", "proj_bits": 16, "proj_type": "full"},
    "fira, 4 bits": {"residual": "fira", "refresh": "random"},
    "sign": {"residual": "sign", "residual_scale": 0.1, "proj_bits": 16},
    "sign, both sides": {"residual": "sign", "residual_scale": 0.1, "proj_bits": 16, "proj_type": "full"},
    "channel": {"scaling": "channel"},
    "tensor": {"scaling": "tensor"},
}
WAYS: dict[str, dict[str, Any]] = {"rows": {}, "columns": {"columns": True}, "layerwise": {"layerwise": True}}
# Of the ways but the first, which options are trained so.
SOME = {"columns": ("fira", "fira, both sides", "channel", "tensor"), "layerwise": ("fira", "channel")}
STEPS, ROWS = 6, 12


class Net(nn.Module):
    """Matrices of either longer side, whose rows 3 processes divide unevenly; of one the last has none."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.few = nn.Linear(12, 31), nn.Linear(31, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.few(x + self.down(torch.tanh(self.up(x))))
        return made


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def trained(
    option: dict[str, Any], mesh: DeviceMesh | None, *, columns: bool = False, layerwise: bool = False
) -> tuple[dict[str, Tensor], list[float]]:
    """The weights after some steps, and the norms of gradients; resumed in their midst where rows are divided."""
    torch.manual_seed(0)
    net = Net().double()
    if mesh is not None:
        # FSDP2 divides columns evenly only.
        divided = (lambda param: Shard(int(param.ndim == 2 and param.shape[1] % 3 == 0))) if columns else None
        fully_shard(net, mesh=mesh, shard_placement_fn=divided)
    matrices = [param for param in net.parameters() if param.ndim == 2]
    others = [param for param in net.parameters() if param.ndim != 2]
    group = {"rank": 3, "update_proj_gap": 3, "basis_seed": 0, **option}
    optimizer = GaLoreAdamW(
        [{"params": matrices, **group}, {"params": others}], lr=1e-2, module=net, layerwise=layerwise
    )
    assert len(optimizer.targets()) == 3
    size, rank = (1, 0) if mesh is None else (mesh.size(), dist.get_rank())
    generator, norms = torch.Generator().manual_seed(1), []
    for step in range(STEPS):
        if step == 4 and mesh is not None and not columns and not layerwise:
            state = copy.deepcopy(get_optimizer_state_dict(net, optimizer))
            for entry in optimizer.state.values():
                for value in entry.values():
                    value.zero_()
            set_optimizer_state_dict(net, optimizer, state)
        batch = torch.randn(ROWS, 12, generator=generator, dtype=torch.float64).chunk(size)[rank]
        (net(batch) - 1).square().mean().backward()
        norm = optimizer.grad_norm()
        assert norm is not None
        norms.append(norm.item())
        optimizer.step()
        optimizer.zero_grad()
    optimizer.close()
    return {name: whole(param) for name, param in net.named_parameters()}, norms


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    mesh = DeviceMesh("cpu", list(range(dist.get_world_size())))
    found: dict[str, tuple[float, float]] = {}
    for name, option in OPTIONS.items():
        alone, expected = trained(option, None)
        torch.manual_seed(0)
        start = dict(Net().double().named_parameters())
        assert all((weight - start[key]).abs().max() > 1e-3 for key, weight in alone.items())
        for way, options in WAYS.items():
            if name not in SOME.get(way, OPTIONS):
                continue
            weights, norms = trained(option, mesh, **options)
            apart = max((weights[key] - weight).abs().max().item() for key, weight in alone.items())
            found[f"{name}, {way}"] = apart, max(abs(a - b) for a, b in zip(norms, expected, strict=True))
    if dist.get_rank() == 0:
        torch.save(found, folder / "found.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
