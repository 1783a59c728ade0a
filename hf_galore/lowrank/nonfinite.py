"""Whether an update is skipped because its gradient is not finite.

One rule: what is skipped does not move, and neither do its moments or its count. On a CPU the host knows at once; on a
GPU the device alone does, and updates are computed so that nothing comes of them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


class Skip:
    """Whether an update is skipped: where the norm of its gradient is NaN or infinite.

    A norm that overflows counts: so would the second moment.

    Args:
        norm: 0-dimensional.
    """

    __slots__ = ("_flag", "known", "norm")

    def __init__(self, norm: Tensor) -> None:
        self.norm = norm
        self.known = _look(norm)
        """Whether it is, where the host can tell without waiting for a device; else `None`."""
        self._flag: Tensor | None = None

    @property
    def flag(self) -> Tensor | None:
        """1 where it is and 0 where not, 0-dimensional float32, on the device; `None` where it is known not to be."""
        if self.known is False:
            return None
        if self._flag is None:  # made for those who ask: kernels that look at the norm themselves need none
            self._flag = flags_of(self.norm)
        return self._flag


def flags_of(norms: Tensor) -> Tensor:
    """1 where a norm is NaN or infinite, else 0, float32; no waiting for the device."""
    # Three small kernels instead of the six of isfinite().
    return (norms * 0).ne(0).to(torch.float32)


# Functions of their own, for plans to replace: their tensors have no numbers, and stand for a GPU's or a CPU's.


def host_knows(tensor: Tensor) -> bool:
    """Whether the host can look at a tensor's numbers without waiting for a device."""
    return tensor.device.type == "cpu"


def _look(norm: Tensor) -> bool | None:
    return not math.isfinite(norm.item()) if host_knows(norm) else None


def has_numbers(tensor: Tensor) -> bool:
    """Whether a tensor is neither fake nor on the meta device."""
    return tensor.device.type != "meta" and not isinstance(tensor, FakeTensor)
