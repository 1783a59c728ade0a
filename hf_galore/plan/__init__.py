"""Will it fit? The memory of a training run, found without a GPU, weights or data.

The package can be called: `hf_galore.plan(...)` is `hf_galore.plan.plan(...)`.

    plan = hf_galore.plan("recipes/llama2_7b_oasst2.yaml", vram=24 * 2**30)
    plan = hf_galore.plan(lambda: SFTTrainer("meta-llama/Llama-2-7b-hf", args, train_dataset=data))
    print(plan)

`planner.py` plans a Trainer and knows no recipes; `hf_galore.recipes` plans those, and is imported when one is given.
"""

from __future__ import annotations

import os
import sys
import types
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from . import planner
from .planner import MemoryPlan, measure

if TYPE_CHECKING:
    from transformers import Trainer

    from ..recipes.any_recipe import Arguments
    from .fakes import Target
    from .rehearsal import Progress

__all__ = ["MemoryPlan", "measure", "plan"]


def plan(
    source: Callable[[], Trainer] | Arguments | str | os.PathLike[str],
    *,
    overrides: Sequence[str] = (),
    vram: int | None = None,
    target: Target = "cuda",
    layers: int | None = None,
    progress: Progress | None = None,
) -> MemoryPlan:
    """Find the memory of a training run, without a GPU, weights or data.

    While it runs, functions of torch, transformers and other libraries are replaced for the whole process: let no other
    thread use them.

    Args:
        source: a function that makes the Trainer, or a recipe's file, or what was parsed from one. The function is
            called where tensors are fake: a model that it makes, with or without `from_pretrained`, has no weights.
            The Trainer, and what was parsed, are of no use afterwards.
        overrides: for a recipe's file, `["--key", "value", ...]` as on the command line.
        vram: bytes of the card's memory; by default those of the GPU, if there is one.
        target: the device that the tensors stand for; `cpu` gives what the run takes on a CPU.
        layers: for a recipe, how many layers the model is to have, instead of its own number.
        progress: called with the phase and the number of the step.

    Raises:
        ValueError: something that was given is wrong; the message says what.
    """
    if callable(source):
        if overrides or layers is not None:
            raise ValueError(
                "overrides and layers are for a recipe, but a function was given, whose Trainer is planned as it is. "
                "Make the Trainer with other arguments, or give a recipe's file."
            )
        return planner.plan(source, vram=vram, target=target, progress=progress)
    from ..recipes.planning import plan_recipe

    return plan_recipe(source, overrides=overrides, vram=vram, target=target, layers=layers, progress=progress)


class _Callable(types.ModuleType):
    """A module that is its own main function, so that importing it does not hide `hf_galore.plan(...)`."""

    def __call__(self, *args: Any, **kwargs: Any) -> MemoryPlan:
        return plan(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
