"""`python -m hf_galore SCRIPT [arguments]`: any training script with hf_galore's optimizers. See cli/run_script.py."""

from __future__ import annotations

import sys

from hf_galore.cli.run_script import main

if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
