"""The memory of a recipe's training: `hf_galore.plan("recipes/x.yaml")`."""

from __future__ import annotations

import dataclasses
import os
import tempfile
import time
from collections.abc import Sequence

from ..integrations.trainer import registered
from ..plan.fakes import Target
from ..plan.planner import Look, MemoryPlan, plan, quiet
from ..plan.rehearsal import Progress
from . import any_recipe, stand_in
from .any_recipe import Arguments


def plan_recipe(
    recipe: Arguments | str | os.PathLike[str],
    *,
    overrides: Sequence[str] = (),
    vram: int | str | None = None,
    target: Target = "cuda",
    layers: int | None = None,
    progress: Progress | None = None,
    look: Look | None = None,
) -> MemoryPlan:
    """Find the memory of a recipe's training, without a GPU, weights or data.

    Args:
        recipe: its file, or what was parsed from one, which is of no use afterwards.
        overrides: for a file, `["--key", "value", ...]` as on the command line.
        vram: the card: a name or label (`"4090"`, `"24GB"`), its memory as text (`"23.5GiB"`) or in bytes; by default
            this machine's, if there is one.
        target: the device that the tensors stand for; `cpu` gives what the run takes on a CPU.
        layers: how many layers the model is to have, instead of its own number.
        progress: called with the phase and the number of the step.
        look: called with the Trainer after its steps, and with what was recorded of them.

    Raises:
        ValueError: something that was given is wrong; the message says what.
    """
    start = time.perf_counter()
    with quiet(), registered(), tempfile.TemporaryDirectory() as folder:
        if isinstance(recipe, (str, os.PathLike)):
            arguments = any_recipe.parse(["--config", os.fspath(recipe), *overrides], "plan", "")
        else:
            arguments = recipe
        arguments.training.output_dir = folder  # the Trainer makes it
        prepared = stand_in.prepare(arguments, layers)
        found = plan(prepared.make_trainer, vram=vram, target=target, progress=progress, look=look)
    return dataclasses.replace(
        found,
        seconds=time.perf_counter() - start,  # with the recipe's reading
        tokens_per_step=prepared.tokens_per_step,
        notes=(*found.notes, *prepared.notes),
    )
