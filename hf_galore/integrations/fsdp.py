"""What a Trainer's FSDP2 does by itself, and a user of GaLore ought to know."""

from __future__ import annotations

from transformers.trainer import Trainer

from ..log import logger
from ..optim.optimizer import GaLoreOptimizer


def say_if_whole_gradients_accumulate(trainer: Trainer, optimizer: GaLoreOptimizer) -> None:
    """Warn where a layerwise optimizer is to save the memory of gradients that FSDP2 keeps, whole, over a window.

    Trainer and accelerate tell it to reduce gradients in the last micro-batch only. Until then each process has those
    of the whole model.
    """
    steps = trainer.args.gradient_accumulation_steps
    hooks = optimizer.hooks
    if steps == 1 or hooks is None or not hooks.layerwise or hooks.projected_backward:
        return
    if trainer.accelerator.gradient_state.plugin_kwargs.get("sync_each_batch", False):
        return
    if any(trained.ranks for trained in optimizer.trained_parameters()):
        logger.warning(
            "FSDP2 keeps the whole gradients of all layers in each process until the last of %d micro-batches, which a "
            "layerwise optimizer is to avoid. Leave out projected_backward=false, or set "
            "accelerator_config={'gradient_accumulation_kwargs': {'sync_each_batch': True}}.",
            steps,
        )
