"""Stands in for the script of an installed command: `console_command.py NAME MODULE:FUNCTION [arguments]`.

Such scripts are not always Python files (on Windows they are programs), but all of them do this.
"""

import os
import sys
import sysconfig
from importlib.metadata import EntryPoint

if __name__ == "__main__":
    name, function, *arguments = sys.argv[1:]
    scripts = sysconfig.get_path("scripts")
    sys.argv = [os.path.join(scripts, name), *arguments]
    if not getattr(sys.flags, "safe_path", False):  # python -P, since 3.11
        sys.path[0] = scripts  # where the command's own script is, in place of this one's folder
    sys.exit(EntryPoint(name, function, "console_scripts").load()())
