"""What the machine has: the driver, the libraries."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import subprocess

import torch

_PACKAGES = ("hf-galore", "torch", "transformers", "trl", "accelerate", "bitsandbytes", "triton", "galore-torch")


def versions(*, cuda: bool) -> dict[str, str]:
    """The versions of what makes a difference; `not installed` where it is not."""
    found = {"python": platform.python_version(), **{name: version_of(name) for name in _PACKAGES}}
    if cuda:
        found["cuda"] = str(torch.version.cuda or torch.version.hip)
    return found


def driver() -> tuple[str | None, str | None]:
    """The driver's version and the card's power limit, as nvidia-smi tells them; `None` where it does not."""
    uuid = getattr(torch.cuda.get_device_properties(0), "uuid", None)  # numbers are CUDA's, and nvidia-smi has its own
    if shutil.which("nvidia-smi") is None or uuid is None:
        return None, None
    query = ["nvidia-smi", f"--id=GPU-{uuid}", "--query-gpu=driver_version,power.limit", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, check=False, timeout=60)
    if done.returncode:
        return None, None
    driver, _, power = done.stdout.strip().partition(", ")
    return driver or None, power if power and not power.startswith("[") else None


def version_of(package: str) -> str:
    """The version of a package; `not installed` where it is not."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
