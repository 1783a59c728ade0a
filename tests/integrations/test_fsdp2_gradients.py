"""FSDP2: updates that need the gradient itself, of which each process has a part."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.support.warm import launch

pytestmark = pytest.mark.slow


def test_three_processes_are_one(tmp_path: Path) -> None:
    """Whichever dimension is divided, plain and layerwise, and resumed by a distributed checkpoint's functions."""
    launch(3, "tests.support.fsdp2_gradient_script", str(tmp_path))
    found = torch.load(tmp_path / "found.pt")
    assert len(found) == 13
    for words, (weights, norms) in found.items():
        assert weights < 1e-9, words
        assert norms < 1e-9, words
