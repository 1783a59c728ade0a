"""Running a recipe: make its Trainer, train, save, and leave a record of the run."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import TrainerCallback

from ..errors import UserError
from ..integrations.devices import say_global_batch
from ..integrations.int8_layers import is_finite
from ..integrations.trainer import KINDS, optim_name
from ..log import logger
from ..plan.planner import MemoryPlan, in_gib
from ..plan.rehearsal import Progress
from .any_recipe import Arguments
from .checkpoints import check_folders, resumes
from .errors import reporting_errors
from .hub import sending
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

    def make(checked: Any) -> RecordedTrainer:
        return with_callbacks(parsed.make_trainer(checked), callbacks)

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
    make_trainer: Callable[[Any], _Trainer],
    *,
    command: str,
    model: str,
    data: str | None,
    dataset_name: str | None,
) -> _Trainer:
    """Run a recipe with a Trainer of the caller's own; `run` is this with the recipe's.

    Args:
        parsed: the recipe.
        make_trainer: makes the Trainer, of what checking the recipe has loaded.
        command: what the record calls the command: `hf-galore sft`.
        model: what the record calls the model.
        data: what the record calls the data.
        dataset_name: the dataset on the Hub, for the model card.

    Returns:
        The trainer after training; the model has been saved to `output_dir`.

    Raises:
        UserError: something in the arguments is wrong. No file or folder is left behind then.
    """
    output_dir = Path(parsed.training.output_dir)
    with reporting_errors(parsed.training.output_dir):
        settings, finished = _check_run(parsed)
        # The others find then what the first has downloaded, read and mapped. TRL does so with what it maps.
        with parsed.training.main_process_first(desc="checks and data"):
            checked = parsed.check()
        memory_plan = plan_first(parsed)
        trainer = make_trainer(checked)
        say_global_batch(trainer.args)
        trainer.memory_plan = memory_plan
        trainer.record(command, parsed.recipe, model, data, settings, recipe_text(command, parsed.given))
        if parsed.output.overwrite_output_dir:
            trainer.before_record = lambda: remove_run(output_dir)
        if finished:
            trainer.take_over(Path(str(parsed.training.resume_from_checkpoint)))
        else:
            trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
        _save(trainer, dataset_name)
    return trainer


def dry_run(parsed: Arguments, progress: Progress | None = None) -> MemoryPlan:
    """Check all that can be checked of a recipe without the model's weights, and plan its memory.

    Args:
        parsed: the recipe, which is of no use afterwards.
        progress: called with the phase and the number of the step of the plan.

    Raises:
        UserError: something that was given is wrong, or cannot be planned.
        FinishedError: the run is to go on, and is finished.
    """
    with reporting_errors(parsed.training.output_dir, leaves_nothing=True):
        _check_run(parsed)
        parsed.check()
        return plan_recipe(copy.deepcopy(parsed), progress=progress)


def _check_run(parsed: Arguments) -> tuple[dict[str, Any], bool]:
    """Check a run's folder, and the checkpoint that it is to go on from.

    Returns:
        The run's settings, and whether nothing is left of it but saving the model.
    """
    check_unused(Path(parsed.training.output_dir), parsed.output, resumes=resumes(parsed.training))
    settings = settings_of(parsed)
    check_folders(parsed.training)
    checkpoint = parsed.training.resume_from_checkpoint
    if checkpoint is None:
        return settings, False
    finished = not check_left(Path(checkpoint), parsed.training)
    return check_settings(Path(checkpoint), settings), finished


def plan_first(parsed: Arguments) -> MemoryPlan | None:
    """Plan a run that trains on a card, and say whether it fits; and one that is to be published, for its model card.

    Returns:
        The plan; `None` where nobody needs one, and where the run cannot be planned.
    """
    on_card = parsed.output.plan_first and _trains_on_one_card(parsed)
    published = parsed.training.push_to_hub and optim_name(parsed.training) in KINDS
    if not (on_card or published) or parsed.training.process_index != 0:
        return None
    try:
        # A plan uses up what it is given, and its Trainer seeds the random numbers.
        with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_initialized() else []):
            found = plan_recipe(copy.deepcopy(parsed))
    except ValueError as error:
        if published:
            logger.warning("The model card will say nothing of memory: %s", error)
        else:
            logger.info("Whether it fits is not known: %s", error)
        return None
    if on_card:
        say_if_it_fits(found)
    return found


def _trains_on_one_card(parsed: Arguments) -> bool:
    training = parsed.training
    spread = "device_map" in (getattr(training, "model_init_kwargs", None) or {})
    return training.device.type == "cuda" and not spread


def say_if_it_fits(found: MemoryPlan) -> None:
    """Say of a plan what it needs and what is free; a warning where that is too little."""
    if found.vram_bytes is None or found.free_bytes is None:
        return
    sizes = (
        f"The run needs {in_gib(found.needed_bytes)} by its plan, and {in_gib(found.free_bytes)} of the card's "
        f"{in_gib(found.vram_bytes)} are free"
    )
    if found.fits_now:
        logger.info("%s.", sizes)
        return
    advice = (
        "Other programs hold the rest, which nvidia-smi lists"
        if found.fits
        else "hf-galore plan with the same options and --suggest says what fits"
    )
    logger.warning("%s: it will probably run out of memory. %s.", sizes, advice)


def _save(trainer: RecordedTrainer, dataset_name: str | None) -> None:
    pushes, trainer.args.push_to_hub = trainer.args.push_to_hub, False  # once, when all is written and has numbers
    try:
        trainer.save_model(trainer.args.output_dir)
    finally:
        trainer.args.push_to_hub = pushes
    trainer.save_record()
    check_weights(trainer)
    if pushes:
        with sending(trainer.args.output_dir):
            trainer.push_to_hub(**({} if dataset_name is None else {"dataset_name": dataset_name}))


def check_weights(trainer: RecordedTrainer) -> None:
    """Check that a training ended with numbers; a warning says of a loss that is none, with weights that are.

    Raises:
        UserError: weights are NaN or infinite; the message says which, and what to do.
    """
    named = list(trainer.model.named_parameters())
    broken = [name for name, weight in named if not is_finite(weight.detach())]
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
