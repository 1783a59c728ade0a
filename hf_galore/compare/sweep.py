"""The runs of a sweep: one recipe with each of several values, checked before any has begun."""

from __future__ import annotations

import csv
import dataclasses
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..config import OPTIONS, nearest, options_in
from ..errors import UserError
from ..integrations.trainer import optim_name
from ..recipes import any_recipe
from ..recipes.any_recipe import Arguments
from ..recipes.checkpoints import last_checkpoint
from ..recipes.checks import galore_config
from ..recipes.config_file import keys_given, take_config
from ..recipes.errors import reporting_complaints
from ..recipes.kinds import command_for, is_quickstart_recipe
from ..recipes.output_folder import OutputArguments
from ..recipes.run_record import RunFacts
from ..recipes.settings import settings_of

SETTINGS_FILE = "hf_galore_sweep.json"
"""In the folder of each run: all its settings, so that a sweep that goes on does not take another's run for its own."""

# What a sweep decides, and what makes no difference to a run.
_OWN = ("output_dir", "overwrite_output_dir", "resume_from_checkpoint", "config", "dry_run", "plan_first")


class Trial(NamedTuple):
    """One run of a sweep."""

    name: str
    """`rank=8, scale=1`."""
    folder: Path
    command: list[str]
    """What follows `hf-galore`."""
    settings: Mapping[str, Any]


class Sweep(NamedTuple):
    """All runs of a sweep, checked."""

    output_dir: Path
    trials: list[Trial]
    resumes: bool
    output: OutputArguments


def plan_sweep(given: Sequence[str], arguments: Sequence[str]) -> Sweep:
    """Return the runs of a sweep, each of them checked: a mistake is found before hours have gone into others.

    Args:
        given: `KEY=V1,V2,...`, one of each `--sweep`.
        arguments: `--config FILE --key value ...`, for the recipe's command.

    Raises:
        UserError: an unknown key, a value that the recipe's command would not take.
    """
    name, overrides = take_config(arguments)
    if name is None:
        raise UserError("--sweep needs a recipe: --config recipe.yaml, and --key value to override what it says.")
    axes = dict(_axis(text) for text in given)
    if len(axes) < len(given):
        raise UserError("--sweep is given twice for the same key. Put all its values into one, with commas.")
    base = _parse(arguments)
    _check_keys(axes, base, overrides)
    output_dir = Path(base.training.output_dir)
    trials = [
        _trial(dict(zip(axes, values, strict=True)), arguments, base) for values in itertools.product(*axes.values())
    ]
    folders = [trial.folder for trial in trials]
    for trial in trials:
        if folders.count(trial.folder) > 1:
            raise UserError(f"{trial.name}: its folder would be {trial.folder}, and so would another value's.")
    return Sweep(output_dir, trials, _resumes(base), base.output)


# ---- what was given


def _axis(text: str) -> tuple[str, list[str]]:
    key, equals, values = text.partition("=")
    found = [value.strip() for value in next(csv.reader([values], skipinitialspace=True), [])]
    if not key or not equals or not all(found) or not found:
        raise UserError(f"--sweep {text}: it has to read KEY=V1,V2,..., as --sweep rank=8,32,128.")
    if len(set(found)) < len(found):
        raise UserError(f"--sweep {text}: a value is given twice. Give each once.")
    return key.strip().replace("-", "_"), found


def _parse(arguments: Sequence[str]) -> Arguments:
    # A process that only starts others is to leave all of the GPU to them.
    with reporting_complaints():
        return any_recipe.parse([*arguments, "--use_cpu", "true"], "hf-galore compare", "")


def _check_keys(axes: Mapping[str, Sequence[str]], base: Arguments, overrides: Sequence[str]) -> None:
    known = [field.name for part in base if dataclasses.is_dataclass(part) for field in dataclasses.fields(part)]
    overridden = keys_given(overrides)
    for key in axes:
        if key in _OWN:
            raise UserError(f"--sweep {key}: it is nothing to compare. Give the recipe's {key} once.")
        if key not in known and key not in OPTIONS:
            raise UserError(f"--sweep {key}: there is no such key.{nearest(key, [*OPTIONS, *known])}")
        if key in overridden:
            raise UserError(f"--sweep {key} and --{key} are both given. Leave one out.")
    if "optim_args" in axes and not axes.keys().isdisjoint(OPTIONS):
        raise UserError("--sweep optim_args would undo the other, which is a part of it. Leave one out.")
    if len(getattr(getattr(base, "glue", None), "seeds", None) or ()) > 1 or "seeds" in axes:
        raise UserError("seeds makes several runs of each. Compare them as runs: --sweep seed=1,2,3, without seeds.")


