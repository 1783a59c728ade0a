"""Converting a model that is in memory: the weights of its linear layers become 8-bit, one layer at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

import torch
from torch import Tensor, nn

from .weight import Int8Weight, is_int8

_KINDS = (torch.float32, torch.bfloat16)


def quantize_weights_(model: nn.Module, modules_to_not_convert: Collection[str] | None = None) -> list[str]:
    """Keep the weights of a model's linear layers in 8 bits from now on, each element rounded to the nearest.

    The output head stays as it is, and so does a weight that two modules share, and what is no `nn.Linear`: embeddings,
    stacks of experts, norms.

    Args:
        model: in memory; one with fake or meta tensors is converted as well.
        modules_to_not_convert: names of layers, or the last parts of names (`"gate"`), that stay as they are.

    Returns:
        The names of the weights that were converted.

    Raises:
        ValueError: the model has no such module.
    """
    kept = tuple(modules_to_not_convert or ())
    names = [name for name, _ in model.named_modules()]
    missing = [one for one in kept if not any(_is_named(name, one) for name in names)]
    if missing:
        raise ValueError(f"modules_to_not_convert names {', '.join(missing)}, but the model has no such module.")
    converted = []
    for name in linear_weights(model):
        module_name = name.removesuffix(".weight")
        if any(_is_named(module_name, one) for one in kept):
            continue
        module = model.get_submodule(module_name)
        weight = module.weight
        module.weight = None  # so that a name is all that holds the float weight
        new = nn.Parameter(Int8Weight.from_float(weight.detach()), weight.requires_grad)
        del weight
        module.weight = new
        converted.append(name)
    return converted


def linear_weights(model: nn.Module) -> list[str]:
    """The names of the weights of a model's linear layers that may be in 8 bits, in the order of the model."""
    head = _output_head(model)
    uses = Counter(
        id(param) for module in model.modules() for param in module._parameters.values() if param is not None
    )
    return [
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head and _can_be_int8(module.weight, uses)
    ]


def _can_be_int8(weight: Tensor, uses: Counter[int]) -> bool:
    return uses[id(weight)] == 1 and weight.dtype in _KINDS and not is_int8(weight)


def _output_head(model: nn.Module) -> nn.Module | None:
    """The output head of a model of transformers; `None` where there is none."""
    find = getattr(model, "get_output_embeddings", None)
    found = None if find is None else find()
    return found if isinstance(found, nn.Module) else None


def _is_named(name: str, given: str) -> bool:
    return name == given or name.endswith(f".{given}") or name.startswith(f"{given}.") or f".{given}." in name
