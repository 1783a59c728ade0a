"""Int8 weights as a quantization method of transformers: its quantizer.

`from_pretrained(name, quantization_config=Int8Config())` reads one weight at a time, puts it into 8 bits where it is to
stay, and drops it: transformers reads without threads ahead of it where something is quantized on the way, so no more
than one weight is there as a float at any time.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name

from ..int8 import Int8Weight, is_int8
from ..optim.exchanged import mark_exchanged
from .int8_config import METHOD, Int8Config
from .int8_layers import all_finite, is_plain_linear, kept_layers, say_what_stays, to_int8_
from .int8_saving import CODES, EXPONENTS, bounded_shards, leave_int8_, take_int8_, unbounded_shards, unwritten

_DTYPES = (torch.bfloat16, torch.float32)
# 8 bits, and an exponent of 8 bits for each 32.
_BYTES = 33 / 32


class Int8Quantizer(HfQuantizer):  # type: ignore[misc, unused-ignore]
    """What transformers asks when it loads, trains and saves a model of an `Int8Config`."""

    requires_calibration = False

    def __init__(self, quantization_config: Int8Config, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.kept: dict[str, str] = {}
        """Why layers stay as they are, by their names."""
        self.broken: list[str] = []
        """Parameters of a checkpoint that cannot be converted, and why."""

    # ---- what it is

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        """Whether a model can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether a model can be trained with adapters."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Whether the weights themselves can be trained: what the Trainer asks of a model that has no adapters."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Whether `generate` may compile a model."""
        return False

    # ---- before loading

    def validate_environment(self, *_: Any, device_map: Any = None, **__: Any) -> None:
        """Refuse parts of a model on the disk, which are read as floats at every pass.

        Raises:
            ValueError: `device_map` puts some there.
        """
        if isinstance(device_map, dict):
            _check_devices(device_map)

    def update_device_map(self, device_map: Any) -> Any:
        """The `device_map`; without one the process's card, so that weights never are in the host's memory together."""
        if device_map is not None or not torch.cuda.is_available():
            return device_map
        rank = int(os.environ.get("LOCAL_RANK", -1))
        return {"": rank if 0 <= rank < torch.cuda.device_count() else torch.cuda.current_device()}

    def update_dtype(self, dtype: Any) -> Any:
        """The dtype of the model, or those of its parts by their names.

        Raises:
            ValueError: float16, whose range is smaller than that of the weights.
        """
        for one in dtype.values() if isinstance(dtype, dict) else (dtype,):
            if (getattr(torch, one, one) if isinstance(one, str) else one) not in _DTYPES:
                raise ValueError(
                    f"A model with int8 weights computes in bfloat16 or float32, and this one is to be {one}. Load it "
                    "with dtype=torch.bfloat16."
                )
        return dtype

    def param_needs_quantization(self, model: Any, param_name: str, **_: Any) -> bool:
        """Whether a parameter is kept in 8 bits."""
        module, name = get_module_from_name(model, param_name)
        return name == "weight" and is_plain_linear(module) and param_name.rpartition(".")[0] not in self.kept

    def param_element_size(self, model: Any, param_name: str, param: Tensor) -> float:
        """Bytes of an element: what transformers reserves on a card before it loads, and shares among several."""
        if self.param_needs_quantization(model, param_name):
            return _BYTES
        return float(param.element_size())

    def get_quantize_ops(self) -> ConversionOps:
        """What makes a weight of a checkpoint an int8 weight."""
        return _Quantize(self)

    def get_weight_conversions(self) -> list[WeightConverter]:
        """What makes int8 weights of the codes and exponents of a checkpoint that was saved so."""
        if not self.pre_quantized:
            return []
        names = [CODES.removeprefix("."), EXPONENTS.removeprefix(".")]
        return [WeightConverter(source_patterns=names, target_patterns="weight", operations=[_Deserialize(self)])]

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> Any:
        self.kept = kept_layers(model, self.quantization_config.modules_to_not_convert)
        return model

    # ---- while loading

    def convert(self, name: str, value: Tensor, layer_weight: Tensor) -> Tensor:
        """A weight of an ordinary checkpoint in 8 bits, on the device where it is.

        Args:
            name: of the parameter.
            value: the weight.
            layer_weight: what the layer has so far.
        """
        return self.checked(name, Int8Weight.from_float(value), layer_weight)

    def checked(self, name: str, weight: Int8Weight, layer_weight: Tensor) -> Int8Weight:
        """A weight; what is wrong with it is said when all are read, for transformers only logs what is raised here."""
        if weight.shape != layer_weight.shape:
            self.broken.append(f"{name} is {_by(weight)} in the checkpoint and {_by(layer_weight)} in the model")
        elif not all_finite(weight):
            self.broken.append(f"{name} has values that are not finite (NaN or infinite)")
        return weight

    # ---- after loading

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        if self.broken:
            raise ValueError(
                f"Weights of {model.config.name_or_path} cannot be kept in 8 bits: {'; '.join(self.broken)}."
            )
        _check_devices(getattr(model, "hf_device_map", None) or {})
        # Those that the checkpoint does not have were made just now, as floats.
        to_int8_(model, self.kept)
        # Ours is not to be undone when the model is saved: what is saved says `unwritten`.
        used = getattr(model, "_weight_conversions", None)
        if used:
            model._weight_conversions = [one for one in used if not _is_ours(one)]
        say_what_stays(model, self.kept)
        return self.attach(model)

    def attach(self, model: Any) -> Any:
        """Let a model say that it is quantized as others of transformers do, and be saved as the config says."""
        model.hf_quantizer = self
        model.is_quantized = True
        model.quantization_method = METHOD
        self._say_in_config(model)
        bounded_shards(model)
        take_int8_(model)
        return model

    def _say_in_config(self, model: Any) -> None:
        """The `config.json` of an ordinary checkpoint says nothing of a quantization: plain tools read it."""
        if self.quantization_config.save == "int8":
            model.config.quantization_config = self.quantization_config
        elif hasattr(model.config, "quantization_config"):
            del model.config.quantization_config

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """What `save_pretrained` writes."""
        self._say_in_config(model)
        return unwritten(model.state_dict(), self.quantization_config.save), {}

    def dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        """Make the model one of floats.

        Args:
            model: the model.
            dtype: of all of it; `None` for that which each weight has, and not, as other quantizers of transformers
                have it, for that which the model was loaded in: it may have been cast, or a part kept in float32.

        Raises:
            ValueError: the dtype is no floating-point one.
        """
        made = self._dequantize(model, dtype)
        self.remove_quantization_config(made)
        return made

    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
        if dtype is not None and not (isinstance(found, torch.dtype) and found.is_floating_point):
            raise ValueError(
                f"Int8 weights cannot be dequantized to {dtype}, which is no floating-point dtype. Give one, or leave "
                "it out for that of the model."
            )
        for module in model.modules():
            if is_int8(module._parameters.get("weight")):
                weight = module.weight
                module.weight = nn.Parameter(weight.dequantized(found), requires_grad=weight.requires_grad)
                mark_exchanged(weight)
                leave_int8_(module)
        unbounded_shards(model)
        return model if found is None else nn.Module.to(model, found)


class _Quantize(ConversionOps):  # type: ignore[misc, unused-ignore]
    """Weights of an ordinary checkpoint, where they are to stay."""

    def __init__(self, hf_quantizer: Int8Quantizer) -> None:
        self.hf_quantizer = hf_quantizer

    def convert(self, input_dict: dict[str, Any], model: Any = None, **_: Any) -> dict[str, Any]:
        made = {}
        for name, value in input_dict.items():
            value = value[0] if isinstance(value, list) else value
            if self.hf_quantizer.param_needs_quantization(model, name):
                value = self.hf_quantizer.convert(name, value, get_module_from_name(model, name)[0].weight)
            made[name] = value
        return made


class _Deserialize(ConversionOps):  # type: ignore[misc, unused-ignore]
    """Codes and exponents."""

    def __init__(self, hf_quantizer: Int8Quantizer) -> None:
        self.hf_quantizer = hf_quantizer

    def __deepcopy__(self, memo: Any) -> _Deserialize:
        """Itself: transformers copies it for each weight, and what is broken is noted by one quantizer."""
        return self

    def convert(
        self, input_dict: dict[str, Any], model: Any = None, full_layer_name: str = "", **_: Any
    ) -> dict[str, Any]:
        parts = {name: value[0] if isinstance(value, list) else value for name, value in input_dict.items()}
        weight = get_module_from_name(model, full_layer_name)[0].weight
        codes, exponents = (parts.get(name.removeprefix(".")) for name in (CODES, EXPONENTS))
        if codes is None or exponents is None:
            raise ValueError(f"The checkpoint has not both codes and exponents of {full_layer_name}.")
        return {
            full_layer_name: self.hf_quantizer.checked(
                full_layer_name, Int8Weight(codes, exponents, weight.dtype), weight
            )
        }


def _by(weight: Tensor) -> str:
    return "×".join(map(str, weight.shape))


def _is_ours(conversion: Any) -> bool:
    return any(isinstance(one, _Deserialize) for one in getattr(conversion, "operations", ()))


def _check_devices(device_map: dict[str, Any]) -> None:
    places = {str(place) for place in device_map.values()}
    if "disk" in places or ("cpu" in places and len(places) > 1):
        raise ValueError(
            "Part of a model with int8 weights is to be on the disk or in the host's memory, and the rest on a card "
            f"(device_map puts it on {', '.join(sorted(places))}): that is not possible. Give a device_map of cards, "
            'or {"": 0} for all of it on the first.'
        )


def register_int8() -> None:
    """Let transformers know `Int8Config`, and load what was saved with it. Once or many times alike."""
    if METHOD not in auto.AUTO_QUANTIZATION_CONFIG_MAPPING:
        auto.register_quantization_config(METHOD)(Int8Config)
    if METHOD not in auto.AUTO_QUANTIZER_MAPPING:
        auto.register_quantizer(METHOD)(Int8Quantizer)


def unregister_int8() -> None:
    """Undo `register_int8`."""
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING.pop(METHOD, None)
    auto.AUTO_QUANTIZER_MAPPING.pop(METHOD, None)
