"""Putting the weights of a model that is in memory into 8 bits."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from ..backward.patched import Patched
from .int8_config import Int8Config
from .int8_layers import NAMED, kept_layers, layers_in_int8, say_what_stays, to_int8_, transformers_models
from .int8_quantizer import Int8Quantizer


def quantize_weights_(model: nn.Module, modules_to_not_convert: list[str] | None = None) -> list[str]:
    """Put the weights of a model's linear layers into 8 bits (MXINT8), one after the other.

    What `from_pretrained(..., quantization_config=Int8Config())` does for a model that is loaded, this does for one
    that is there: made from a config, say. Each weight stays on its device; the float is freed as soon as nobody else
    holds it, so make the optimizer afterwards.

    Args:
        model: any module; weights of bfloat16 or float32. A transformers model is saved as an ordinary checkpoint then.
        modules_to_not_convert: names of layers that stay, as of `Int8Config`, beside the output head.

    Returns:
        The names of the layers that were converted.

    Raises:
        ValueError: a weight is not finite or of another dtype, a name is of no module, nothing can be converted, a
            transformers model is quantized otherwise, or an optimizer's projected backward is on the model.
        TypeError: `modules_to_not_convert` is no list of strings, or `model` no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"quantize_weights_ takes a model, an nn.Module, but was given a {type(model).__name__}.")
    config = Int8Config(modules_to_not_convert=modules_to_not_convert)
    models = transformers_models(model)
    for one in models.values():
        other = getattr(one, "hf_quantizer", None)
        if other is not None and not isinstance(other, Int8Quantizer):
            raise ValueError(
                f"The model's weights are quantized already, with {other.quantization_config.quant_method}. Load it "
                "without that."
            )
    linears = (name for name, module in model.named_modules() if isinstance(module, nn.Linear))
    hooked = next((name for name in linears if isinstance(model.get_submodule(name), Patched)), None)
    if hooked is not None:
        raise ValueError(
            f"An optimizer's hooks are on {hooked or 'the model'}, which compute with the weights that are there now. "
            "Call optimizer.close() before, and make the optimizer anew afterwards."
        )
    kept = kept_layers(model, config.modules_to_not_convert)
    converted = to_int8_(model, kept)
    if not converted and not layers_in_int8(model):
        raise ValueError(
            "The model has no linear layer whose weight could be kept in 8 bits. Those that stay: "
            f"{', '.join(f'{name} ({why})' for name, why in kept.items()) or 'none'}."
        )
    say_what_stays(model, kept)
    for prefix, one in models.items():
        if layers_in_int8(one):
            _attach(one, _inside(kept, prefix), config if not prefix else None)
    return converted


def _inside(kept: dict[str, str], prefix: str) -> dict[str, str]:
    """The layers that stay of a model inside another, by the names that they have there."""
    start = f"{prefix}." if prefix else ""
    return {name.removeprefix(start): why for name, why in kept.items() if name.startswith(start)}


def _attach(model: PreTrainedModel, kept: dict[str, str], config: Int8Config | None) -> None:
    """Let a transformers model know that it is quantized, and be saved by its `save_pretrained`.

    Args:
        model: the model.
        kept: its layers that stay, and why.
        config: what was asked for; `None` where that is said by names of a model around it.
    """
    named = [name for name, why in kept.items() if why == NAMED]
    config = config or Int8Config(modules_to_not_convert=named or None)
    quantizer = getattr(model, "hf_quantizer", None) or Int8Quantizer(config, pre_quantized=False)
    quantizer.kept = kept
    quantizer.attach(model)
    model.config._is_quantized = True
