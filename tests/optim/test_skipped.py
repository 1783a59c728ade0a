"""What the host learns of updates that only devices know to be skipped, and how often it asks."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_galore.optim.skipped import Skipped, SkippedUpdates


def test_one_read_tells_of_all_parameters_of_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each read of its own would wait for a GPU again: 291 times at each log of a 7B model."""
    params = [torch.zeros(2) for _ in range(5)]
    skipped = SkippedUpdates()
    for step in range(1, 5):
        for index, param in enumerate(params):
            is_skipped = (index == 2 and step >= 3) or index == 4
            skipped.note(param, torch.tensor(math.nan if is_skipped else 1.0), step)
        skipped.count()
    reads = []
    for name in ("item", "tolist"):
        original = getattr(Tensor, name)

        def counted(self: Tensor, original: Any = original) -> Any:
            reads.append(tuple(self.shape))
            return original(self)

        monkeypatch.setattr(Tensor, name, counted)
    assert skipped.read() == {params[2]: 2, params[4]: 4}
    assert reads == [(5, 2)]
    assert skipped.known() == {params[2]: Skipped(2, 3), params[4]: Skipped(4, 1)}
    assert skipped.read() == {}


def test_what_is_skipped_later_is_added() -> None:
    param = torch.zeros(2)
    skipped = SkippedUpdates()
    skipped.note_known(param, 2)
    skipped.note(param, torch.tensor(math.inf), 7)
    assert skipped.read() == {param: 1}
    skipped.note(param, torch.tensor(math.nan), 9)
    assert skipped.read() == {param: 1}
    assert skipped.known() == {param: Skipped(3, 2)}
