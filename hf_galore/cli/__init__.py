"""The `hf-galore` command: one file a subcommand, found by `main.py`; nothing outside this folder imports from it."""
