"""What a step does with all gradients at once, low-rank ones too: norms and scaling, in few kernels for all of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..backward.gradient import LowRankGradient, UsedGradient
from ..lowrank import nonfinite
from ..lowrank.projection import norm_of, norms_of
from .trained import Trained


def norms_for_step(parameters: Sequence[Trained]) -> dict[int, Tensor]:
    """The norms of what updates are made from, as far as it is there already, by the parameters' ids.

    On a GPU only: a CPU had better take each norm when it reads the gradient for the update anyway.
    """
    found: dict[int, Tensor] = {}
    for trained in parameters:
        gradient = trained.param.grad
        if gradient is None or isinstance(gradient, UsedGradient) or nonfinite.host_knows(gradient):
            continue
        if isinstance(gradient, LowRankGradient):
            # In 8 bits it is read for one update at a time: all at once would take what they save.
            if gradient.addend is None and isinstance(gradient.kept, Tensor):
                found[id(trained.param)] = gradient.kept
        elif not trained.projected and not gradient.is_sparse:
            found[id(trained.param)] = gradient
    return dict(zip(found, norms_of(list(found.values())), strict=True))


def norm_of_all(norms: Sequence[Tensor]) -> Tensor | None:
    """The norm of several tensors together, from the norm of each; `None` where there is none."""
    return norm_of(torch.stack([norm.to(norms[0].device) for norm in norms])) if norms else None


def clip_(gradients: Sequence[Tensor], norm: Tensor, max_norm: float) -> None:
    """Scale gradients in place to a norm of at most `max_norm`.

    Args:
        gradients: low-rank ones too.
        norm: of all of them together, 0-dimensional.
        max_norm: above 0.
    """
    # As torch.nn.utils.clip_grad_norm_, but that a norm that is not finite skips all updates, not only those that it
    # came from: the others would be made with a gradient of zero.
    factor = (max_norm / (norm + 1e-6)).clamp_(max=1.0) + norm * 0
    alike: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for gradient in gradients:
        alike.setdefault((gradient.device, gradient.dtype), []).append(gradient)
    for (device, dtype), some in alike.items():
        # A GPU would round the factor to their dtype in any case, and take them one by one where it has another.
        torch._foreach_mul_(some, factor.to(device, None if nonfinite.host_knows(some[0]) else dtype))
