"""Execute the notebooks as Jupyter does, in kernels of this Python.

`python -m tests.support.notebooks` executes all of them in place, which makes the outputs that are committed; with
arguments, `python -m tests.support.notebooks 03 05_other`, those whose names start so.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import nbformat
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from rich.console import Console

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "notebooks"
NAMES = sorted(path.name for path in FOLDER.glob("*.ipynb"))

# What a person should wait for at most, in seconds, on one core: what notebooks are written for.
TARGET = 120
# What a run is given: two and a half times that, for machines that are slower, or busy.
LIMIT = 300

# Which Python executed a notebook is of no interest to its readers, and would differ with every machine.
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


class OwnPython(AsyncKernelManager):
    """Kernels of the Python that runs this, whatever `python3` is registered as elsewhere on the machine, if at all."""

    def __init__(self, **kwargs: Any) -> None:
        # Where no folder has the spec, jupyter_client makes one for ipykernel in sys.executable.
        super().__init__(kernel_spec_manager=KernelSpecManager(kernel_dirs=[]), **kwargs)


def read(path: Path) -> nbformat.NotebookNode:
    """The notebook.

    Raises:
        nbformat.ValidationError: it does not follow the format.
    """
    notebook: nbformat.NotebookNode = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return notebook


def execute(path: Path, folder: Path, limit: float = LIMIT) -> nbformat.NotebookNode:
    """The notebook with the outputs of an execution in `folder`, into which everything is written.

    Without the network, on one thread, and with the embedded model and data below `folder`.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed.
        nbclient.exceptions.CellTimeoutError: all cells together took longer than `limit` seconds.
    """
    notebook = read(path)
    notebook.metadata = nbformat.from_dict(METADATA)
    end = time.monotonic() + limit
    client = NotebookClient(
        notebook,
        kernel_name="python3",
        kernel_manager_class=OwnPython,
        timeout_func=lambda cell: max(1.0, end - time.monotonic()),
        resources={"metadata": {"path": str(folder)}},
        extra_arguments=["--log-level=ERROR"],  # else each kernel warns of its way of talking to this process
        coalesce_streams=True,
        record_timing=False,
        store_widget_state=False,
    )
    client.execute(env={**os.environ, **_environment(folder)})
    return client.nb


def _environment(folder: Path) -> dict[str, str]:
    return {
        "HF_GALORE_CACHE": str(folder / "cache"),
        "HF_HOME": str(folder / "huggingface"),
        "HF_HUB_OFFLINE": "1",
        "PIP_NO_INDEX": "1",  # the first cell finds hf_galore; should it not, nothing is to come from elsewhere
        "PYTHONPATH": str(ROOT),
        "IPYTHONDIR": str(folder / "ipython"),  # nobody's startup files
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",  # a debugger's warning
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def main() -> None:
    """Execute notebooks in place."""
    parser = argparse.ArgumentParser(prog="python -m tests.support.notebooks", description=main.__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="how the names start; all notebooks by default")
    wanted = tuple(parser.parse_args().names)
    chosen = [name for name in NAMES if name.startswith(wanted or "")]
    if not chosen:
        parser.error(f"no notebook's name starts with {' or '.join(wanted)}; there are {', '.join(NAMES)}")
    console = Console()
    for name in chosen:
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            executed = execute(FOLDER / name, Path(folder))
        # Whole, or not at all: the old file is the only copy of the source.
        temporary = FOLDER / f"{name}.new"
        nbformat.write(executed, temporary)
        temporary.replace(FOLDER / name)
        console.print(f"{name}: {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
