"""Adam where a gradient has another dtype than its weight (`Tensor.grad_dtype`), as mixed precision may have it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from hf_galore.optim import GaLoreAdamW, GaLoreAdamW8bit


@pytest.mark.parametrize("known", [True, False], ids=["host knows", "device knows"])
@pytest.mark.parametrize("cls", [GaLoreAdamW, GaLoreAdamW8bit])
def test_a_float32_weight_takes_a_bfloat16_gradient(cls: Any, known: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not known:
        monkeypatch.setattr("hf_galore.lowrank.nonfinite._look", lambda norm: None)
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(96, 80)), nn.Parameter(torch.randn(96, 80))]
        optimizer = cls([{"params": params[:1]}, {"params": params[1:], "rank": 8, "proj_bits": 16}], lr=1e-2)
        for _ in range(3):
            for param in params:
                param.grad_dtype = dtype
                param.grad = torch.randn(96, 80).bfloat16().to(dtype)
            optimizer.step()
        results.append([param.detach() for param in params])
    assert torch.equal(results[0][0], results[1][0])
    # A basis comes from the gradient in float32 either way; R is in its dtype.
    torch.testing.assert_close(results[0][1], results[1][1], atol=2e-3, rtol=0)
