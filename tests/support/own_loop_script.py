"""Run by test_ddp.py under torchrun: loops of one's own with hooks, in two processes; the plain optimizer's works."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, nn

from hf_galore import GaLoreAdamW


def main(output: Path) -> None:
    torch.manual_seed(0)
    net = nn.Linear(12, 8)
    options: dict[str, Any] = {"param_options": {net.weight: {"rank": 3, "proj_bits": 16}}, "module": net}
    early = GaLoreAdamW(net.parameters(), lr=1e-2, layerwise=True, hold_gradients=True, **options)
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    x = torch.randn(5, 12, generator=torch.Generator().manual_seed(rank))
    # Made before there was another process: at the first step, before a weight moves.
    before = net.weight.detach().clone()
    net(x).sum().backward()
    with pytest.raises(ValueError, match="do not work with 2 processes"):
        early.step()
    assert torch.equal(net.weight, before)
    early.close()
    ways: list[dict[str, Any]] = [{"layerwise": True}, {"projected_backward": True}]
    for way in ways:
        with pytest.raises(ValueError, match=r"do not work with 2 processes.*projected_backward=False"):
            GaLoreAdamW(net.parameters(), lr=1e-2, **way, **options)
    plain = GaLoreAdamW(net.parameters(), lr=1e-2, **options)
    parallel = nn.parallel.DistributedDataParallel(net)
    for _ in range(3):
        parallel(x).square().sum().backward()
        plain.step()
        plain.zero_grad()
    weights = [torch.zeros_like(net.weight) for _ in range(2)]
    distributed.all_gather(weights, net.weight.detach().contiguous())
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], before)
    (output / f"refused-{rank}").touch()
    distributed.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    # Without taking the group apart: gloo waits for ever now and then where one process is gone before the other.
    os._exit(0)
