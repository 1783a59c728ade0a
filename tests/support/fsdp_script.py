"""Run by test_ddp.py under torchrun: asks for FSDP in each way there is, and expects each to be refused."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.helpers import assert_identical, make_trainer, snapshot, tiny_llama


def main(output: Path) -> None:
    ways: list[tuple[str, dict[str, Any]]] = [
        ("ACCELERATE_USE_FSDP", {}),
        ("in the training arguments: fsdp", {"fsdp": True}),
    ]
    for words, overrides in ways:
        os.environ["ACCELERATE_USE_FSDP"] = "false" if overrides else "true"
        model = tiny_llama()
        before = snapshot(model)
        trainer = make_trainer(model, output, "galore_adamw", **overrides)
        assert trainer.args.world_size == 2
        with pytest.raises(ValueError, match=rf"optim='galore_adamw' does not work under FSDP.*{words}"):
            trainer.train()
        assert_identical(snapshot(model), before)
    (output / f"refused-{trainer.args.process_index}").touch()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
