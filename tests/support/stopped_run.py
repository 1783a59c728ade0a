"""A command in one of several processes, of which the second is told to stop in its third step.

    torchrun --nproc_per_node 2 -m tests.support.stopped_run sft --key value ...

Each leaves its exit status in `STATUS_FOLDER`.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

from trl import SFTTrainer

from hf_galore.cli.main import main

if __name__ == "__main__":
    rank, original = int(os.environ["RANK"]), SFTTrainer.training_step

    def sent(self: SFTTrainer, *args: Any, **kwargs: Any) -> Any:
        if rank == 1 and self.state.global_step == 2:
            for _ in range(2):  # Slurm sends it to all, and torchrun passes it on
                os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *args, **kwargs)

    SFTTrainer.training_step = sent
    status = main(sys.argv[1:])
    (Path(os.environ["STATUS_FOLDER"]) / f"status-{rank}").write_text(str(status), encoding="utf-8")
