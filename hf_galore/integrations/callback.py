"""The callback that a Trainer gets with a GaLore optimizer, and how callbacks and optimizer of a Trainer are found."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import Trainer

from ..optim.optimizer import GaLoreOptimizer
from .accelerate import unwrapped


class GaLoreCallback(TrainerCallback):
    """Looks after a GaLore optimizer, and adds what it can tell to the Trainer's log.

    A Trainer that trains with a GaLore optimizer, by its name or otherwise, gets one. On each logging step it logs,
    under `galore/`:

    - `refreshes`, all of the run so far, and with `lazy_refresh` how many it saved: `refreshes_saved`;
    - of the refreshes since the last logging step, where there were any: `captured_energy_min` and `_median` (the part
      of the gradient's squared norm that the new basis captures), `overlap_median` (of new and old subspace, 0 to 1)
      and `refresh_seconds`, their sum;
    - on the first logging step of a run, what stays the same: `moment_mib` and `basis_mib`, the sizes in MiB, and the
      counts of parameters, `targets` and `full_rank`.

    It takes the optimizer's hooks off the model when training ends, and warns of skipped updates.
    """

    def __init__(self) -> None:
        self._logged_sizes = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The sizes are logged once a run."""
        self._logged_sizes = False

    def figures(self, optimizer: GaLoreOptimizer) -> dict[str, float]:
        """What a logging step adds to the log. Waits for the device, as the Trainer has just done for the loss."""
        figures = optimizer.refresh_figures()
        if not self._logged_sizes:
            self._logged_sizes = True
            memory = optimizer.memory()
            figures["moment_mib"] = memory.moment_bytes / 2**20
            figures["basis_mib"] = memory.basis_bytes / 2**20
            figures["targets"] = memory.targets
            figures["full_rank"] = memory.full_rank
        return {f"galore/{key}": value for key, value in figures.items()}

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """The Trainer has just waited for the device: what the optimizer counted there costs nothing more to read."""
        optimizer = galore_optimizer(kwargs.get("optimizer"))
        if optimizer is not None:
            optimizer.warn_of_skipped()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A later backward pass on the model trains nothing."""
        optimizer = galore_optimizer(kwargs.get("optimizer"))
        if optimizer is not None:
            optimizer.close()


def galore_optimizer(optimizer: Any) -> GaLoreOptimizer | None:
    """The GaLore optimizer that this is, or that accelerate's wrapper holds."""
    inner = unwrapped(optimizer)
    return inner if isinstance(inner, GaLoreOptimizer) else None


def callbacks_of(trainer: Trainer) -> list[TrainerCallback]:
    """The callbacks of a trainer, in the order in which they are called; a copy of its list."""
    return list(trainer.callback_handler.callbacks)


def galore_callback(trainer: Trainer) -> GaLoreCallback | None:
    """The `GaLoreCallback` of a trainer, if it has one."""
    return next((callback for callback in callbacks_of(trainer) if isinstance(callback, GaLoreCallback)), None)
