"""`python -m hf_galore SCRIPT`: run any training script as it is, with hf_galore's optimizers registered.

The script runs in a fresh interpreter that takes this process's place, so that everything is as it is without us:
`__main__`, `sys.argv`, `sys.path`, tracebacks, exit status, signals, and what the script sets before it imports
transformers. What differs is the first folder in PYTHONPATH, whose sitecustomize.py registers the optimizers, in that
interpreter and in those that it starts (`trl sft` and `accelerate launch` train in child processes), and that torch is
asked for expandable segments, as by hf-galore's own commands.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..config import nearest
from ..errors import UserError
from ..expandable_segments import use_expandable_segments
from ..version import __version__
from .main import COMMANDS
from .main import main as run_own_command

PROG = "python -m hf_galore"
USER_ERROR = 2
BOOTSTRAP = Path(__file__).parents[1] / "bootstrap"

HELP = f"""usage: {PROG} [-h] [--version] SCRIPT [arguments of the script]

Run a training script as it is, with hf_galore's optimizers behind the galore_* names of TrainingArguments.optim.

SCRIPT is what stands after 'python', or an installed command:
  train.py           a Python file, or a folder or zip file with a __main__.py
  -m package.module  a module
  trl                a Python command, by its name
or a command of hf-galore: sft, quickstart, ...

  {PROG} train.py --optim galore_adamw_8bit_layerwise
  {PROG} trl sft --config recipe.yaml
  torchrun --nproc_per_node 2 -m hf_galore train.py
  accelerate launch -m hf_galore sft --config recipe.yaml

The Python processes that the script starts are registered too, if they get its environment.
What stands after SCRIPT is the script's. Before it:
  -h, --help         show this and exit
  --version          show hf_galore's version and exit"""


def main(arguments: Sequence[str]) -> int:
    """Run what `arguments` name; on POSIX, a script that can be started never returns here.

    Args:
        arguments: what follows `python -m hf_galore`.

    Returns:
        The script's exit status; 2, with one line on stderr, where there is nothing to run.
    """
    if not arguments:
        print(HELP, file=sys.stderr)
        return USER_ERROR
    if arguments[0] in ("-h", "--help"):
        print(HELP)
        return 0
    if arguments[0] == "--version":
        print(f"hf_galore {__version__}")
        return 0
    if is_own_command(arguments[0]):
        return run_own_command(arguments)
    try:
        _check_interpreter()
        command = python_arguments(arguments)
    except UserError as error:
        print(f"{PROG}: {error}", file=sys.stderr)
        return USER_ERROR
    command = [sys.executable, *interpreter_options(sys.orig_argv, arguments), *command]
    env = environment(os.environ)
    if os.name != "nt":  # where exec returns to the shell at once
        sys.stdout.flush()
        sys.stderr.flush()
        os.execve(sys.executable, command, env)
    return _wait_for(command, env)


def python_arguments(arguments: Sequence[str]) -> list[str]:
    """What `python` is given to run what `arguments` name.

    A file comes before a command of its name, and a command before a folder: a checkout of trl does not hide `trl`.

    Raises:
        UserError: there is no such thing, or it is not Python.
    """
    script, rest = arguments[0], list(arguments[1:])
    if script == "-m":
        if not rest:
            raise UserError("-m needs the name of a module after it.")
        _check_module(rest[0])
        return ["-m", *rest]
    if script.startswith("-"):
        raise UserError(f"there is no option {script}; the script's own go after its name. See {PROG} --help.")
    path = Path(script)
    if path.is_file() and _is_python(path):
        return [script, *rest]
    with contextlib.suppress(KeyError):
        return [str(BOOTSTRAP / "console_command.py"), script, _commands()[script], *rest]
    # Older packages install a Python file rather than the name of a function.
    installed = Path(sysconfig.get_path("scripts"), script)
    if path.name == script and installed.is_file() and _is_python(installed):
        return [str(installed), *rest]
    if (path / "__main__.py").is_file():
        return [script, *rest]
    raise UserError(_explain_missing(path))


