"""The config of int8 weights as a quantization method of transformers."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

METHOD = "hf_galore_int8"
SAVES = ("float", "int8")


class Int8Config(QuantizationConfigMixin):  # type: ignore[misc, unused-ignore]
    """The `quantization_config` of a model whose linear layers have their weights in 8 bits (MXINT8), to be trained.

    Args:
        weight_bits: 8.
        modules_to_not_convert: layers that stay as they are, by names, their ends or patterns as of transformers'
            other configs; `None` for none. The output head, embeddings and what is tied to them stay in any case.
        save: what `save_pretrained` writes: `"float"` an ordinary checkpoint, of which a plain `from_pretrained` and
            every other tool makes the same values; `"int8"` codes and exponents, half as large, for which
            `hf_galore` has to be imported.

    Raises:
        ValueError: one of them is none of these.
        TypeError: `modules_to_not_convert` is no list of strings.
    """

    def __init__(
        self,
        weight_bits: int = 8,
        modules_to_not_convert: list[str] | None = None,
        save: str = "float",
        **unknown: Any,
    ) -> None:
        self.quant_method = unknown.pop("quant_method", METHOD)
        if unknown:
            raise ValueError(
                f"Int8Config has no {', '.join(sorted(unknown))}. It takes weight_bits, modules_to_not_convert and "
                "save."
            )
        self.weight_bits = weight_bits
        self.modules_to_not_convert = modules_to_not_convert
        self.save = save

    def __setattr__(self, name: str, value: Any) -> None:
        """Set a field, which is checked whenever that is: `save` may be changed as long as the model is there."""
        super().__setattr__(name, _CHECKS[name](value) if name in _CHECKS else value)

    def to_diff_dict(self) -> dict[str, Any]:
        """What a `config.json` says of it."""
        values: dict[str, Any] = self.to_dict()
        return values


def _checked_method(method: Any) -> str:
    if method != METHOD:
        raise ValueError(f"The quant_method of an Int8Config is {METHOD!r}, but is {method!r}. Leave it out.")
    return METHOD


def _checked_bits(bits: Any) -> int:
    if type(bits) is not int or bits != 8:
        raise ValueError(f"weight_bits has to be the whole number 8, but is {bits!r}. For 16, leave out the config.")
    return bits


def _checked_save(save: Any) -> str:
    if save not in SAVES:
        raise ValueError(f"save has to be one of {', '.join(map(repr, SAVES))}, but is {save!r}.")
    return str(save)


def _checked_names(names: Any) -> list[str] | None:
    if names is None:
        return None
    if not (isinstance(names, (list, tuple)) and all(isinstance(name, str) for name in names)):
        raise TypeError(f"modules_to_not_convert has to be a list of names of layers, but is {names!r}.")
    for name in names:
        _check_pattern(name)
    if "" in names:
        raise ValueError("modules_to_not_convert has an empty name, which every layer ends in. Leave it out.")
    return list(names)


def _check_pattern(name: str) -> None:
    try:
        re.compile(name)
    except re.error as error:
        raise ValueError(
            f"modules_to_not_convert has {name!r}, which is no regular expression ({error}), as which transformers "
            "takes names too. Write the name of a layer, or escape it."
        ) from None


_CHECKS: dict[str, Callable[[Any], Any]] = {
    "quant_method": _checked_method,
    "weight_bits": _checked_bits,
    "modules_to_not_convert": _checked_names,
    "save": _checked_save,
}
