"""Which settings differ between runs, and which of those make them other work."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..config import OPTIONS, GaLoreConfig
from ..integrations.trainer import KINDS
from .runs import Run
from .seeds import Compared

# Settings that the tables have a row of their own for.
SHOWN = ("learning_rate", "model_name_or_path", "optim", "dataset_name")
# Settings that the words for a run's method tell.
TOLD = ("use_peft", "lora_r")
# Where one of these differs, two runs do not do the same work.
WORK = (
    *("model_name_or_path", "config_name", "dataset_name", "dataset_config", "dataset_train_split", "datasets"),
    *("task_name", "train_file", "max_length", "packing", "max_steps", "num_train_epochs"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "seed", "data_seed"),
)
_ARGUMENTS = "optim_args"


def differing(compared: Sequence[Compared]) -> list[str]:
    """The settings that are not the same in all runs that have a record of them.

    In place of GaLore's `optim_args` it has those of their keys that differ between runs with GaLore, if any do.
    """
    runs = [run for one in compared for run in one.runs]
    known = [settings for settings in map(_settings, runs) if settings is not None]
    keys = sorted({key for settings in known for key in settings})
    found = [key for key in keys if any(settings.get(key) != known[0].get(key) for settings in known)]
    with_galore = [options for options in map(_galore_options, runs) if options is not None]
    of_galore = [key for key in OPTIONS if len({options[key] for options in with_galore}) > 1]
    if not of_galore or _ARGUMENTS not in found:
        return found
    place = found.index(_ARGUMENTS)
    return [*found[:place], *of_galore, *found[place + 1 :]]


def setting(key: str) -> Callable[[Run], str | None]:
    """What a run's record says of a setting, as text; `None` where it does not know it."""

    def text(run: Run) -> str | None:
        options = _galore_options(run) if key in OPTIONS else _settings(run)
        if not options or key not in options:
            return None
        value = options[key]
        if isinstance(value, float) and value.is_integer() and abs(value) < 1e9:
            value = int(value)  # a recipe's 3 epochs are those of `--num_train_epochs 3`, which is 3.0
        return value if isinstance(value, str) else json.dumps(value)

    return text


def joined(one: Compared, text: Callable[[Run], str | None]) -> str | None:
    """What `text` says of a run; of several seeds all that it says, each once."""
    found = list(dict.fromkeys(said for said in map(text, one.runs) if said is not None))
    return ", ".join(found) if found else None


def other_work(compared: Sequence[Compared]) -> list[str]:
    """The settings by which `compared` did not do the same work; the same seeds in each are the same work."""
    return [
        key for key in differing(compared) if key in WORK and len({joined(one, setting(key)) for one in compared}) > 1
    ]


def _settings(run: Run) -> Mapping[str, Any] | None:
    """What a run was told, without the settings of adapters where it has none."""
    settings = run.facts.settings if run.facts else None
    if settings is None or settings.get("use_peft", True):
        return settings
    return {key: value for key, value in settings.items() if not key.startswith("lora_")}


def _galore_options(run: Run) -> Mapping[str, Any] | None:
    """All options of a run with GaLore, defaults too; `None` of one without, and where no settings are known."""
    if run.facts is None or run.facts.settings is None or run.facts.optim not in KINDS:
        return None
    try:
        return dataclasses.asdict(GaLoreConfig.from_optim_args(run.facts.optim_args))
    except ValueError:  # of a version that had others
        return None
