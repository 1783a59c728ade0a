"""`hf-galore sft`: fine-tune a model as a recipe says."""

from __future__ import annotations

from collections.abc import Sequence

from ..recipes import sft
from .options import need_recipe
from .training_command import train_and_say

PROG = "hf-galore sft"
ABOUT = """Fine-tune a model with TRL's SFTTrainer. The file holds 'key: value' lines, with the keys below: those of
`trl sft`, optim: galore_* among them. Options on the command line come after the file and override it."""


def run(arguments: Sequence[str]) -> int:
    """`hf-galore sft --config FILE [--key value ...]`.

    Raises:
        UserError: something that was given is wrong.
        Stopped: Ctrl-C.
    """
    need_recipe(arguments, "recipe.yaml")
    parsed = sft.parse(arguments, PROG, ABOUT)
    return train_and_say(PROG, arguments, parsed, lambda trainer: f"The model is in {trainer.args.output_dir}.")
