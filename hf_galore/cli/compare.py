"""`hf-galore compare`: finished runs side by side, or a recipe run with several values and then compared."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import rich.table
from rich.console import Console
from rich.text import Text

from ..compare.figures import pictures
from ..compare.page import PAGE, page
from ..compare.reading import read_runs
from ..compare.runs import Run
from ..compare.tables import Table, as_dict, notes, results_table, settings_table
from ..config import nearest
from ..errors import UserError
from ..recipes import writable
from .interrupts import stoppable
from .options import take_options

PROG = "hf-galore compare"
ABOUT = f"""usage: {PROG} RUN [RUN ...] [--output FOLDER] [--names A,B,...] [--json]
       {PROG} --sweep KEY=V1,V2,... --config recipe.yaml [--key value ...] [--output FOLDER] [--names A,B,...] [--json]

Compare trainings: their settings, losses, speed and memory, as tables, as pictures (PNG), and as one HTML page that
needs nothing but itself.

RUN is the output_dir of a training by hf-galore, or of any other script with a Trainer: what is read is the Trainer's
log, trainer_state.json, in the folder or in its last checkpoint. Differences are from the first run.

With --sweep the recipe is run first, once for each value, each in a folder of its own below the recipe's output_dir
and in a process of its own:

  {PROG} --sweep rank=8,32,128 --config quickstart.yaml
  {PROG} --sweep rank=8,32 --sweep learning_rate=1e-3,2e-3 --config recipe.yaml --max_steps 100

options:
  --output FOLDER   where {PAGE} and the pictures go; by default `comparison`, of a sweep OUTPUT_DIR/comparison
  --names A,B,...   what to call the runs, in their order; by default as their folders
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
    "--sweep": "a key and its values, as --sweep rank=8,32,128",
}
_SWITCHES = ("--json",)
_LONG_NAME, _SHORT_NAME = 48, 16  # characters in a line, where there is room and where there is not
_BORDERS = 3  # of a column: spaces and a line; the first has another


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
    as_json = "--json" in given
    names = [name.strip() for name in given["--names"][0].split(",")] if "--names" in given else None
    output = Path(given["--output"][0]).expanduser() if "--output" in given else None
    if sweeps:
        return _sweep(arguments, given["--sweep"], rest, names, output, as_json)
    folders = _folders(rest)
    output = output or Path(DEFAULT_OUTPUT)
    _check_names(names, len(folders))
    writable.check_folder("--output", output)  # now, and not after the runs of a sweep
    _compare(folders, names, output, as_json)
    return 0


def _sweep(
    arguments: Sequence[str],
    given: Sequence[str],
    rest: Sequence[str],
    names: Sequence[str] | None,
    output: Path | None,
    as_json: bool,
) -> int:
    from ..compare.sweep import plan_sweep  # what reads recipes takes seconds to import
    from .sweep import run_sweep

    sweep = plan_sweep(given, rest)
    output = output or sweep.output_dir / DEFAULT_OUTPUT
    _check_names(names, len(sweep.trials))
    writable.check_folder("--output", output)  # now, and not after the runs of a sweep
    status = run_sweep(sweep, PROG, arguments, to_stderr=as_json)
    if status == 0:
        _compare([trial.folder for trial in sweep.trials], names or [t.name for t in sweep.trials], output, as_json)
    return status


def _compare(folders: Sequence[Path], names: Sequence[str] | None, output: Path, as_json: bool) -> None:
    runs = read_runs(folders, names)
    drawn = pictures(runs)
    # Everything is made before anything is written.
    _write({PAGE: page(runs, drawn).encode(), **{picture.file: picture.png for picture in drawn}}, output)
    if as_json:
        print(json.dumps({"runs": as_dict(runs), "page": str(output / PAGE)}, indent=2, allow_nan=False))
    else:
        _show(runs)
    print(f"The page is {output / PAGE}; the pictures are beside it.", file=sys.stderr if as_json else sys.stdout)


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


def _show(runs: Sequence[Run]) -> None:
    console = Console(highlight=False)
    for table in (settings_table(runs), results_table(runs)):
        for part in _parts(table, console.width):
            console.print(part)
    for note in notes(runs):
        console.print(Text(note), soft_wrap=True)


def _parts(table: Table, width: int) -> Iterator[rich.table.Table]:
    """Yield the table in as many parts as its columns need to fit `width`."""
    if not table.rows:  # nothing is known of the settings of other programs
        return
    left = max(len(row.label) for row in table.rows) + _BORDERS + 1
    columns = _widths(table, _LONG_NAME)
    if left + sum(columns) > width:
        columns = _widths(table, _SHORT_NAME)
    start = 0
    while start < len(columns):
        end = start + 1
        while end < len(columns) and left + sum(columns[start : end + 1]) <= width:
            end += 1
        yield _part(table, start, end, columns)
        start = end


def _widths(table: Table, longest_name: int) -> list[int]:
    """The width of each run's column, with its borders; a longer name goes on in the next line."""
    return [
        _BORDERS + max(min(len(name), longest_name), *(len(row.cells[place]) for row in table.rows))
        for place, name in enumerate(table.names)
    ]


def _part(table: Table, start: int, end: int, columns: Sequence[int]) -> rich.table.Table:
    shown = rich.table.Table(title=Text(table.title) if start == 0 else None, title_justify="left")
    shown.add_column("")
    for place in range(start, end):
        name = Text(table.names[place], overflow="fold")
        shown.add_column(name, justify="right", overflow="fold", max_width=columns[place] - _BORDERS)
    for row in table.rows:
        cells = [(row.cells[place], "bold" if place in row.best else "") for place in range(start, end)]
        shown.add_row(Text(row.label), *(Text(cell, style, overflow="fold") for cell, style in cells))
    return shown
