"""Run by test_devices_page.py under torchrun: the programs in a folder, one after the other."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor


def whole(param: Tensor) -> Tensor:
    found: Tensor = param.full_tensor() if isinstance(param, DTensor) else param
    return found.detach()


def main(folder: Path) -> None:
    distributed.init_process_group("gloo")
    # Once for all programs: on a busy machine a group that is made anew may not find its processes.
    made = mock.patch.object(distributed, "init_process_group")
    made.start()
    for path in sorted(folder.glob("*.py")):
        # Only the first process's weights are to count.
        torch.manual_seed(int(os.environ["RANK"]))
        before = nn.Linear(256, 512).weight.detach().clone()
        torch.manual_seed(int(os.environ["RANK"]))
        names: dict[str, Any] = {}
        exec(compile(path.read_text("utf-8"), path.name, "exec"), names)
        model, optimizer = names["model"], names["optimizer"]
        weights = torch.cat([whole(param).flatten() for param in model.parameters()])
        of_all = [torch.empty_like(weights) for _ in range(distributed.get_world_size())]
        distributed.all_gather(of_all, weights)
        assert all(torch.equal(weights, other) for other in of_all), path
        distributed.broadcast(before, 0)
        first = whole(next(model.parameters()))
        assert first.shape == before.shape
        assert 1e-4 < (first - before).abs().max() < 0.5
        assert len(optimizer.targets()) == 2
        assert int(optimizer.state[optimizer.targets()[0].param]["step"]) == 10
        distributed.barrier()
    (folder / f"done-{os.environ['RANK']}").touch()
    distributed.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
