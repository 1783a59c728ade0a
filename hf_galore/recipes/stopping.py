"""A training that is asked to stop: it finishes the step it is in, writes a checkpoint, and ends."""

from __future__ import annotations

from typing import Any

import torch
from torch import distributed
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import SaveStrategy

from ..errors import Interrupted


class StopAfterStep(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Ends a training after the step it is in, or the evaluation, with a checkpoint, whatever `save_strategy` says.

    What comes of it is the run's own: gone on with, it ends as if it had not been stopped. Added last to a Trainer, so
    that it has the last word on what is done after a step, and everyone else has been told of the end.

    Several processes stop after the same step, whichever of them was asked, as a checkpoint is written by all of them.
    """

    def __init__(self) -> None:
        self.waits = False
        """Whether a training is on, so that there is a step to be finished."""
        self.ended = False
        """Whether one has ended, so that there is a model to be saved."""
        self.asked: int | None = None
        """The number of the signal that has asked it to stop."""
        self._ending = self._saved = False
        self._group: Any = None

    def ask(self, number: int) -> None:
        """Ask the training to stop. Safe in a signal's handler.

        Args:
            number: the signal's.
        """
        self.asked = number

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.asked, self._ending, self._saved, self.ended = None, False, False, False
        if args.world_size > 1 and distributed.is_initialized():
            # By the CPU: nothing waits for a device to find that nobody asked.
            self._group = distributed.new_group(backend="gloo")
        self.waits = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.asked = self._agreed()
        if self.asked is None or state.global_step >= state.max_steps:
            return
        if args.save_strategy == SaveStrategy.BEST:
            control.should_evaluate = False  # which would decide whether this step is saved
        self._end(control)
        control.should_log = True  # the loss since the last log would be lost

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # One process asks by itself here; several agree at the next step.
        ends = self.asked is not None and self._group is None and 0 < state.global_step < state.max_steps
        if ends and self.waits and args.save_strategy != SaveStrategy.BEST:
            self._end(control)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._ending:
            self._saved = True
            args.load_best_model_at_end = False  # this is not the end

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._saved:
            control.should_log = control.should_evaluate = control.should_save = False

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.waits = False
        if self._saved and self.asked is not None:
            raise Interrupted(self.asked)
        self.ended = True

    def _end(self, control: TrainerControl) -> None:
        self._ending = control.should_save = control.should_training_stop = True

    def _agreed(self) -> int | None:
        if self._group is None:
            return self.asked
        number = torch.tensor([self.asked or 0])
        distributed.all_reduce(number, distributed.ReduceOp.MAX, group=self._group)
        return int(number) or None
