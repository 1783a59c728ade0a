"""All that a run is told: as plain data to compare runs by, and as a recipe that runs again."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from typing import Any

import yaml
from transformers import TrainingArguments

from ..version import __version__

RECIPE_FILE = "hf_galore_recipe.yaml"
"""In a run's `output_dir`: the recipe with what the command line said, for `--config`."""

# Where a run stands and goes on, and not what it is.
NO_SETTINGS = (
    *("output_dir", "overwrite_output_dir", "resume_from_checkpoint", "config", "logging_dir", "run_name"),
    *("dry_run", "plan_first"),
    "use_cpu",  # a process that only starts others says it; the record has the device
)

_SECRETS = ("hub_token", "push_to_hub_token", "token")
_NO_SECRETS = ("eos_token", "pad_token")  # of a tokenizer


def settings_of(parsed: Iterable[Any]) -> dict[str, Any]:
    """All that a run is told, defaults too, as JSON gives it back; tokens are not written down.

    Args:
        parsed: what was parsed for a command; its dataclasses count.
    """
    found: dict[str, Any] = {}
    for part in parsed:
        if isinstance(part, TrainingArguments):  # whose to_dict hides the values of keys that end in _token
            found.update(part.to_dict())
            found.update({key: getattr(part, key) for key in found if key in _NO_SECRETS})
            if part.world_size > 1:
                found["processes"] = part.world_size
        elif dataclasses.is_dataclass(part) and not isinstance(part, type):
            found.update(dataclasses.asdict(part))
    kept = {key: value for key, value in found.items() if key not in NO_SETTINGS}
    plain: dict[str, Any] = json.loads(json.dumps(kept, default=str, sort_keys=True))
    return plain


def recipe_text(command: str, given: Mapping[str, Any]) -> str:
    """The text of a recipe that says what was given: by its file, and over it on the command line.

    Args:
        command: what runs it, `hf-galore sft`.
        given: keys and values.
    """
    left_out = ("config", "overwrite_output_dir", "resume_from_checkpoint", "dry_run", *_SECRETS)
    kept = {key: value for key, value in given.items() if key not in left_out}
    head = f"# What {command} was given (hf_galore {__version__}). To run it again, give another output_dir.\n"
    return head + yaml.safe_dump(kept, sort_keys=False, allow_unicode=True)
