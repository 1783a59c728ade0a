"""What of a recipe is checked before model and data are loaded, which may take minutes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, TrainingArguments
from trl import ModelConfig

from ..config import NORM_PROBES, GaLoreConfig
from ..errors import UserError
from ..integrations.holding import check_arguments as check_held
from ..integrations.trainer import KINDS, optim_name
from ..log import logger
from ..optim.admission import check_refresh
from ..optim.groups import check_held_options
from .checkpoints import check_folders
from .disk_space import check_space, sizes_of
from .hub import check_hub
from .model_checks import check_length, check_targets, check_weight_files, model_on_meta
from .output_folder import OutputArguments
from .trackers import check_logins, check_trackers


def check_arguments(training_args: TrainingArguments) -> None:
    """Check what needs neither model nor data; `resume_from_checkpoint` becomes the folder that it means.

    Raises:
        UserError: `output_dir`, `resume_from_checkpoint` or `report_to` are wrong.
        ValueError: `optim_args` are.
    """
    galore_config(training_args)  # read now, for its mistakes
    check_trackers(training_args)
    check_folders(training_args)


def check_model(model_args: ModelConfig, *, trust_remote_code: bool = False, variant: str | None = None) -> Any:
    """Look for the model, and name it where there is none: transformers' error may not.

    Args:
        model_args: its name.
        trust_remote_code: whether code that comes with it may run.
        variant: of the weights, where another is to be loaded; see `check_weight_files`.

    Returns:
        Its config.

    Raises:
        UserError: no model was given, or there is no such model.
    """
    name = model_args.model_name_or_path
    if name is None:
        raise UserError("model_name_or_path is missing: give a model's name or folder.")
    if Path(name).is_file():
        raise UserError(f"model_name_or_path {name} is a file. Give the folder that it is in, or a model's name.")
    if name.startswith((".", "/", "~")) and not Path(name).is_dir():  # no name on the Hub begins so
        home = " Write the path in full: only a shell knows ~." if name.startswith("~") else ""
        raise UserError(f"model_name_or_path {name}: there is no such folder.{home}")
    try:
        config = AutoConfig.from_pretrained(
            name, revision=model_args.model_revision, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise UserError(f"model_name_or_path {name} cannot be loaded: {error}") from error
    check_weight_files(name, variant)
    return config


def check_training(
    training_args: TrainingArguments,
    output: OutputArguments,
    config: Any,
    *,
    dtype: Any = None,
    auto_class: Any = None,
    max_length: int | None = None,
    adapters: bool = False,
) -> None:
    """Check what the model's config says of the training, and who is logged in: all that needs no data and no weights.

    Args:
        training_args: the arguments.
        output: whether another run is removed.
        config: the model's.
        dtype: that the weights are loaded in; `None` and "auto" are as they were saved.
        auto_class: transformers' `AutoModelFor...` that loads the model; by default the class that the config names.
        max_length: tokens of a sequence.
        adapters: whether the model gets adapters, or quantized weights: then its own matrices say nothing.

    Raises:
        UserError: the model has no such targets or none above the rank, or no such positions; the disk has no room for
            a checkpoint; nobody is logged in to the Hub or a tracker that the run is to go to.
    """
    kind = config.dtype if dtype in (None, "auto") else dtype
    kind = getattr(torch, kind) if isinstance(kind, str) else kind
    model = model_on_meta(config, auto_class, kind or torch.float32)
    if model is not None:
        check_length(model, config, max_length)
    if model is not None and not adapters:
        check_targets(training_args, model)
        check_space(training_args, sizes_of(training_args, model), overwrites=output.overwrite_output_dir)
    check_hub(training_args)
    check_logins(training_args)


def say_if_widened(
    model_args: ModelConfig, training_args: TrainingArguments, config: Any, given: Mapping[str, Any] | None = None
) -> None:
    """Say that a checkpoint of 16 bits is loaded in float32 on a GPU, which is TRL's choice where no dtype is given.

    Args:
        config: the model's.
        given: keywords for loading it, which go before `model_args`.
    """
    dtype = (given or {}).get("dtype", model_args.dtype)
    if dtype not in (None, "float32", torch.float32) or config.dtype not in (torch.bfloat16, torch.float16):
        return
    if training_args.device.type == "cpu" or model_args.load_in_4bit or model_args.load_in_8bit:
        return
    if getattr(model_args, "weight_bits", 16) == 8:
        logger.info(
            "%s computes in float32, TRL's choice where no dtype is given. With dtype: bfloat16 it is faster, and all "
            "but the weights in 8 bits takes half of the memory.",
            model_args.model_name_or_path,
        )
        return
    weights = _weights_of(config)
    logger.info(
        "%s is loaded in float32, TRL's choice where no dtype is given, although it was saved in %s%s. With dtype: "
        "bfloat16 its weights take half of that.",
        model_args.model_name_or_path,
        str(config.dtype).removeprefix("torch."),
        "" if weights is None else f": {4 * weights / 2**30:.1f} GiB for the weights alone",
    )


def say_if_emulated(training_args: TrainingArguments, dtype: str | torch.dtype) -> None:
    """Say that a card older than Ampere has no bfloat16: torch emulates it there, and transformers asks no further.

    Args:
        training_args: those of the run.
        dtype: of the weights.
    """
    device = training_args.device
    if device.type != "cuda" or torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0):
        return
    if training_args.bf16 or dtype in ("bfloat16", torch.bfloat16):
        logger.warning(
            "%s has no bfloat16, which torch emulates there, slowly. It is quick in float16: --dtype float32 --bf16 "
            "false --fp16 true, with an optim that is not layerwise; qwen3_0.6b_oasst2_t4.yaml has such settings.",
            torch.cuda.get_device_name(device),
        )


def _weights_of(config: Any) -> int | None:
    """How many elements the parameters of a config's model have; `None` for a model that is not transformers' own."""
    model = model_on_meta(config)
    return None if model is None else sum(param.numel() for param in model.parameters())


def galore_config(training_args: TrainingArguments) -> GaLoreConfig | None:
    """What `optim_args` of a `galore_*` optim say; `None` for another optim.

    Raises:
        ValueError: they are not what GaLore takes.
    """
    if optim_name(training_args) not in KINDS:
        return None
    config = GaLoreConfig.from_optim_args(training_args.optim_args)
    check_refresh(config.group_options())
    check_held(optim_name(training_args), config, training_args)
    hooked = KINDS[optim_name(training_args)].layerwise or bool(config.projected_backward)
    try:
        check_held_options([config.group_options()], hooked=hooked)
    except ValueError as error:  # a recipe's whole string would have to be typed again
        rest = dataclasses.replace(config, gradient_bits=16, norm_probes=NORM_PROBES).optim_args()
        raise ValueError(f'{error} Without it: --optim_args "{rest}".') from error
    return config