def interpreter_options(orig_argv: Sequence[str], arguments: Sequence[str]) -> list[str]:
    """What stands before `-m hf_galore` in the command line that led here: options of `python` itself, such as -u.

    A debugger or profiler that runs modules stands there too, and so gets the script to run.

    Args:
        orig_argv: that command line: `python [options] -m hf_galore [arguments]`.
        arguments: its last part.
    """
    before = list(orig_argv[1 : len(orig_argv) - len(arguments)])
    if before[-1:] == ["hf_galore"]:
        before.pop()
        switch = "m"
    else:
        switch = "mhf_galore"  # python takes that as well
    last = before.pop() if before else ""
    if not (last.startswith("-") and last.endswith(switch)):
        return []  # called by a program rather than started as a module
    flags = last.removesuffix(switch)  # -m may have others in front of it: -um
    return before if flags == "-" else [*before, flags]


def environment(inherited: Mapping[str, str]) -> dict[str, str]:
    """`inherited`, with the folder of our sitecustomize.py at the front of PYTHONPATH, and expandable segments."""
    before = inherited.get("PYTHONPATH")
    folders = before.split(os.pathsep) if before else []
    ours = str(BOOTSTRAP)
    own = {**inherited, "PYTHONPATH": os.pathsep.join([ours, *(folder for folder in folders if folder != ours)])}
    use_expandable_segments(own)
    return own


# ---- what there is to run


def is_own_command(name: str) -> bool:
    """Whether a name is a command of hf-galore, which a launcher of several processes can start by it alone.

    A file of that name comes before it; a folder does not.
    """
    return name in COMMANDS and not Path(name).is_file()


def _check_interpreter() -> None:
    if sys.flags.ignore_environment or sys.flags.no_site:
        raise UserError(
            "python was started with -E, -I or -S, and then imports no sitecustomize.py from PYTHONPATH, by which the "
            "optimizers are registered. Leave that option out, or put 'import hf_galore' into the script."
        )


def _check_module(name: str) -> None:
    """Find the outermost package only: to look into it would import it."""
    outermost = name.partition(".")[0]
    try:
        found = importlib.util.find_spec(outermost)
    except ValueError:  # an empty name, or __main__
        found = None
    if found is None:
        hint = f" For a file, leave out -m: {PROG} {name}." if name.endswith(".py") else ""
        raise UserError(f"there is no module {name!r} in {Path.cwd()} or among the installed packages.{hint}")


def _is_python(path: Path) -> bool:
    if path.suffix in (".py", ".pyw", ".pyc", ".pyz"):
        return True
    try:
        with path.open("rb") as file:
            first = file.readline(256)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}).") from error
    return (first.startswith(b"#!") and b"python" in first) or zipfile.is_zipfile(path)


def _commands() -> dict[str, str]:
    """Installed Python commands, and the function that each of them calls."""
    return {point.name: point.value for point in importlib.metadata.entry_points(group="console_scripts")}


def _explain_missing(path: Path) -> str:
    if re.fullmatch(r"python[\d.]*(\.exe)?", path.name):
        return f"leave out {str(path)!r}: the script or -m comes right after {PROG}."
    if path.is_file():
        return (
            f"{path} is not a Python file. Give the .py file; in a shell script, write '{PROG}' in place of 'python'."
        )
    if path.is_dir():
        return f"{path} is a folder without a __main__.py. Give the file to run, or -m and a module's name."
    beside = [str(file) for file in path.parent.glob("*.py")]
    if path.suffix == ".py" or path.name != str(path):
        return f"there is no file {path} (in {Path.cwd()}).{nearest(str(path), beside)}"
    return (
        f"{str(path)!r} is neither a file in {Path.cwd()} nor an installed Python command."
        f"{nearest(str(path), [*_commands(), *beside])}"
    )


# ---- running it


def _wait_for(command: Sequence[str], env: Mapping[str, str]) -> int:
    """Run `command` beside this process, and return its exit status."""
    process = subprocess.Popen(command, env=env)
    while True:
        with contextlib.suppress(KeyboardInterrupt):  # it gets Ctrl-C as well, and decides
            return process.wait()
