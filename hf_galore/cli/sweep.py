"""`hf-galore compare --sweep`: one recipe, run once for each of several values."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import itertools
import json
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from transformers import TrainingArguments

from ..config import GaLoreConfig, nearest
from ..integrations.trainer import optim_name
from . import recipe, stand_in
from .checkpoints import last_checkpoint
from .errors import Stopped, UserError, reporting_complaints
from .kinds import QUICKSTART, command_for
from .run_record import RunFacts
from .training import galore_config
from .whole_files import write_whole

PROG = "hf-galore compare"
SETTINGS_FILE = "hf_galore_sweep.json"
"""In the folder of each run: all its settings, so that a sweep that goes on does not take another's run for its own."""

_GALORE_KEYS = [field.name for field in dataclasses.fields(GaLoreConfig)]
# What a sweep decides, and what makes no difference to a run.
_OWN = ("output_dir", "resume_from_checkpoint", "config")
_NO_SETTINGS = (*_OWN, "logging_dir", "run_name", "use_cpu")
_INTERRUPTED = 130
_PATIENCE = 20  # seconds that a run has to stop by itself after Ctrl-C, which a terminal sends to it too


class Trial(NamedTuple):
    """One run of a sweep."""

    name: str
    """`rank=8, scale=1`."""
    folder: Path
    command: list[str]
    """What follows `hf-galore`."""
    settings: Mapping[str, Any]


class Sweep(NamedTuple):
    """All runs, checked, before any has begun."""

    output_dir: Path
    trials: list[Trial]
    resumes: bool


def plan_sweep(given: Sequence[str], arguments: Sequence[str]) -> Sweep:
    """Work out the runs of a sweep, and check each: a mistake is found before hours have gone into others.

    Args:
        given: `KEY=V1,V2,...`, one of each `--sweep`.
        arguments: `--config FILE --key value ...`, for the recipe's command.

    Raises:
        UserError: an unknown key, a value that the recipe's command would not take.
    """
    name, overrides = recipe.take_config(arguments)
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
    return Sweep(output_dir, trials, _resumes(base))


def run_sweep(sweep: Sweep, arguments: Sequence[str], *, to_stderr: bool = False) -> int:
    """Run what is not finished, one after the other, each in a process of its own.

    Args:
        sweep: from `plan_sweep`.
        arguments: all that the command was given, to say how to go on.
        to_stderr: whether what the runs print is kept out of stdout.

    Returns:
        0, or the exit status of the run that failed, after which no other is begun.

    Raises:
        Stopped: Ctrl-C.
    """
    stream = sys.stderr if to_stderr else sys.stdout
    again = shlex.join([*arguments, *([] if sweep.resumes else ["--resume_from_checkpoint"])])
    todo = [(trial, _how_to_go_on(trial) if sweep.resumes else []) for trial in sweep.trials]  # all are checked first
    for count, (trial, options) in enumerate(todo, start=1):
        progress = f"{trial.name} ({count} of {len(todo)})"
        if options is None:
            print(f"{progress} is finished: it is not run again.", file=stream, flush=True)
            continue
        command = [*trial.command, *options]
        print(f"{progress}: hf-galore {shlex.join(command)}", file=stream, flush=True)
        status = _run(trial, command, to_stderr)
        if status == _INTERRUPTED:
            raise Stopped(f"interrupted in {trial.name}; go on with: {PROG} {again}")
        if status:
            print(
                f"{PROG}: {trial.name} failed with exit status {status}, and the sweep stops: hf-galore "
                f"{shlex.join(command)}. What is finished is kept; go on with: {PROG} {again}",
                file=sys.stderr,
            )
            return status
    return 0


# ---- what was given


def _axis(text: str) -> tuple[str, list[str]]:
    key, equals, values = text.partition("=")
    found = [value.strip() for value in next(csv.reader([values], skipinitialspace=True), [])]
    if not key or not equals or not all(found) or not found:
        raise UserError(f"--sweep {text}: it has to read KEY=V1,V2,..., as --sweep rank=8,32,128.")
    if len(set(found)) < len(found):
        raise UserError(f"--sweep {text}: a value is given twice. Give each once.")
    return key.strip().replace("-", "_"), found


def _parse(arguments: Sequence[str]) -> stand_in.Arguments:
    # A process that only starts others is to leave all of the GPU to them.
    with reporting_complaints():
        return stand_in.parse([*arguments, "--use_cpu", "true"], PROG, "")


def _check_keys(axes: Mapping[str, Sequence[str]], base: stand_in.Arguments, overrides: Sequence[str]) -> None:
    known = [field.name for part in base if dataclasses.is_dataclass(part) for field in dataclasses.fields(part)]
    overridden = {recipe.key_of(item) for item in overrides if item.startswith("--")}
    for key in axes:
        if key in _OWN:
            raise UserError(f"--sweep {key}: it is nothing to compare. Give the recipe's {key} once.")
        if key not in known and key not in _GALORE_KEYS:
            raise UserError(f"--sweep {key}: there is no such key.{nearest(key, [*_GALORE_KEYS, *known])}")
        if key in overridden:
            raise UserError(f"--sweep {key} and --{key} are both given. Leave one out.")
    if "optim_args" in axes and not axes.keys().isdisjoint(_GALORE_KEYS):
        raise UserError("--sweep optim_args would undo the other, which is a part of it. Leave one out.")
    if len(getattr(getattr(base, "glue", None), "seeds", None) or ()) > 1 or "seeds" in axes:
        raise UserError("seeds makes several runs of each. Compare them as runs: --sweep seed=1,2,3, without seeds.")


