"""What of a recipe is checked before model and data are loaded, which may take minutes."""

from __future__ import annotations

from transformers import AutoConfig, TrainingArguments
from trl import ModelConfig

from ..config import GaLoreConfig
from ..integrations.trainer import KINDS, optim_name
from ..optim.admission import check_refresh
from ..optim.groups import check_gradient_bits
from .checkpoints import check_folders
from .errors import UserError
from .trackers import check_trackers


def check_arguments(training_args: TrainingArguments) -> None:
    """Check what needs neither model nor data; `resume_from_checkpoint` becomes the folder that it means.

    Raises:
        UserError: `output_dir`, `resume_from_checkpoint` or `report_to` are wrong.
        ValueError: `optim_args` are.
    """
    galore_config(training_args)  # read now, for its mistakes
    check_trackers(training_args)
    check_folders(training_args)


def check_model(model_args: ModelConfig, *, trust_remote_code: bool = False) -> None:
    """Look for the model, and name it where there is none: transformers' error may not.

    Raises:
        UserError: no model was given, or there is no such model.
    """
    name = model_args.model_name_or_path
    if name is None:
        raise UserError("model_name_or_path is missing: give a model's name or folder.")
    try:
        AutoConfig.from_pretrained(name, revision=model_args.model_revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise UserError(f"model_name_or_path {name} cannot be loaded: {error}") from error


def galore_config(training_args: TrainingArguments) -> GaLoreConfig | None:
    """What `optim_args` of a `galore_*` optim say; `None` for another optim.

    Raises:
        ValueError: they are not what GaLore takes.
    """
    if optim_name(training_args) not in KINDS:
        return None
    config = GaLoreConfig.from_optim_args(training_args.optim_args)
    check_refresh(config.group_options())
    hooked = KINDS[optim_name(training_args)].layerwise or bool(config.projected_backward)
    check_gradient_bits([config.group_options()], hooked=hooked)
    return config
