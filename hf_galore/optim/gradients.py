"""What a step does with all gradients at once, low-rank ones too: norms and scaling, in few kernels for all of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..backward.gradient import LowRankGradient, UsedGradient
from ..lowrank import nonfinite
from ..lowrank.projection import at_least_float32, norm_of, norms_of
from ..lowrank.ranks import Ranks
from .trained import Trained


def norms_for_step(parameters: Sequence[Trained]) -> dict[int, Tensor]:
    """The norms of what updates are made from, as far as it is there already, by the parameters' ids.

    On a GPU only: a CPU had better take each norm when it reads the gradient for the update anyway. And of sharded
    parameters, for which all processes are asked in one collective.
    """
    found: dict[int, Tensor] = {}
    sharded: list[Trained] = []
    for trained in parameters:
        gradient = trained.local.grad
        if gradient is None or isinstance(gradient, UsedGradient):
            continue
        if trained.ranks is not None:
            sharded.append(trained)
        elif nonfinite.host_knows(gradient):
            continue
        elif isinstance(gradient, LowRankGradient):
            # In 8 bits it is read for one update at a time: all at once would take what they save.
            if gradient.addend is None and isinstance(gradient.kept, Tensor):
                found[id(trained.param)] = gradient.kept
        elif not trained.projected and not gradient.is_sparse:
            found[id(trained.param)] = gradient
    norms = dict(zip(found, norms_of(list(found.values())), strict=True))
    return {**norms, **_norms_over_ranks(sharded)}


def norm_of_gradients(parameters: Sequence[Trained], others: Sequence[Tensor]) -> Tensor | None:
    """The norm of all that the next step would use; `None` where there is nothing.

    Args:
        parameters: of the optimizer.
        others: norms that count too.
    """
    gradients = [(trained, trained.local.grad) for trained in parameters]
    present = [(trained, g) for trained, g in gradients if g is not None and not isinstance(g, UsedGradient)]
    norms = norms_of([gradient for trained, gradient in present if trained.ranks is None])
    sharded = _norms_over_ranks([trained for trained, _ in present if trained.ranks is not None])
    found = [*others, *norms, *sharded.values()]
    return norm_of(torch.stack([norm.to(found[0].device) for norm in found])) if found else None


def _norms_over_ranks(sharded: Sequence[Trained]) -> dict[int, Tensor]:
    """The norms of the gradients of sharded parameters, by their ids: one collective for all of the same processes."""
    groups: dict[tuple[Ranks, torch.dtype], list[Trained]] = {}
    for trained in sharded:
        assert trained.ranks is not None
        groups.setdefault((trained.ranks, at_least_float32(trained.param.dtype)), []).append(trained)
    found: dict[int, Tensor] = {}
    for (ranks, _), alike in groups.items():
        norms = ranks.norms(norms_of([_local_gradient(trained) for trained in alike]))
        found.update(zip((id(trained.param) for trained in alike), norms.unbind(), strict=True))
    return found


def _local_gradient(trained: Trained) -> Tensor:
    gradient: Tensor = trained.local.grad
    return gradient


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
