"""Mixtures of experts with `all-linear`: nearly all of them is projected, and state takes what that promises."""

from __future__ import annotations

import pytest

from tests.benchmarks.experts import RANK, SIZES, quarter, share_of_bytes, share_projected, small
from tests.support.zoo import ZOO


@pytest.mark.parametrize("name", SIZES)
def test_experts_are_projected_and_state_is_small(name: str) -> None:
    """Of the parameters in matrices, embeddings and output head too; against AdamW's moments, bases included."""
    real = ZOO[name].make_real()
    for model, rank in ((small(name), RANK), (real, quarter(real))):
        assert share_projected(model, rank) >= 0.95
        assert share_of_bytes(model, rank) < 0.45
