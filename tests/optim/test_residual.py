"""Options that use the gradient itself: what becomes of a residual, and updates along the scaled gradient."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hf_galore import GaLoreAdamW
from tests.support.reference_residual import ReferenceResidual

OPTIONS: dict[str, dict[str, Any]] = {
    "fira": {"residual": "fira", "residual_scale": 0.7},
    "sign": {"residual": "sign", "residual_scale": 0.1},
    "channel": {"scaling": "channel"},
    "tensor": {"scaling": "tensor"},
}


def gradients(shape: tuple[int, ...], count: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Gradients that grow and shrink, so that the limiter has something to do, with a few directions that are large."""
    generator = torch.Generator().manual_seed(1)
    *stack, m, n = shape
    left, right = (torch.randn(*stack, size, 3, generator=generator, dtype=torch.float64) for size in (m, n))
    found = []
    for step in range(count):
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        mixed = left @ torch.randn(*stack, 3, 3, generator=generator, dtype=torch.float64) @ right.mT
        found.append(((mixed + noise) * (1 + 3 * (step % 7 == 5)) * 1e-2).to(dtype))
    return found


def made(weight: nn.Parameter, option: str, **group: Any) -> GaLoreAdamW:
    group = {"rank": 4, "update_proj_gap": 8, "scale": 0.5, **OPTIONS[option], **group}
    if "scaling" not in group:
        group = {"refresh": "svd", "proj_bits": 16, **group}
    return GaLoreAdamW([{"params": [weight], **group}], lr=0.01, weight_decay=0.1)


SIDES = [("fira", side) for side in ("left", "right", "full")] + [("sign", side) for side in ("left", "right", "full")]
SIDES += [(option, side) for option in ("channel", "tensor") for side in ("left", "right")]


@pytest.mark.parametrize(("option", "side"), SIDES)
@pytest.mark.parametrize("stack", [None, 3])
def test_it_follows_its_paper_for_fifty_steps_with_refreshes(option: str, side: str, stack: int | None) -> None:
    shape = (12, 20) if stack is None else (stack, 12, 20)
    weight = nn.Parameter(torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2)))
    optimizer = made(weight, option, proj_type=side)
    (target,) = optimizer.targets()
    start = weight.detach().numpy().copy().reshape(-1, 12, 20)
    scales = {key: OPTIONS[option][key] for key in ("residual_scale",) if key in OPTIONS[option]}
    references = [
        ReferenceResidual(one, option=option, lr=0.01, scale=0.5, weight_decay=0.1, **scales) for one in start
    ]
    for gradient in gradients(shape, 50):
        weight.grad = gradient.clone()
        optimizer.step()
        assert torch.equal(weight.grad, gradient)  # left as it is
        bases = [None if basis is None else basis.numpy().reshape(-1, *basis.shape[-2:]) for basis in target.bases()]
        for index, reference in enumerate(references):
            own = [None if basis is None else basis[index] for basis in bases]
            reference.step(gradient.numpy().reshape(-1, 12, 20)[index], *own)
    assert int(np.max(optimizer.state[weight]["refreshes"].numpy())) == 7
    for reference, found, one in zip(references, weight.detach().numpy().reshape(-1, 12, 20), start, strict=True):
        assert np.linalg.norm(found - reference.W) < 1e-6 * np.linalg.norm(reference.W - one)
