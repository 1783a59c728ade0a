"""A recipe of whichever command, parsed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch

from . import dpo, glue, pretrain, sft
from .kinds import command_for

Arguments: TypeAlias = sft.Arguments | dpo.Arguments | pretrain.Arguments | glue.Arguments
"""What was parsed for `hf-galore sft`, `dpo`, `pretrain` or `glue`: each has `training`, `recipe`, `make_trainer()`."""


def parse(arguments: Sequence[str], prog: str, about: str) -> Arguments:
    """Read the arguments of the command that a recipe is for, where nothing is to be trained by this process.

    Without a GPU transformers refuses bf16, unless it is told that a CPU is meant. That comes last, after what anybody
    else may have said about `use_cpu`.

    Args:
        arguments: `--config FILE --key value ...`.
        prog: the command that asks, for its help.
        about: what it does, for its help.

    Raises:
        UserError: something that was given is wrong.
        SystemExit: `--help` was among them and has been shown.
    """
    command = command_for(arguments)
    everything = [*arguments, *([] if torch.cuda.is_available() else ["--use_cpu", "true"])]
    if command == "pretrain":
        return pretrain.parse(everything, prog, about)
    if command == "glue":
        return glue.parse(everything, prog, about)
    if command == "dpo":
        return dpo.parse(everything, prog, about)
    return sft.parse(everything, prog, about)