def _resumes(base: Arguments) -> bool:
    wanted = str(base.training.resume_from_checkpoint or "false").lower()
    if wanted not in ("true", "false"):
        raise UserError(
            f"resume_from_checkpoint {base.training.resume_from_checkpoint}: a sweep has no use for a folder. Give no "
            "value: each run goes on from its own last checkpoint."
        )
    return wanted == "true"


def _trial(values: Mapping[str, str], arguments: Sequence[str], base: Arguments) -> Trial:
    name = ", ".join(f"{key}={value}" for key, value in values.items())
    folder = Path(base.training.output_dir) / "_".join(_folder_name(f"{key}-{value}") for key, value in values.items())
    options = [f"--{key}={value}" for key, value in values.items() if key not in OPTIONS]
    galore = [f"{key}={value}" for key, value in values.items() if key in OPTIONS]
    try:
        if galore:
            options.append(f"--optim_args={_optim_args(_parse([*arguments, *options]), galore)}")
        options.append(f"--output_dir={folder}")
        parsed = _parse([*arguments, *options])
        galore_config(parsed.training)  # read now, for its mistakes
    except ValueError as error:
        raise UserError(f"--sweep {name}: {error}") from error
    return Trial(name, folder, _command(parsed, [*arguments, *options]), settings_of(parsed))


def _optim_args(parsed: Arguments, given: Sequence[str]) -> str:
    """The recipe's `optim_args` with the values that are given, `key=value`, in place of its own."""
    config = galore_config(parsed.training)
    if config is None:
        name = optim_name(parsed.training)
        raise UserError(f"these are of GaLore, which optim {name} is not. Give a galore_* optim.")
    # Not by a configuration of these alone: some do nothing without others, which the recipe gives.
    return dataclasses.replace(config, **options_in(", ".join(given))).optim_args()


def _command(parsed: Arguments, arguments: Sequence[str]) -> list[str]:
    """The command that the recipe is for, and its arguments."""
    name, overrides = take_config(arguments)
    command = command_for(arguments)
    if is_quickstart_recipe(parsed.recipe) and parsed.model_name is None:
        return ["quickstart", *overrides]
    return [command, "--config", str(name), *overrides]


def _folder_name(text: str) -> str:
    return re.sub(r"[^\w.+-]+", "-", text)


# ---- going on


def options_to_go_on(trial: Trial) -> list[str] | None:
    """The options that a run's command needs to go on with what is there; `None` where the run is finished.

    Raises:
        UserError: the folder holds a run with other settings, or cannot be read.
    """
    try:
        facts = RunFacts.read(trial.folder)
        known = json.loads((trial.folder / SETTINGS_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return ["--resume_from_checkpoint=false"]
    except (OSError, ValueError) as error:
        raise UserError(f"{trial.folder} cannot be gone on with: {error}") from error
    if not isinstance(known, dict):
        raise UserError(f"{trial.folder / SETTINGS_FILE} holds no settings. Remove it to run {trial.name} anew.")
    changed = [key for key in sorted({*known, *trial.settings}) if known.get(key) != trial.settings.get(key)]
    if changed:
        told = ", ".join(f"{key} {known.get(key)!r}, now {trial.settings.get(key)!r}" for key in changed[:3])
        raise UserError(
            f"{trial.folder} holds a run with other settings ({told}). Give them again, or another --output_dir, or "
            "--overwrite_output_dir instead of --resume_from_checkpoint to run everything anew."
        )
    if facts is not None and facts.finished:
        return None
    return [f"--resume_from_checkpoint={'true' if last_checkpoint(trial.folder) else 'false'}"]
