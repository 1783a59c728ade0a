"""`hf-galore compare`: finished runs side by side, or a recipe run with several values and then compared."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from ..compare.as_json import runs_as_dicts, seeds_as_dicts
from ..compare.figures import pictures
from ..compare.page import PAGE, page
from ..compare.progress import AXES, axes_of
from ..compare.reading import read_runs
from ..compare.seeds import Compared, by_seed
from ..config import nearest
from ..errors import UserError
from ..recipes import writable
from .compare_screen import show
from .interrupts import stoppable
from .options import take_options

PROG = "hf-galore compare"
ABOUT = f"""usage: {PROG} RUN [RUN ...] [options]
       {PROG} --sweep KEY=V1,V2,... --config recipe.yaml [--key value ...] [options]

Compare trainings: their settings, losses, speed and memory, as tables, as pictures (PNG), and as one HTML page that
needs nothing but itself. Settings that differ come first. More than three runs have a line each.

RUN is the output_dir of a training by hf-galore, or of any other script with a Trainer: what is read is the Trainer's
log, trainer_state.json, in the folder or in its last checkpoint. Runs that differ in their seed and in nothing else are
one line and one curve, mean ± standard deviation; the page has each of them too.

With --sweep the recipe is run first, once for each value, each in a folder of its own below the recipe's output_dir
and in a process of its own:

  {PROG} --sweep rank=8,32,128 --config quickstart.yaml
  {PROG} --sweep rank=8,32 --sweep learning_rate=1e-3,2e-3 --config recipe.yaml --max_steps 100

options:
  --output FOLDER   where {PAGE} and the pictures go; by default `comparison`, of a sweep OUTPUT_DIR/comparison
  --names A,B,...   what to call the runs, in their order; by default as their folders
  --x AXIS          what the pictures' curves are drawn over: {", ".join(AXES)}; by default steps. Hours are those
                    of the steps, without evaluations. On the page the reader chooses.
  --by-seed         each seed of a run has a line and a curve of its own
  --json            the numbers of the tables as one JSON object on stdout, in place of the tables
  --sweep KEY=V1,V2,...
                    a key of optim_args (rank, scale, ...), the rest of which stays as it is, or any other key of the
                    recipe (learning_rate, seed, optim, ...). Several --sweep: all combinations. A value with a comma
                    in it goes into double quotes.
  --config FILE     the recipe of a sweep, of whichever command
  --key value       override what the recipe says in all runs of a sweep, such as --optim_target_modules all-linear;
                    for the keys see the recipe's command, hf-galore sft --help and the like
  --resume_from_checkpoint
                    go on with a sweep: what is finished is not run again
