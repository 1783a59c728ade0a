"""The `hf-galore` command: one file a subcommand, found by `main.py`."""