def _resumes(base: stand_in.Arguments) -> bool:
    wanted = str(base.training.resume_from_checkpoint or "false").lower()
    if wanted not in ("true", "false"):
        raise UserError(
            f"resume_from_checkpoint {base.training.resume_from_checkpoint}: a sweep has no use for a folder. Give no "
            "value: each run goes on from its own last checkpoint."
        )
    return wanted == "true"


def _trial(values: Mapping[str, str], arguments: Sequence[str], base: stand_in.Arguments) -> Trial:
    name = ", ".join(f"{key}={value}" for key, value in values.items())
    folder = Path(base.training.output_dir) / "_".join(_folder_name(f"{key}-{value}") for key, value in values.items())
    options = [f"--{key}={value}" for key, value in values.items() if key not in _GALORE_KEYS]
    galore = [f"{key}={value}" for key, value in values.items() if key in _GALORE_KEYS]
    try:
        if galore:
            options.append(f"--optim_args={_optim_args(_parse([*arguments, *options]), galore)}")
        options.append(f"--output_dir={folder}")
        parsed = _parse([*arguments, *options])
        galore_config(parsed.training)  # read now, for its mistakes
    except ValueError as error:
        raise UserError(f"--sweep {name}: {error}") from error
    return Trial(name, folder, _command(parsed, [*arguments, *options]), _settings(parsed))


def _optim_args(parsed: stand_in.Arguments, given: Sequence[str]) -> str:
    """The recipe's, with other values of some."""
    config = galore_config(parsed.training)
    if config is None:
        name = optim_name(parsed.training)
        raise UserError(f"these are of GaLore, which optim {name} is not. Give a galore_* optim.")
    changed = GaLoreConfig.from_optim_args(", ".join(given))
    keys = [item.partition("=")[0] for item in given]
    return dataclasses.replace(config, **{key: getattr(changed, key) for key in keys}).optim_args()


def _command(parsed: stand_in.Arguments, arguments: Sequence[str]) -> list[str]:
    """The command that the recipe is for, and its arguments."""
    name, overrides = recipe.take_config(arguments)
    command = command_for(arguments)
    own = recipe.recipes_folder() / QUICKSTART
    if isinstance(parsed, recipe.Arguments) and parsed.recipe == own and parsed.model.model_name_or_path is None:
        return ["quickstart", *overrides]
    return [command, "--config", str(name), *overrides]


def _folder_name(text: str) -> str:
    return re.sub(r"[^\w.+-]+", "-", text)


def _settings(parsed: stand_in.Arguments) -> dict[str, Any]:
    """All that a run is told, as JSON gives it back; tokens are not written down."""
    found: dict[str, Any] = {}
    for part in parsed:
        if isinstance(part, TrainingArguments):  # whose to_dict leaves tokens out
            found.update(part.to_dict())
        elif dataclasses.is_dataclass(part) and not isinstance(part, type):
            found.update(dataclasses.asdict(part))
    kept = {key: value for key, value in found.items() if key not in _NO_SETTINGS}
    plain: dict[str, Any] = json.loads(json.dumps(kept, default=str, sort_keys=True))
    return plain


# ---- running


def _how_to_go_on(trial: Trial) -> list[str] | None:
    """What a run's command needs besides, to go on; `None` where the run is finished."""
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
            "leave out --resume_from_checkpoint to run everything anew."
        )
    if facts is not None and facts.finished:
        return None
    return [f"--resume_from_checkpoint={'true' if last_checkpoint(trial.folder) else 'false'}"]


def _run(trial: Trial, command: Sequence[str], to_stderr: bool) -> int:
    """The exit status of one run; 128 and the signal's number, as shells have it, where a signal ended it."""
    folder, record = trial.folder, trial.folder / SETTINGS_FILE
    missing = [path for path in (folder.absolute(), *folder.absolute().parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(record, json.dumps(trial.settings, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"output_dir {folder} cannot be written to ({error}). Give another one.") from error
    status = _wait([sys.executable, "-m", "hf_galore.cli.main", *command], to_stderr)
    if status and list(folder.iterdir()) == [record]:  # it left nothing, and so do we
        record.unlink()
        for path in missing:
            with contextlib.suppress(OSError):  # not empty
                path.rmdir()
    return status


def _wait(command: Sequence[str], to_stderr: bool) -> int:
    process = subprocess.Popen(command, stdout=2 if to_stderr else None)
    try:
        status = process.wait()
    except KeyboardInterrupt:
        # It saves nothing now, but a checkpoint that it is writing is not to be cut off.
        try:
            process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:  # it was sent to this process alone
            process.send_signal(signal.SIGINT)
            process.wait()
        finally:
            process.kill()  # Ctrl-C once more; or else it has ended
        return _INTERRUPTED
    return 128 - status if status < 0 else status
