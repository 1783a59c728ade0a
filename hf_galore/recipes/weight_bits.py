"""The key `weight_bits` of recipes: weights of linear layers in 8 bits, which train."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from transformers import TrainingArguments
from trl import ModelConfig, get_quantization_config

from ..errors import UserError
from ..integrations.int8_config import Int8Config
from ..integrations.trainer import KINDS, optim_name

HELP = (
    "Bits of the weights of linear layers while they are trained: 16 for what dtype says, or 8 for half of that "
    "memory (MXINT8, updated at random rounding; docs/int8.md). What is saved is an ordinary checkpoint either way."
)
CHOICES = [16, 8]


@dataclasses.dataclass
class ModelArguments(ModelConfig):  # type: ignore[misc, unused-ignore]
    """TRL's options of a model, and one of ours."""

    weight_bits: int = dataclasses.field(default=16, metadata={"help": HELP, "choices": CHOICES})


def weight_bits_of(model_args: Any) -> int:
    """The bits that options of a model say; 16 for TRL's own, which do not say it."""
    return int(getattr(model_args, "weight_bits", 16))


def quantization_of(model_args: Any) -> Any:
    """The `quantization_config` by which a model is loaded; `None` for one that is not quantized."""
    return Int8Config() if weight_bits_of(model_args) == 8 else get_quantization_config(model_args)


def check_weight_bits(model_args: Any, training_args: TrainingArguments, dtype: Any) -> None:
    """Check that weights can be kept in 8 bits, where that is asked for.

    Args:
        model_args: the model's options.
        training_args: the training's.
        dtype: that the model is loaded in.

    Raises:
        UserError: something else that is asked for does not go with it.
    """
    if weight_bits_of(model_args) != 8:
        return
    for key in ("load_in_4bit", "load_in_8bit"):
        if getattr(model_args, key, False):
            raise UserError(
                f"weight_bits 8 and {key} are both given: the one has 8 bits that train, the other weights of "
                "bitsandbytes that do not. Leave one out."
            )
    if dtype in ("float16", torch.float16) or training_args.fp16:
        key = "fp16" if training_args.fp16 else "dtype float16"
        raise UserError(
            f"weight_bits 8 does not go with {key}, whose range is smaller than that of such weights. Give dtype: "
            "bfloat16, and bf16: true on a card that has it."
        )
    optim = optim_name(training_args)
    if optim not in KINDS and not getattr(model_args, "use_peft", False):
        raise UserError(
            f"weight_bits 8 does not go with optim {optim}: its updates are smaller than a step of 8 bits and would be "
            f"lost. Give one of {', '.join(KINDS)}, which round theirs at random; or use_peft: true, for adapters."
        )
