"""Runs of a Trainer that end in an exception."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class InterruptedRunError(Exception):
    """What ends a run."""


class BeforeUpdate(TrainerCallback):
    """Ends a run in its second step, after the backward pass. (A layerwise optimizer holds its gradients for it.)"""

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step == 1:
            raise InterruptedRunError


class AfterTwoSteps(TrainerCallback):
    """Ends a run between its second step and its third."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step == 2:
            raise InterruptedRunError


def train_until(interrupt: TrainerCallback, trainer: Trainer) -> Trainer:
    """Train until a callback ends the run; the trainer, without the callback."""
    trainer.add_callback(interrupt)
    with pytest.raises(InterruptedRunError):
        trainer.train()
    trainer.remove_callback(interrupt)
    return trainer
