"""The parts of a model that FSDP2 gathers at a time, as accelerate divides it. Makes nothing, and shards nothing.

accelerate's `fsdp2_prepare_model` (1.15) makes a unit of each decoder layer, by the classes that transformers names in
`_no_split_modules`, one of the input embedding, one of the last norm and the output head together, and one of what is
left. Layers and embedding are freed after the forward pass and gathered again for the backward pass; the last norm and
the head, with which the backward pass begins, and what is left, stay. With tied embeddings the embedding is the head.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

HEAD, REST = "norm and head", ""


def fsdp_units(model: nn.Module) -> dict[str, tuple[str, int]]:
    """By the name of each parameter its unit, and how often that is gathered for a micro-batch.

    Args:
        model: of transformers, as one process has it.
    """
    units: dict[int, tuple[str, int]] = {}
    for name, modules, gathers in _units(model):
        for module in modules:
            for param in module.parameters():
                units.setdefault(id(param), (name, gathers))
    return {name: units.get(id(param), (REST, 1)) for name, param in model.named_parameters()}


def _units(model: nn.Module) -> Iterator[tuple[str, list[nn.Module], int]]:
    whole = set(getattr(model, "_no_split_modules", None) or ())
    for name, module in model.named_modules():
        if type(module).__name__ in whole:
            yield name, [module], 2
    embedding, head = (getattr(model, f"get_{which}_embeddings", lambda: None)() for which in ("input", "output"))
    tied = head is not None and embedding is not None and head.weight is embedding.weight
    tail = [module for module in (_last_norm(model), embedding if tied else None, head) if module is not None]
    if embedding is not None and not tied:
        yield "embedding", [embedding], 2
    yield HEAD, tail, 1


def _last_norm(model: nn.Module) -> nn.Module | None:
    """The norm before the output head: the last among the base model's own parts."""
    base = getattr(model, getattr(model, "base_model_prefix", "") or "", model)
    norms = [module for module in base.children() if "Norm" in type(module).__name__]
    return norms[-1] if norms else None
