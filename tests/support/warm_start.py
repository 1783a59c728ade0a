"""What `tests.support.warm` forks processes from: imports what tests and commands need, and does nothing else."""

from __future__ import annotations

import contextlib
import gc
import importlib
import os

from hf_galore.cli.noise import quieten

# As a command does, before the libraries read it; and a busy machine shows no bar of theirs.
os.environ["TQDM_DELAY"] = "60"
quieten()

import torch  # noqa: E402

for name in (
    *("accelerate", "transformers.trainer", "torch.distributed.fsdp", "torch.distributed.launcher.api", "pytest"),
    *(f"hf_galore.cli.{command}" for command in ("chat", "compare", "dpo", "glue", "pretrain", "quickstart", "sft")),
):
    with contextlib.suppress(ImportError):  # an extra that is not installed; what needs it will say so
        importlib.import_module(name)

torch.set_num_threads(1)
gc.collect()
gc.freeze()
