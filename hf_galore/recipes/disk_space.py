"""Whether a run's checkpoints find room on their disk, by what is calculated of them before anything is loaded."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import NamedTuple

from torch import nn
from transformers import TrainingArguments

from ..errors import UserError
from ..integrations.trainer import KINDS, galore_cls_and_kwargs, optim_name
from ..log import logger, silenced
from .writable import nearest_there

GIB = 2**30
_WORTH_SAYING = 3
"""Where nobody says how many checkpoints there will be: with room for fewer than so many, it is said."""


class Sizes(NamedTuple):
    """The bytes of what a run saves, calculated."""

    weights: int
    optimizer: int
    """Its state; 0 where it is not saved, or not known."""

    @property
    def checkpoint(self) -> int:
        """The bytes of a checkpoint."""
        return self.weights + self.optimizer


def sizes_of(training: TrainingArguments, model: nn.Module) -> Sizes:
    """Calculate what a run saves of a model, which is on the meta device and of the dtype that it is trained in."""
    weights = sum(param.nbytes for param in model.parameters())
    return Sizes(weights, 0 if training.save_only_model else _optimizer_bytes(training, model))


def check_space(training: TrainingArguments, sizes: Sizes, *, overwrites: bool = False) -> None:
    """Check that what a run saves finds room; a warning says where only some of its checkpoints do.

    Args:
        training: the arguments.
        sizes: of what it saves.
        overwrites: whether another run in `output_dir` is removed before.

    Raises:
        UserError: there is no room for one checkpoint and the model after the training.
    """
    if training.process_index != 0:
        return
    folder = Path(training.output_dir)
    disk = shutil.disk_usage(nearest_there(folder))
    if not any(disk):  # some disks of other machines do not say
        return
    free = disk.free
    if overwrites:
        free += sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    saves = str(getattr(training.save_strategy, "value", training.save_strategy)) != "no"
    least = sizes.weights + (sizes.checkpoint if saves else 0)
    calculated = f"{_gib(sizes.weights)} for the model" + (
        f" and {_gib(sizes.checkpoint)} for a checkpoint, {_gib(sizes.optimizer)} of it the optimizer's"
        if saves
        else ""
    )
    if least > free:
        advice = "Free some, or give an output_dir on another disk"
        advice += (
            "; save_only_model: true leaves the optimizer out, save_strategy: 'no' all checkpoints" if saves else ""
        )
        raise UserError(
            f"output_dir {training.output_dir} has no room for what the run saves: {_gib(free)} are free, and by "
            f"calculation it needs {_gib(least)}, {calculated}. {advice}."
        )
    kept = _checkpoints_kept(training) if saves else 0
    room = (free - sizes.weights) // max(sizes.checkpoint, 1)
    if room < (_WORTH_SAYING if kept is None else kept):
        logger.warning(
            "output_dir %s has room for %d checkpoint(s): %s are free, and by calculation the run needs %s. It keeps "
            "%s at a time; save_total_limit says how many, and save_steps how often one is written.",
            training.output_dir,
            room,
            _gib(free),
            calculated,
            "all" if kept is None else f"up to {kept}",
        )


def _checkpoints_kept(training: TrainingArguments) -> int | None:
    """The most checkpoints that are there at a time; `None` where only the data say it."""
    counts = []
    if training.save_total_limit is not None:
        counts.append(training.save_total_limit + 1)  # the oldest is removed when the newest is there
    strategy = str(getattr(training.save_strategy, "value", training.save_strategy))
    if strategy == "epoch" and training.max_steps <= 0:
        counts.append(math.ceil(training.num_train_epochs))
    elif strategy == "steps" and 0 < training.save_steps < 1:
        counts.append(math.ceil(1 / training.save_steps))
    elif strategy == "steps" and training.max_steps > 0:
        counts.append(math.ceil(training.max_steps / training.save_steps))
    return min(counts, default=None)


def _optimizer_bytes(training: TrainingArguments, model: nn.Module) -> int:
    """The bytes of an optimizer's state: of GaLore's all, of others the moments, and 0 where they are not known."""
    name = optim_name(training)
    trained = [param for param in model.parameters() if param.requires_grad]
    if name in KINDS:
        cls, options = galore_cls_and_kwargs(training, model, say=False)
        with silenced():  # the run makes another, and says it all
            optimizer = cls(trained, **options)
        try:
            states = [one.new_state_on_meta() for one in optimizer.trained_parameters()]
        finally:
            optimizer.close()
        return sum(tensor.nbytes for state in states for tensor in state.values())
    if "8bit" in name:
        per_moment = sum(param.numel() for param in trained)
    else:
        per_moment = sum(param.nbytes for param in trained)
    moments = 2 if "adam" in name else 1 if "lion" in name else 0
    return moments * per_moment


def _gib(count: int) -> str:
    return f"{count / GIB:.1f} GiB"