"""

DEFAULT_OUTPUT = "comparison"
_VALUES = {
    "--output": "a folder, as --output comparison",
    "--names": "a name for each run, as --names GaLore,AdamW",
    "--x": f"one of {', '.join(AXES)}, as --x tokens",
    "--sweep": "a key and its values, as --sweep rank=8,32,128",
}
_SWITCHES = ("--json", "--by-seed")


class _Options(NamedTuple):
    """How runs are to be compared."""

    names: list[str] | None
    output: Path | None
    axis: str
    each_seed: bool
    as_json: bool


def run(arguments: Sequence[str]) -> int:
    """`hf-galore compare RUN...`, or `hf-galore compare --sweep KEY=V1,V2 --config FILE`.

    Returns:
        0, or of a sweep the exit status of the run that failed.

    Raises:
        UserError: something that was given is wrong, or a run cannot be read.
        Stopped: Ctrl-C.
        SystemExit: `--help` was among the arguments and has been shown.
    """
    if not {"-h", "--help"}.isdisjoint(arguments):
        print(ABOUT, end="")
        raise SystemExit(0)
    with stoppable(lambda: "interrupted."):
        return _run(arguments)


def _run(arguments: Sequence[str]) -> int:
    sweeps = any(item.partition("=")[0] == "--sweep" for item in arguments)
    given, rest = take_options(arguments, _VALUES, _SWITCHES, repeatable=("--sweep",), with_files=not sweeps)
    options = _Options(
        names=[name.strip() for name in given["--names"][0].split(",")] if "--names" in given else None,
        output=Path(given["--output"][0]).expanduser() if "--output" in given else None,
        axis=_axis(given["--x"][0]) if "--x" in given else AXES[0],
        each_seed="--by-seed" in given,
        as_json="--json" in given,
    )
    if sweeps:
        return _sweep(arguments, given["--sweep"], rest, options)
    folders = _folders(rest)
    output = options.output or Path(DEFAULT_OUTPUT)
    _check_names(options.names, len(folders))
    writable.check_folder("--output", output)
    _compare(folders, options.names, output, options)
    return 0


def _sweep(arguments: Sequence[str], given: Sequence[str], rest: Sequence[str], options: _Options) -> int:
    from ..compare.sweep import plan_sweep  # what reads recipes takes seconds to import
    from .sweep import run_sweep

    sweep = plan_sweep(given, rest)
    output = options.output or sweep.output_dir / DEFAULT_OUTPUT
    _check_names(options.names, len(sweep.trials))
    writable.check_folder("--output", output)  # now, and not after the runs of a sweep
    status = run_sweep(sweep, PROG, arguments, to_stderr=options.as_json)
    if status == 0:
        names = options.names or [trial.name for trial in sweep.trials]
        _compare([trial.folder for trial in sweep.trials], names, output, options)
    return status


def _compare(folders: Sequence[Path], names: Sequence[str] | None, output: Path, options: _Options) -> None:
    runs = read_runs(folders, names)
    if options.axis not in axes_of(runs):
        raise UserError(f"--x {options.axis}: no run's log tells them. Leave it out: curves are drawn over the steps.")
    compared: Sequence[Compared] = runs if options.each_seed else by_seed(runs)
    drawn = pictures(compared, options.axis)
    # Everything is made before anything is written.
    files = {f"{picture.file}.png": picture.png for picture in drawn}
    _write({PAGE: page(compared, drawn, options.axis).encode(), **files}, output)
    if options.as_json:
        found = {"runs": runs_as_dicts(runs), "seeds": seeds_as_dicts(compared), "page": str(output / PAGE)}
        print(json.dumps(found, indent=2, allow_nan=False))
    else:
        show(compared)
    place = sys.stderr if options.as_json else sys.stdout
    print(f"The page is {output / PAGE}; the pictures are beside it.", file=place)


# ---- what was given


def _folders(rest: Sequence[str]) -> list[Path]:
    for item in rest:
        flag = item.partition("=")[0]
        if flag in ("--config", "--resume_from_checkpoint"):
            raise UserError(f"{flag} is for a sweep: add --sweep KEY=V1,V2, or give the folders of runs alone.")
        if item.startswith("-"):
            raise UserError(f"there is no option {flag}.{nearest(flag, [*_VALUES, *_SWITCHES])}")
    if not rest:
        raise UserError(
            f"give the folders of runs to compare: {PROG} RUN [RUN ...]. Or a recipe to run with several values: "
            "--sweep rank=8,32 --config recipe.yaml."
        )
    return [Path(item).expanduser() for item in rest]


def _axis(text: str) -> str:
    if text not in AXES:
        raise UserError(f"--x {text}: curves are drawn over {', '.join(AXES)}.{nearest(text, list(AXES))}")
    return text


def _check_names(names: Sequence[str] | None, count: int) -> None:
    if names is None:
        return
    if len(names) != count:
        raise UserError(f"--names gives {len(names)} ({', '.join(names)}), but there are {count} runs. Give one each.")
    if not all(names):
        raise UserError("--names has an empty name. Give one for each run, with commas between them.")
    if len(set(names)) < len(names):
        raise UserError(f"--names calls two runs the same: {', '.join(names)}. Give each its own.")


# ---- what came of it


def _write(files: Mapping[str, bytes], folder: Path) -> None:
    """Write all files, or none where one of them cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            for name, content in files.items():
                (Path(temporary) / name).write_bytes(content)
            for name in files:
                (Path(temporary) / name).replace(folder / name)
    except OSError as error:
        raise writable.unwritable_folder("--output", folder, error) from error
