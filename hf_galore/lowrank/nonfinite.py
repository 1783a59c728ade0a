"""Whether an update is skipped because its gradient is not finite.

One rule: what is skipped does not move, and neither do its moments or its count. On a CPU the host knows at once; on a
GPU the device alone does, and updates are computed so that nothing comes of them.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def skip_unless_finite(norm: Tensor) -> Tensor:
    """1 where a gradient's norm is NaN or infinite and its update has to be skipped, else 0; no waiting for the device.

    A norm that overflows counts: so would the second moment.

    Args:
        norm: 0-dimensional.
    """
    # Three small kernels instead of the six of isfinite().
    return (norm * 0).ne(0).to(torch.float32)


def known_skip(skip: Tensor) -> bool | None:
    """Whether an update is skipped, where the host can tell without waiting for a device; else `None`.

    Args:
        skip: 0-dimensional, 1 or 0.
    """
    return _look(skip)


def _look(skip: Tensor) -> bool | None:
    # A function of its own, for plans to replace: their tensors have no numbers, and stand for a GPU's or a CPU's.
    return bool(skip.item()) if skip.device.type == "cpu" else None


def has_numbers(tensor: Tensor) -> bool:
    """Whether a tensor is neither fake nor on the meta device."""
    return tensor.device.type != "meta" and not isinstance(tensor, FakeTensor)
