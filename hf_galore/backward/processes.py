"""Low-rank gradients and several processes, which do not go together yet."""

from __future__ import annotations

import torch


def check_processes() -> None:
    """Check that no other process trains the same model.

    Raises:
        ValueError: torch.distributed runs more than one process.
    """
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        raise ValueError(
            f"layerwise=True and projected_backward=True do not work with {distributed.get_world_size()} "
            "processes: low-rank gradients are not reduced over them, and the processes' weights would drift "
            "apart. Launch one process, or make the optimizer with layerwise=False and projected_backward=False, "
            "which trains under DistributedDataParallel."
        )
