"""Tests of what only a graphics card can show: skipped where there is none, whole with HF_GALORE_CARD=cpu.

`make test-gpu` runs them. On a card of 24 GB they take some minutes; a larger one is not used any further.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

# Read when cuBLAS is first used: without it matrix products are not deterministic, even where that is asked for.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
import torch

from tests.support.card import DEVICE, IS_THERE, ON_CARD

_HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark all that is in this folder, and skip it where there is no card."""
    for item in items:
        if _HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not IS_THERE:
                item.add_marker(pytest.mark.skip(reason=f"needs a graphics card: torch sees no {DEVICE.type} device"))


@pytest.fixture(autouse=True)
def _empty_card() -> Iterator[None]:
    yield
    gc.collect()
    if ON_CARD and IS_THERE:
        torch.cuda.empty_cache()
