"""Going on with a run: whether anything is left to do, and which settings are no longer those that it began with."""

from __future__ import annotations

import json
import pickletools
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.training_args import OptimizerNames

from ..config import GROUP_OPTIONS, GaLoreConfig
from ..errors import UserError
from ..integrations.trainer import KINDS
from ..log import logger
from .run_record import RunFacts

# The checkpoint has them, in the optimizer's groups or the schedule, and the new values are not read.
_KEPT = ("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon")
# With others of these, the data that a run has seen are not those that a resumed one skips.
_DATA = (
    *("per_device_train_batch_size", "gradient_accumulation_steps", "max_length", "packing", "seed", "data_seed"),
    *("dataset_name", "dataset_config", "dataset_train_split", "datasets", "train_file", "processes"),
)
# With others of these the weights that the checkpoint has are not trained as they were.
_WEIGHTS = ("weight_bits",)
# The schedule is made anew of these, and asked for the rate at the step that the run is at.
_SCHEDULE = ("lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "max_steps", "num_train_epochs")
# With others of these the checkpoint's weights are not loaded, and training begins with the model's own.
_ADAPTERS = ("use_peft", "lora_r", "lora_target_modules", "lora_modules_to_save")


class FinishedError(UserError):
    """A run that is to go on has nothing left to do."""


def finished_at(checkpoint: Path, training: TrainingArguments) -> int | None:
    """The step at which a run has finished that is to go on from a checkpoint; `None` where steps are left.

    Args:
        checkpoint: a whole one.
        training: what the resumed run is told.
    """
    state = json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    step, steps, epochs = (state.get(key) for key in ("global_step", "max_steps", "num_train_epochs"))
    if not isinstance(step, int):
        return None
    if training.max_steps > 0:
        return step if step >= training.max_steps else None
    # How many steps an epoch has, only the data say; the run that wrote the checkpoint knew it.
    known = isinstance(steps, int) and isinstance(epochs, (int, float)) and steps > 0
    return step if known and step >= steps and training.num_train_epochs <= epochs else None


def check_left(checkpoint: Path, training: TrainingArguments) -> bool:
    """Whether a run that is to go on from a checkpoint has steps left; or else only its model is still to be saved.

    Raises:
        FinishedError: nothing is left to do.
    """
    step = finished_at(checkpoint, training)
    if step is None:
        return True
    facts = _facts(checkpoint)
    if facts is None or facts.finished:
        raise FinishedError(
            f"the run in {checkpoint.parent} is finished, at step {step}: nothing is left to do. To train it longer, "
            f"give more {'max_steps' if training.max_steps > 0 else 'num_train_epochs'}."
        )
    return False


def _facts(checkpoint: Path) -> RunFacts | None:
    try:
        return RunFacts.read(checkpoint.parent)
    except (ValueError, OSError):
        return None


def check_settings(checkpoint: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Check a run that is to go on against the settings that it began with; a warning says what has no effect.

    Args:
        checkpoint: in the folder of a run; of another program's, nothing is known.
        settings: what the resumed run is told, as `settings.settings_of` has it.

    Returns:
        What has effect.

    Raises:
        UserError: its optimizer is another one, or another one's GaLore, or its adapters are others.
    """
    facts = _facts(checkpoint)
    if facts is None or facts.settings is None:
        _check_optimizer(checkpoint, {**settings, "optim": optim_of(checkpoint) or settings.get("optim")}, settings)
        return settings
    before = facts.settings
    changed = [key for key in _ADAPTERS if before.get(key) != settings.get(key)]
    adapters = [_change(key, before.get(key), settings.get(key)) for key in changed]
    if adapters:
        raise _of_another(checkpoint, "the adapters", adapters)
    _check_optimizer(checkpoint, before, settings)
    for keys, consequence in (
        (_KEPT, "A resumed run keeps what its checkpoint has: the new value has no effect."),
        (_DATA, "A resumed run skips as many batches as it has had, which are others now: it repeats or omits some."),
        (_WEIGHTS, "A resumed run takes the weights of its checkpoint, and rounds them to the nearest of 8 bits."),
        (_SCHEDULE, "The learning rate goes on by the new schedule, and may jump here."),
    ):
        changed = [key for key in keys if before.get(key) != settings.get(key) and _counts(key, before, settings)]
        if changed:
            told = ", ".join(_change(key, before.get(key), settings.get(key)) for key in changed)
            logger.warning("%s: %s", told, consequence)
    return {**settings, **{key: before.get(key) for key in _KEPT}}


def _counts(key: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether a setting had a part in what the run did: the length has none where the rate does not fall."""
    if key in _WEIGHTS and (key not in before or now.get(key) != 8):
        return False  # 8 bits become 16 without rounding
    both = (before, now)
    if key in ("max_steps", "num_train_epochs") and all("constant" in str(one["lr_scheduler_type"]) for one in both):
        return False
    return not (key == "num_train_epochs" and all((one.get("max_steps") or 0) > 0 for one in both))


def optim_of(checkpoint: Path) -> str | None:
    """The optimizer that wrote a checkpoint of whatever Trainer; `None` where that is not found.

    It is among the training arguments, which are a pickle: its words are read, and nothing in it is run.
    """
    known = {str(name.value) for name in OptimizerNames}
    try:
        with zipfile.ZipFile(checkpoint / TRAINING_ARGS_NAME) as file:
            (name,) = (name for name in file.namelist() if name.endswith("/data.pkl"))
            words = [word for _, word, _ in pickletools.genops(file.read(name)) if isinstance(word, str)]
    except (OSError, ValueError, zipfile.BadZipFile):
        return None
    if "optim" not in words:
        return None
    after = words[words.index("optim") + 1 :][:4]  # its class, and then its value
    return next((word for word in after if word in known), None)


def _check_optimizer(checkpoint: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    changed = []
    # Layerwise or fused or not, the state is the same.
    if len({re.sub("_(layerwise|fused)$", "", str(one.get("optim"))) for one in (before, now)}) > 1:
        changed.append(_change("optim", before.get("optim"), now.get("optim")))
    elif now.get("optim") in KINDS:
        old, new = (GaLoreConfig.from_optim_args(one.get("optim_args")) for one in (before, now))
        changed += [
            _change(key, getattr(old, key), getattr(new, key))
            for key in (*GROUP_OPTIONS, "embedding_bits")  # those that groups and state are made by
            if getattr(old, key) != getattr(new, key)
        ]
    targets = [_listed(one.get("optim_target_modules")) for one in (before, now)]
    if not changed and targets[0] != targets[1]:
        changed.append(_change("optim_target_modules", *targets))
    if changed:
        raise _of_another(checkpoint, "the optimizer", changed)


def _of_another(checkpoint: Path, what: str, changed: list[str]) -> UserError:
    return UserError(
        f"{checkpoint} was written with other settings of {what}: {', '.join(changed)}. Give the run's own again, or "
        "begin anew: another --output_dir, without --resume_from_checkpoint."
    )


def _listed(targets: Any) -> Any:
    return sorted(targets) if isinstance(targets, list) else targets


def _change(key: str, old: Any, new: Any) -> str:
    if key == "processes":  # which settings have where there are several
        old, new = old or 1, new or 1
    return f"{key} {_text(old)} → {_text(new)}"


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
