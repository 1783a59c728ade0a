"""Running a recipe: make its Trainer, train, save, and leave a record of the run."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from transformers import TrainerCallback

from ..errors import UserError
from ..integrations.trainer import KINDS, optim_name
from ..log import logger
from ..plan.planner import MemoryPlan
from .any_recipe import Arguments
from .checkpoints import check_folders
from .errors import reporting_errors
from .output_folder import check_unused, remove_run
from .planning import plan_recipe
from .resuming import check_left, check_settings
from .run_record import RecordedTrainer
from .settings import recipe_text, settings_of

_Trainer = TypeVar("_Trainer", bound=RecordedTrainer)


def run(parsed: Arguments, callbacks: Sequence[TrainerCallback] = ()) -> RecordedTrainer:
    """Run a recipe that has been parsed.

    Args:
        parsed: the recipe.
        callbacks: for the Trainer, as of `with_callbacks`.

    Returns:
        The trainer after training; the model has been saved to `output_dir`.

    Raises:
        UserError: something in the arguments is wrong. No file or folder is left behind then.
        FinishedError: the run is to go on, and is finished.
    """

    def make() -> RecordedTrainer:
        return with_callbacks(parsed.make_trainer(), callbacks)

    return run_recorded(
        parsed,
        make,
        command=f"hf-galore {parsed.command}",
        model=str(parsed.model_name),
        data=parsed.data_name,
        dataset_name=parsed.hub_dataset,
    )


def with_callbacks(trainer: _Trainer, callbacks: Sequence[TrainerCallback]) -> _Trainer:
    """Add callbacks to a trainer, after those that it has, and take out what they are there in place of.

    Args:
        trainer: the trainer, which is returned.
        callbacks: of which one may have an attribute `replaces`, classes of callbacks.
    """
    for callback in callbacks:
        for replaced in getattr(callback, "replaces", ()):
            trainer.remove_callback(replaced)
        trainer.add_callback(callback)
    return trainer


def run_recorded(
    parsed: Arguments,
    make_trainer: Callable[[], _Trainer],
    *,
    command: str,
    model: str,
    data: str | None,
    dataset_name: str | None,
) -> _Trainer:
    """Run a recipe with a Trainer of the caller's own; `run` is this with the recipe's.

    Args:
        parsed: the recipe.
        make_trainer: makes the Trainer.
        command: what the record calls the command: `hf-galore sft`.
        model: what the record calls the model.
        data: what the record calls the data.
        dataset_name: the dataset on the Hub, for the model card.

    Returns:
        The trainer after training; the model has been saved to `output_dir`.

    Raises:
        UserError: something in the arguments is wrong. No file or folder is left behind then.
    """
    with reporting_errors(parsed.training.output_dir):
        output_dir, wanted = Path(parsed.training.output_dir), str(parsed.training.resume_from_checkpoint or False)
        check_unused(output_dir, parsed.output, resumes=wanted.lower() != "false")
        settings, finished = settings_of(parsed), False
        check_folders(parsed.training)
        checkpoint = parsed.training.resume_from_checkpoint
        if checkpoint is not None:
            finished = not check_left(Path(checkpoint), parsed.training)
            settings = check_settings(Path(checkpoint), settings)
        memory_plan = plan_for_card(parsed)
        trainer = make_trainer()
        trainer.memory_plan = memory_plan
        trainer.record(command, parsed.recipe, model, data, settings, recipe_text(command, parsed.given))
        if parsed.output.overwrite_output_dir:
            trainer.before_record = lambda: remove_run(output_dir)
        if finished:
            trainer.take_over(Path(checkpoint))
        else:
            trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
        _save(trainer, dataset_name)
    return trainer


def plan_for_card(parsed: Arguments) -> MemoryPlan | None:
    """Plan a run that is to be published, for its model card.

    Returns:
        The plan; `None` where the run is not to be published, or does not use GaLore, or cannot be planned.
    """
    if not parsed.training.push_to_hub or optim_name(parsed.training) not in KINDS:
        return None
    try:
        return plan_recipe(copy.deepcopy(parsed))  # which a plan uses up
    except ValueError as error:
        logger.warning("The model card will say nothing of memory: %s", error)
        return None


def _save(trainer: RecordedTrainer, dataset_name: str | None) -> None:
    trainer.save_model(trainer.args.output_dir)
    trainer.save_record()
    check_weights(trainer)
    if trainer.args.push_to_hub:
        trainer.push_to_hub(**({} if dataset_name is None else {"dataset_name": dataset_name}))


def check_weights(trainer: RecordedTrainer) -> None:
    """Check that a training ended with numbers; a warning says of a loss that is none, with weights that are.

    Raises:
        UserError: weights are NaN or infinite; the message says which, and what to do.
    """
    named = list(trainer.model.named_parameters())
    broken = [name for name, weight in named if not bool(torch.isfinite(weight.detach()).all())]
    losses = [(entry["step"], entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    first = next((step for step, loss in losses if not math.isfinite(loss)), None)
    advice = "Give a lower learning_rate, or a lower scale in optim_args, or clip with max_grad_norm."
    if broken:
        raise UserError(
            f"the training ended with weights that are not finite: {len(broken)} of {len(named)}, the first is "
            f"{broken[0]}.{'' if first is None else f' The loss is not finite since step {first}.'} What "
            f"{trainer.args.output_dir} holds is of no use. {advice}"
        )
    if losses and not math.isfinite(losses[-1][1]):
        logger.warning(
            "The training ended with a loss that is not finite, since step %d, though the weights are. %s",
            first,
            advice,
        )
