"""Which modules a projected backward serves, and how."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

from torch import nn

from .embedding import patch_embedding, why_not_by_rows
from .expert_modules import patch_experts, why_not_watched
from .linear import LinearPatch, patch_linear, why_not_patchable
from .patched import ModulePatch

if TYPE_CHECKING:
    from ..optim.trained import Trained


def may_be_served(module: nn.Module, trained: Trained) -> bool:
    """Whether a module's gradient of one of its parameters may come otherwise than as a whole."""
    if isinstance(module, nn.Embedding):
        # A full-rank one, too: its rows may be added to the output head's gradient. FSDP2 reduces a whole one.
        return trained.needs_gradient is None and trained.ranks is None
    return trained.projected and trained.needs_gradient is None


def tied_embeddings(model: nn.Module) -> set[int]:
    """The ids of weights that are an embedding's and another module's: in a backward pass they have two gradients."""
    owners: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        for param in module.parameters(recurse=False):
            owners.setdefault(id(param), []).append(module)
    return {
        key
        for key, modules in owners.items()
        if len(modules) > 1 and any(isinstance(module, nn.Embedding) for module in modules)
    }


def patched(module: nn.Module, sink: weakref.ref[Any], *, experts: bool) -> LinearPatch | ModulePatch | str:
    """Send the gradients of a module's weights to a sink; or why that cannot be, in words.

    Args:
        module: not yet patched.
        sink: where they go.
        experts: whether its weights are stacks of experts.
    """
    if experts:
        return why_not_watched(module) or patch_experts(module, sink)
    if isinstance(module, nn.Embedding):
        return why_not_by_rows(module) or patch_embedding(module, sink)
    return why_not_patchable(module) or patch_linear(module, sink)
