"""What a model's config and files say before its weights are loaded: the model itself is made without numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import TrainingArguments

from ..errors import UserError
from ..integrations.trainer import KINDS, galore_cls_and_kwargs, optim_name
from ..log import logger
from .checkpoints import missing_weights
from .whole_files import cut_off


def model_on_meta(config: Any, auto_class: Any = None, dtype: torch.dtype | None = None) -> nn.Module | None:
    """Make a config's model on the meta device, in a second or two whatever its size.

    Args:
        config: the config.
        auto_class: transformers' `AutoModelFor...` that makes it; by default the class that the config names is made.
        dtype: of its weights.

    Returns:
        The model; `None` for one that is not transformers' own.
    """
    make = (
        getattr(transformers, (config.architectures or [""])[0], None) if auto_class is None else auto_class.from_config
    )
    if make is None:
        return None
    with torch.device("meta"):
        try:
            model: nn.Module = make(config)
        except ValueError:  # there is no such class for it
            return None
    return model if dtype is None else model.to(dtype)


def check_weight_files(name: str, variant: str | None = None) -> None:
    """Check a folder with a model: that it has weights, and that none of their files is cut off.

    Args:
        name: the folder, or a name on the Hub, which is not looked at.
        variant: of the weights, where another is to be loaded: `fp16` for `model.fp16.safetensors`.

    Raises:
        UserError: it has no weights, or not all of them, or they are cut off.
    """
    folder = Path(name)
    if not folder.is_dir() or any(folder.glob("*.gguf")):  # of which transformers takes the one that it is told
        return
    files = sorted(path for path in folder.iterdir() if path.match("*model*.safetensors") or path.match("*model*.bin"))
    broken = next((f"{path.name} is cut off ({reason})" for path in files if (reason := cut_off(path))), None)
    # Those of a variant have names of their own, which transformers names where they are missing.
    missing = missing_weights(folder, {path.name for path in folder.iterdir()}) if variant is None else []
    if broken is None and missing:
        broken = f"it holds no {missing[0]}"
    if broken is not None:
        raise UserError(
            f"model_name_or_path {name} cannot be loaded: {broken}. Copy or download it again, or give another model."
        )


def check_targets(training: TrainingArguments, model: nn.Module) -> None:
    """Check that a `galore_*` optim can train a model as asked: its targets, their ranks, the devices, the dtypes.

    Raises:
        UserError: it cannot, as the Trainer would say when it makes the optimizer.
    """
    if optim_name(training) not in KINDS:
        return
    try:
        galore_cls_and_kwargs(training, model, say=False)
    except (ValueError, TypeError) as error:
        raise UserError(str(error)) from error


def check_length(model: nn.Module, config: Any, max_length: int | None, key: str = "max_length") -> None:
    """Check sequences against the positions that a model knows; a warning says of more than it was trained with.

    Raises:
        UserError: it has learned a vector for each position, and none for the last of such a sequence.
    """
    known = getattr(config.get_text_config(), "max_position_embeddings", None)
    if max_length is None or not isinstance(known, int) or max_length <= known - _padding_of_positions(model):
        return
    learned = _positions(model)
    if learned is None:
        logger.warning(
            "%s %d is more than the %d positions that the model was trained with: of longer texts it knows nothing "
            "beyond. Its config says so (max_position_embeddings).",
            key,
            max_length,
            known,
        )
        return
    usable = known - _padding_of_positions(model)
    raise UserError(
        f"{key} {max_length} is more than the {usable} positions that the model has a vector for. Give at most "
        f"{usable}."
    )


def _positions(model: nn.Module) -> nn.Embedding | None:
    """The embedding of positions, of a model that learns one; its name is not the same in all."""
    found = (
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding)
        and any(part in name.rpartition(".")[2] for part in ("position_embeddings", "embed_positions", "wpe"))
    )
    return next(found, None)


def _padding_of_positions(model: nn.Module) -> int:
    """How many of the first positions stand for padding: RoBERTa begins to count behind them."""
    learned = _positions(model)
    return 0 if learned is None or learned.padding_idx is None else learned.padding_idx + 1
