"""What every command that trains does: check, plan for the model card, train, save, leave a record."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, TypeVar

from transformers import AutoConfig, TrainingArguments
from trl import ModelConfig

import hf_galore

from ..integrations.trainer import KINDS, optim_name
from ..log import logger
from ..plan.planner import MemoryPlan, plan
from .checkpoints import check_folders
from .errors import UserError, reporting_errors
from .run_record import RecordedTrainer
from .trackers import check_trackers

_Trainer = TypeVar("_Trainer", bound=RecordedTrainer)


def run_recorded(
    parsed: Any,
    make_trainer: Callable[[], _Trainer],
    command: str,
    model: str,
    data: str | None,
    dataset_name: str | None,
) -> _Trainer:
    """Make the Trainer, train, save, and leave a record of the run.

    Args:
        parsed: the command's arguments; `training` and `recipe` are read here.
        command: `hf-galore sft`, ...
        model: what is trained, for the record.
        data: on what, likewise.
        dataset_name: the dataset on the Hub, for the model card.

    Returns:
        The trainer after training; the model has been saved to `output_dir`.

    Raises:
        UserError: something in the arguments is wrong. No file or folder is left behind then.
    """
    with reporting_errors(parsed.training.output_dir):
        memory_plan = plan_for_card(parsed)
        trainer = make_trainer()
        trainer.memory_plan = memory_plan
        trainer.record(command, parsed.recipe, model, data)
        train_and_save(trainer, dataset_name)
    return trainer


def check_arguments(training_args: TrainingArguments) -> None:
    """What needs neither model nor data, before they are loaded, which may take minutes.

    `resume_from_checkpoint` becomes the folder that it means.

    Raises:
        UserError: `output_dir`, `resume_from_checkpoint` or `report_to` are wrong.
        ValueError: `optim_args` are.
    """
    hf_galore.register()
    galore_config(training_args)  # read now, for its mistakes
    check_trackers(training_args)
    check_folders(training_args)


def check_model(model_args: ModelConfig, *, trust_remote_code: bool = False) -> None:
    """Find a model that is not there before the data are loaded, and name it: transformers' error may not.

    Raises:
        UserError: there is no such model.
    """
    name = model_args.model_name_or_path
    try:
        AutoConfig.from_pretrained(name, revision=model_args.model_revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise UserError(f"model_name_or_path {name} cannot be loaded: {error}") from error


def galore_config(training_args: TrainingArguments) -> hf_galore.GaLoreConfig | None:
    """What `optim_args` of a `galore_*` optim say; `None` for another optim.

    Raises:
        ValueError: they are not what GaLore takes.
    """
    if optim_name(training_args) not in KINDS:
        return None
    return hf_galore.GaLoreConfig.from_optim_args(training_args.optim_args)


def plan_for_card(parsed: Any) -> MemoryPlan | None:
    """The plan of a run that is to be published: its model card says it. `None` for others, and where there is none."""
    if not parsed.training.push_to_hub or optim_name(parsed.training) not in KINDS:
        return None
    try:
        return plan(copy.deepcopy(parsed))  # which a plan uses up
    except ValueError as error:
        logger.warning("The model card will say nothing of memory: %s", error)
        return None


def train_and_save(trainer: RecordedTrainer, dataset_name: str | None = None) -> None:
    """The second half of a run: train, or go on training, and save the model and the log."""
    trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    trainer.save_model(trainer.args.output_dir)
    trainer.save_record()
    if trainer.args.push_to_hub:
        trainer.push_to_hub(**({} if dataset_name is None else {"dataset_name": dataset_name}))
