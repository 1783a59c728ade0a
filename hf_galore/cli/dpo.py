"""`hf-galore dpo`: teach a model preferences as a recipe says."""

from __future__ import annotations

from collections.abc import Sequence

from ..recipes import dpo
from .options import need_recipe
from .training_command import train_and_say

PROG = "hf-galore dpo"
ABOUT = """Teach a model which of two answers is preferred, with TRL's DPOTrainer. The file holds 'key: value' lines,
with the keys below: those of `trl dpo`, optim: galore_* among them. Options on the command line come after the file
and override it."""


def run(arguments: Sequence[str]) -> int:
    """`hf-galore dpo --config FILE [--key value ...]`.

    Raises:
        UserError: something that was given is wrong.
        Stopped: Ctrl-C.
    """
    need_recipe(arguments, "recipe.yaml")
    parsed = dpo.parse(arguments, PROG, ABOUT)
    return train_and_say(PROG, arguments, parsed, lambda trainer: f"The model is in {trainer.args.output_dir}.")
