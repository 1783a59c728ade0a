"""Will it fit? The memory of a training run, found without a GPU, weights or data.

The package can be called: `hf_galore.plan(...)` is `hf_galore.plan.plan(...)`.

    plan = hf_galore.plan("recipes/llama2_7b_oasst2.yaml", vram="4090")
    plan = hf_galore.plan(lambda: SFTTrainer("meta-llama/Llama-2-7b-hf", args, train_dataset=data))
    print(plan)

`planner.py` plans a Trainer and knows no recipes; `hf_galore.recipes` plans those, and is imported when one is given.
"""

from __future__ import annotations

import inspect
import os
import sys
import types
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ..extras import require
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
    vram: int | str | None = None,
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
        vram: the card: a name or label (`"4090"`, `"24GB"`), its memory as text (`"23.5GiB"`) or in bytes; by default
            this machine's, if there is one.
        target: the device that the tensors stand for; `cpu` gives what the run takes on a CPU.
        layers: for a recipe, how many layers the model is to have, instead of its own number.
        progress: called with the phase and the number of the step.

    Raises:
        ValueError: something that was given is wrong; the message says what.
        MissingExtraError: a recipe was given, and TRL and what else reads recipes is not there.
    """
    if callable(source):
        if overrides or layers is not None:
            raise ValueError(
                "overrides and layers are for a recipe, but a function was given, whose Trainer is planned as it is. "
                "Make the Trainer with other arguments, or give a recipe's file."
            )
        return planner.plan(source, vram=vram, target=target, progress=progress)
    if not isinstance(source, (str, os.PathLike)) and not hasattr(source, "make_trainer"):
        raise ValueError(
            f"A plan is of a recipe's file, or of a function that makes a Trainer, but was given a "
            f"{type(source).__name__}: {source!r}."
        )
    if isinstance(overrides, str) or not all(isinstance(word, str) for word in overrides):
        raise ValueError(f"overrides is a list of texts, ['--max_length', '512'], but was given {overrides!r}.")
    if layers is not None and layers < 1:
        raise ValueError(f"layers has to be at least 1, but is {layers!r}.")
    require("cli", "The plan of a recipe")
    from ..recipes.planning import plan_recipe

    return plan_recipe(source, overrides=overrides, vram=vram, target=target, layers=layers, progress=progress)


class _Callable(types.ModuleType):
    """A module that is its own main function, so that importing it does not hide `hf_galore.plan(...)`."""

    def __call__(self, *args: Any, **kwargs: Any) -> MemoryPlan:
        return plan(*args, **kwargs)


_module: Any = sys.modules[__name__]
_module.__class__ = _Callable
_module.__signature__ = inspect.signature(plan)
