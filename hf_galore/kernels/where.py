"""Where the Triton kernels serve, and how one is launched."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import sys
from typing import Any

import torch
from torch import Tensor

from ..lowrank.nonfinite import has_numbers

# What the kernels read and write; they compute in float32.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Triton compiles for no older cards.
_LEAST_CAPABILITY = (7, 0)


def serves(tensor: Tensor) -> bool:
    """Whether the kernels serve on a tensor's device: one of NVIDIA's of capability 7.0 or above, with Triton there.

    Of a fake tensor: whether they would on a machine like this one with such a card, and Triton installed.
    """
    return _look(tensor)


def _look(tensor: Tensor) -> bool:
    # A function of its own, for plans to replace: their tensors are a CPU's, and stand for a GPU's.
    if tensor.device.type != "cuda":
        return False
    return _serves_device(tensor.device) if has_numbers(tensor) else could_be_installed()


def could_be_installed() -> bool:
    """Whether there is a Triton for this system that torch for CUDA brings along."""
    return sys.platform == "linux" and torch.version.hip is None


@functools.cache
def _serves_device(device: torch.device) -> bool:
    if torch.version.hip is not None or importlib.util.find_spec("triton") is None:
        return False
    return torch.cuda.get_device_capability(device) >= _LEAST_CAPABILITY


def triton_version() -> str:
    """The version of Triton, which may be there under another name, or not be importable."""
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "of unknown version"


def launch(name: str, programs: int, first: Tensor, *others: Any, **constants: Any) -> None:
    """Run so many programs of a kernel on the current stream of the first argument's device."""
    if programs:
        with torch.cuda.device_of(first):
            getattr(_programs(), name)[(programs,)](first, *others, **constants)


def _programs() -> Any:
    return importlib.import_module("hf_galore.kernels.programs")
