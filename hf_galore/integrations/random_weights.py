"""Models by name with random weights, made on the device: for measuring, which needs a model's shapes and no more."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from ..int8 import Int8Weight
from ..int8.products import tiles
from .int8_config import Int8Config
from .int8_layers import kept_layers, to_int8_
from .int8_quantizer import Int8Quantizer


@contextlib.contextmanager
def random_weights(device: torch.device) -> Iterator[None]:
    """Within, `from_pretrained` of a language model reads its config only, and makes the weights on the device.

    Those that an `Int8Config` keeps in 8 bits never are there as floats. Acts on the whole process, other threads too.
    """

    def from_config(
        cls: Any,
        /,
        name: Any,
        *args: Any,
        config: Any = None,
        dtype: Any = None,
        attn_implementation: str | None = None,
        quantization_config: Any = None,
        **kwargs: Any,
    ) -> Any:
        config = config or AutoConfig.from_pretrained(name)
        config.use_cache = False
        if dtype is None or dtype == "auto":
            dtype = config.dtype or torch.float32

        def make() -> PreTrainedModel:
            return AutoModelForCausalLM.from_config(
                config,
                dtype=getattr(torch, dtype) if isinstance(dtype, str) else dtype,
                **({} if attn_implementation is None else {"attn_implementation": attn_implementation}),
            )

        if isinstance(quantization_config, Int8Config):
            return _in_8_bits(make, quantization_config, device)
        with torch.device(device):
            return make()

    with mock.patch.object(PreTrainedModel, "from_pretrained", classmethod(from_config)):
        yield


@torch.no_grad()
def _in_8_bits(make: Callable[[], PreTrainedModel], config: Int8Config, device: torch.device) -> PreTrainedModel:
    """A model as transformers initialises it, whose weights were never floats where they are kept in 8 bits."""
    with torch.device("meta"):
        model = make()
    quantizer = Int8Quantizer(config, pre_quantized=False)
    quantizer.kept = kept_layers(model, config.modules_to_not_convert)
    to_int8_(model, quantizer.kept)
    made: dict[int, nn.Parameter] = {}  # what is tied stays so
    deviation = model.config.get_text_config().initializer_range
    for module in model.modules():
        for name, param in module._parameters.items():
            if param is None:
                continue
            if id(param) not in made:
                made[id(param)] = _made(param, deviation, device)
            module._parameters[name] = made[id(param)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty_like(buffer, device=device)
        module._is_hf_initialized = False
    model.initialize_weights()  # whatever has no values yet, such as the angles of positions
    attached: PreTrainedModel = quantizer.attach(model)
    return attached


def _made(param: Tensor, deviation: float, device: torch.device) -> nn.Parameter:
    """A parameter on the device: in 8 bits with its values, else without."""
    if not isinstance(param, Int8Weight):
        return nn.Parameter(torch.empty_like(param, device=device), requires_grad=param.requires_grad)
    shape = param.shape
    weight = Int8Weight.empty((shape[0], shape[1]), param.dtype, device)
    for rows in tiles(*shape):
        size = (len(range(*rows.indices(shape[0]))), shape[1])
        weight.write_rows(rows, torch.empty(size, device=device).normal_(0, deviation))
    made = nn.Parameter(weight, requires_grad=param.requires_grad)
    made._is_hf_initialized = True  # type: ignore[attr-defined]
    return made
