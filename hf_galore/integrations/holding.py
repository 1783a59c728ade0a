"""What in a Trainer lets a layerwise optimizer hold gradients until its step, and what that does not go with."""

from __future__ import annotations

from transformers import TrainerCallback, TrainingArguments
from transformers.trainer import Trainer

from ..backward.whole_window import check_may_hold
from ..config import GaLoreConfig
from ..log import logger
from ..optim.build import KINDS
from ..optim.optimizer import GaLoreOptimizer
from .callback import callbacks_of

_BATCH_SIZE = "auto_find_batch_size goes on after running out of memory"


def _held_by(args: TrainingArguments) -> tuple[str, str] | None:
    """What of training arguments needs gradients until the step, and what to do instead; `None` where nothing does."""
    if args.max_grad_norm is not None and args.max_grad_norm > 0:
        return f"max_grad_norm={args.max_grad_norm:g}", "Set max_grad_norm to 0"
    if args.gradient_accumulation_steps > 1:
        return (
            f"gradient_accumulation_steps={args.gradient_accumulation_steps}",
            "Set it to 1, with a larger per_device_train_batch_size",
        )
    if args.auto_find_batch_size:
        return "auto_find_batch_size=True", "Leave it out"
    return None


def check_arguments(optim: str, config: GaLoreConfig, args: TrainingArguments) -> None:
    """Check that arguments do not hold gradients that options need whole.

    Args:
        optim: one of `KINDS`.
        config: its options.
        args: the training arguments.

    Raises:
        ValueError: they do; the message says what to change.
    """
    held = _held_by(args)
    if held is None or not config.needs_gradient or not KINDS[optim].layerwise:
        return
    why, otherwise = held
    option = f"residual={config.residual}" if config.scaling == "none" else f"scaling={config.scaling}"
    raise ValueError(
        f"optim={optim!r} with {option} updates each weight from its whole gradient during the backward pass, and "
        f"{why} would have it keep those of all weights until the step. {otherwise}; or take "
        f"optim={optim.removesuffix('_layerwise')!r}, or leave out {option}."
    )


def check_held(args: TrainingArguments, optimizer: GaLoreOptimizer) -> None:
    """Check the same of an optimizer, whoever made it.

    Raises:
        ValueError: gradients are to be held that its options need whole.
    """
    held = _held_by(args)
    if held is not None and optimizer.hooks is not None and optimizer.hooks.layerwise:
        check_may_hold(optimizer.trained_parameters(), *held)


def hold_for_others(trainer: Trainer, optimizer: GaLoreOptimizer) -> None:
    """Keep gradients until the step where somebody may drop them before: a callback, or a batch that is too large.

    Raises:
        ValueError: gradients would be held that the optimizer's options need whole.
    """
    hooks = optimizer.hooks
    if hooks is None or not hooks.layerwise or hooks.hold_gradients:
        return
    callbacks = [
        f"the callback {type(callback).__name__} is called before the optimizer's step"
        for callback in callbacks_of(trainer)
        if type(callback).on_pre_optimizer_step is not TrainerCallback.on_pre_optimizer_step
    ]
    reasons = callbacks + ([_BATCH_SIZE] if trainer.args.auto_find_batch_size else [])
    if not reasons:
        return
    check_may_hold(optimizer.trained_parameters(), f"A Trainer in which {reasons[0]}", "Leave that out")
    hooks.hold_gradients = True
    logger.info(
        "Layerwise holds low-rank gradients until the step, as with max_grad_norm above 0, because %s. Else weights "
        "are updated during the backward pass.",
        reasons[0],
    )
