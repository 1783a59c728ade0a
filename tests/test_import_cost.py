"""What `import hf_galore` adds to the import of transformers' trainer: its own modules and next to nothing else."""

from __future__ import annotations

import json
import subprocess
import sys

# Modules of the standard library that cost nothing worth counting.
CHEAP = {"difflib"}

CODE = """
import json, sys
import transformers.trainer
before = set(sys.modules)
import hf_galore
print(json.dumps(sorted(set(sys.modules) - before)))
"""


def test_importing_loads_no_module_that_transformers_trainer_has_not_loaded() -> None:
    """Modules rather than seconds, which a busy machine makes meaningless: bitsandbytes alone takes over one."""
    run = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    added = json.loads(run.stdout)
    assert "hf_galore.integrations.trainer" in added
    assert [name for name in added if name.split(".")[0] != "hf_galore" and name not in CHEAP] == []
    # The command line and what it needs come with the command.
    assert [name for name in added if name.startswith("hf_galore.cli")] == []
