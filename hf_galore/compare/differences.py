"""Which settings differ between runs, and which of those make them other work."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

from .runs import Run

# Settings that the tables have a row of their own for.
SHOWN = ("learning_rate", "model_name_or_path", "optim", "dataset_name")
# Where one of these differs, two runs do not do the same work.
WORK = (
    *("model_name_or_path", "config_name", "dataset_name", "dataset_config", "dataset_train_split", "datasets"),
    *("task_name", "train_file", "max_length", "packing", "max_steps", "num_train_epochs"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "seed", "data_seed"),
)


def differing(runs: Sequence[Run]) -> list[str]:
    """The settings that are not the same in all runs that have a record of them."""
    known = [run.facts.settings for run in runs if run.facts and run.facts.settings is not None]
    keys = sorted({key for settings in known for key in settings})
    return [key for key in keys if any(settings.get(key) != known[0].get(key) for settings in known)]


def setting(key: str) -> Callable[[Run], str | None]:
    """What a run's record says of a setting, as text; `None` where it does not know it."""

    def text(run: Run) -> str | None:
        if run.facts is None or run.facts.settings is None or key not in run.facts.settings:
            return None
        value = run.facts.settings[key]
        return value if isinstance(value, str) else json.dumps(value)

    return text
