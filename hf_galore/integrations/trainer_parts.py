"""Parts of a Trainer that are private or undocumented, and that plans and recorded runs are in need of."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerState
from transformers.trainer import TRAINER_STATE_NAME, Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .signatures import moved

Method = Callable[..., Any]

# Methods that are wrapped, overridden or called, with the signatures that this was written for.
PARTS: dict[str, str] = {
    "training_step": "(self, model, inputs, num_items_in_batch=None)",
    "evaluate": "(self, eval_dataset=None, ignore_keys=None, metric_key_prefix='eval')",
    "_save_checkpoint": "(self, model, trial)",
    "_save": "(self, output_dir=None, state_dict=None)",
    "_save_rng_state": "(self, output_dir)",
    "_get_output_dir": "(self, trial)",
    "_load_from_checkpoint": "(self, resume_from_checkpoint, model=None)",
}


def moved_parts() -> list[str]:
    """What this transformers no longer has as it is needed here, in words; empty where all is well."""
    return moved(Trainer, "Trainer", PARTS)


@contextlib.contextmanager
def wrapped_methods(
    trainer: Trainer,
    *,
    training_step: Callable[[Method], Method],
    evaluate: Callable[[Method], Method],
    save_checkpoint: Callable[[Method], Method],
) -> Iterator[None]:
    """Within, a trainer trains a micro-batch, evaluates and saves a checkpoint by what these make of its methods."""
    with contextlib.ExitStack() as stack:
        for name, wrap in (
            ("training_step", training_step),
            ("evaluate", evaluate),
            ("_save_checkpoint", save_checkpoint),
        ):
            stack.enter_context(mock.patch.object(trainer, name, wrap(getattr(trainer, name))))
        yield


def micro_batches(trainer: Trainer) -> int:
    """How many micro-batches the present optimizer step of a trainer has: fewer than usual at the end of the data."""
    return int(trainer.current_gradient_accumulation_steps)


def is_on_card(tensor: Tensor) -> bool:
    """Whether a tensor takes memory of a card."""
    return tensor.device.type == "cuda"


def state_with_host_stacks(model: nn.Module) -> dict[str, Tensor] | None:
    """The state of a model to be saved, with the stacks that are on a card copied to the host; `None` where none is.

    transformers 5 has the experts of a layer in one tensor, and writes them as they are on the Hub, each by itself. It
    copies them for that where they are, and most of all experts at once: for Qwen3-30B-A3B 36 GiB of a card that is
    full already.
    """
    names = {name for name, param in model.named_parameters() if param.ndim >= 3 and is_on_card(param)}
    if not names or not isinstance(model, PreTrainedModel):
        return None
    return {name: value.cpu() if name in names else value for name, value in model.state_dict().items()}


class TrainerParts:
    """Beside a Trainer in a class's bases, in front of it: says when a checkpoint begins, and what was trained on."""

    args: Any
    state: Any

    _total_train_tokens = 0  # TRL's trainers count them, and begin with none after a resume

    @property
    def trained_tokens(self) -> int:
        """The tokens that TRL's trainers have counted in this run; 0 in other trainers. May be set."""
        return self._total_train_tokens

    @trained_tokens.setter
    def trained_tokens(self, tokens: int) -> None:
        self._total_train_tokens = tokens

    def take_over(self, checkpoint: Path) -> None:
        """Take weights and log from the last checkpoint of a training that has no steps left."""
        self._load_from_checkpoint(str(checkpoint))  # type: ignore[attr-defined]
        self.state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))

    def before_checkpoint(self, folder: Path) -> None:
        """Called on the processes that write, before a checkpoint is written into `folder`; does nothing."""

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if self.args.should_save:
            folder = Path(self._get_output_dir(trial=trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")  # type: ignore[attr-defined]
            self.before_checkpoint(folder)
        super()._save_checkpoint(model, trial)  # type: ignore[misc]

    def _save(self, output_dir: Any = None, state_dict: Any = None) -> None:
        if state_dict is None:
            state_dict = state_with_host_stacks(self.model)  # type: ignore[attr-defined]
        super()._save(output_dir, state_dict)  # type: ignore[misc]

    def _save_rng_state(self, output_dir: str) -> None:
        """Save the random states, of every process: the Trainer's state, written next, says that all is there."""
        super()._save_rng_state(output_dir)  # type: ignore[misc]
        self.accelerator.wait_for_everyone()  # type: ignore[attr-defined]
