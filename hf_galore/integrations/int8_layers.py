"""Which layers of a model have their weights in 8 bits, and putting them there one by one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.quantizers_utils import should_convert_module

from ..int8 import NOT_FINITE, Int8Weight, is_int8
from ..log import and_others, logger
from ..optim.exchanged import mark_exchanged
from .int8_saving import take_int8_
from .weights import head_modules

NAMED = "in modules_to_not_convert"
"""Why a layer stays that somebody has named."""


def is_plain_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer that does with its weight what `nn.Linear` does, and nothing else.

    Not the output layer of `nn.MultiheadAttention`, whose weight that multiplies with by itself.
    """
    return (
        isinstance(module, nn.Linear)
        and not isinstance(module, NonDynamicallyQuantizableLinear)
        and type(module).forward is nn.Linear.forward
        and isinstance(module._parameters.get("weight"), Tensor)
        and module.weight.ndim == 2
    )


def kept_layers(model: nn.Module, modules_to_not_convert: Sequence[str] | None) -> dict[str, str]:
    """The linear layers that stay as they are, and why, by their names.

    Args:
        model: the model; its weights may be on the meta device.
        modules_to_not_convert: names, ends of names or patterns, as of transformers' quantization configs; `None` for
            none beside those that always stay.

    Raises:
        ValueError: one of them matches no layer.
    """
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for pattern in modules_to_not_convert or ():
        _check_pattern(pattern, model)
    heads, tied, adapters = _heads(model), _tied(model), _adapters(model)
    in_float32 = [
        part
        for one in transformers_models(model).values()
        for which in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")
        for part in getattr(one, which, None) or ()
    ]
    kept = {}
    for name, module in linears.items():
        if f"{name}.weight" in tied:
            kept[name] = "tied to another"
        elif id(module) in heads:  # whose weight TRL's loss takes apart by itself
            kept[name] = "output head"
        elif id(module) in adapters:
            kept[name] = "of an adapter"
        elif not should_convert_module(name, list(modules_to_not_convert or ())):
            kept[name] = NAMED
        elif any(part in name.split(".") for part in in_float32):
            kept[name] = "kept in float32"
        elif not is_plain_linear(module):
            kept[name] = f"a {type(module).__name__}"
    return kept


def _check_pattern(pattern: str, model: nn.Module) -> None:
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) or not any(isinstance(part, nn.Linear) for part in module.modules())
    ]
    if all(should_convert_module(name, [pattern]) for name in names):
        raise ValueError(
            f"modules_to_not_convert has {pattern!r}, which matches no layer of the model. Give a name in full or its "
            f"end, the beginning of names in full, or a pattern of them. The model's last layer is {names[-1]!r}."
        )


def _heads(model: nn.Module) -> set[int]:
    """The modules of output heads, by `id`: of language models, and what other heads have beside the base model."""
    heads = head_modules(model)
    for one in transformers_models(model).values():
        if one.base_model is not one:
            base = {id(module) for module in one.base_model.modules()}
            heads |= {id(module) for module in one.modules()} - base
    return heads


def transformers_models(model: nn.Module) -> dict[str, PreTrainedModel]:
    """The transformers models in a model, by their names: itself, or what PEFT, `torch.compile` or a program wraps."""
    found: dict[str, PreTrainedModel] = {}
    for name, module in model.named_modules():
        if isinstance(module, PreTrainedModel) and not any(
            f"{name}.".startswith(f"{one}.") or not one for one in found
        ):
            found[name] = module
    return found


def _adapters(model: nn.Module) -> set[int]:
    """The modules that PEFT has put beside a model's own to be trained, by `id`."""
    found: set[int] = set()
    for module in model.modules():
        for name in getattr(module, "adapter_layer_names", ()):
            beside = getattr(module, name, None)
            if isinstance(beside, nn.Module):
                found.update(id(part) for part in beside.modules())
    return found


def _tied(model: nn.Module) -> set[str]:
    """The names of parameters that several modules share."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    found = {*tied, *tied.values()}
    first: dict[int, str] = {}
    for path, module in model.named_modules():
        for own, param in module._parameters.items():
            name = f"{path}.{own}" if path else own
            if param is not None and first.setdefault(id(param), name) != name:
                found |= {first[id(param)], name}
    return found


@torch.no_grad()
def to_int8_(model: nn.Module, kept: dict[str, str]) -> list[str]:
    """Put the weights of a model into 8 bits, one by one, but for those that stay.

    Args:
        model: the model.
        kept: the names of layers that stay, as of `kept_layers`.

    Returns:
        The names of the layers that were converted; those that were before are not among them.

    Raises:
        ValueError: a weight is not finite, or of a dtype that cannot be; those before it are converted.
    """
    converted = []
    for name, module in model.named_modules():
        if name in kept or not is_plain_linear(module) or is_int8(module.weight):
            continue
        weight = module.weight
        if weight.dtype not in (torch.bfloat16, torch.float32):
            raise ValueError(
                f"{name}.weight is of {weight.dtype}; bfloat16 and float32 can be kept in 8 bits. Call "
                "model.to(torch.bfloat16) before, or name the layer in modules_to_not_convert."
            )
        made = Int8Weight.from_float(weight)
        if not made.is_meta and not all_finite(made):
            raise ValueError(f"{name}.weight has values that are not finite (NaN or infinite).")
        new = nn.Parameter(made, requires_grad=weight.requires_grad)
        if getattr(weight, "_is_hf_initialized", False):
            new._is_hf_initialized = True  # type: ignore[attr-defined]
        module.weight = new
        mark_exchanged(weight)
        take_int8_(module)
        del weight
        converted.append(name)
    return converted


def is_finite(tensor: Tensor) -> bool:
    """Whether all values of a tensor are finite, of which an int8 weight makes no floats for that."""
    return all_finite(tensor) if isinstance(tensor, Int8Weight) else bool(torch.isfinite(tensor).all())


def all_finite(weight: Int8Weight) -> bool:
    """Whether all values of a weight are finite."""
    return bool((weight.exponents != NOT_FINITE).all())  # a plan, which has no numbers, takes this for true


def say_what_stays(model: nn.Module, kept: dict[str, str]) -> None:
    """Say how many weights are in 8 bits, and which matrices are not."""
    named = dict(model.named_modules())
    codes = sum(module.weight.numel() for module in named.values() if is_int8(module._parameters.get("weight")))
    total = sum(param.numel() for param in model.parameters())
    stays: dict[str, list[str]] = {}
    for name, module in named.items():
        if isinstance(module, nn.Embedding):
            stays.setdefault("embeddings", []).append(name)
        elif isinstance(module, Conv1D):
            stays.setdefault("Conv1D", []).append(name)
        elif name in kept:
            stays.setdefault(kept[name], []).append(name)
        elif any(param.ndim >= 3 for param in module._parameters.values() if param is not None):
            stays.setdefault("stacks of matrices (experts, convolutions)", []).append(name)
    others = "; ".join(f"{kind}: {names[0]}{and_others(len(names) - 1)}" for kind, names in stays.items())
    logger.info(
        "%d of %d weights are kept in 8 bits (%.0f %%). As they are stay %s.",
        codes,
        total,
        100 * codes / max(1, total),
        others or "norms and biases",
    )


def layers_in_int8(model: Any) -> list[str]:
    """The names of the layers of a model whose weight is kept in 8 bits."""
    return [name for name, module in model.named_modules() if is_int8(module._parameters.get("weight"))]
