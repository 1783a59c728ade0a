"""Run commands of hf-galore in two processes each, one after the other.

    python -m tests.support.commands_in_two FOLDER COMMANDS

COMMANDS is a JSON object of the arguments of each command, by a name; what each prints is in `FOLDER/NAME`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tests.support.ranks import at_most, settle, under_torchrun


def main(folder: Path, commands: dict[str, list[str]]) -> None:
    """Run them, and leave torchrun's status of each in a file."""
    settle()
    for name, arguments in commands.items():
        (folder / name).mkdir()
        with at_most(200, name):
            status = under_torchrun(arguments, folder / name)
        (folder / name / "status").write_text(str(status), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
