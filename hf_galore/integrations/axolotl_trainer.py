"""axolotl's own configuration and trainer, made where there is no card, for plans; imported beside axolotl only."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import Any
from unittest import mock

import torch
import transformers.training_args
from transformers.trainer import Trainer

from .signatures import moved

# What a card that trains in bfloat16 can do, as axolotl asks: an RTX 4090. Memory does not depend on which one it is.
_CAPABILITIES = {"bf16": True, "fp8": False, "tf32": True, "compute_capability": "sm_89"}

# What is called or replaced, with the signatures that this was written for.
_CONFIG: dict[str, str] = {"gpu_capabilities": "()"}
_TRAIN: dict[str, str] = {"setup_model_and_trainer": "(cfg, dataset_meta)"}
_LIGER = ("liger_cross_entropy_kernel", "element_mul_kernel")
_META: dict[str, str] = {"__init__": "(self, train_dataset, eval_dataset=None, total_num_steps=None)"}


def moved_parts() -> list[str]:
    """What this axolotl no longer has as plans need it, in words; empty where all is well."""
    import liger_kernel.ops.fused_linear_cross_entropy as loss
    from axolotl import train
    from axolotl.cli import config
    from axolotl.common.datasets import TrainDatasetMeta
    from axolotl.loaders import model
    from axolotl.utils import config as checks

    found = moved(config, "axolotl.cli.config", _CONFIG) + moved(train, "axolotl.train", _TRAIN)
    found += moved(TrainDatasetMeta, "TrainDatasetMeta", _META)
    for owner, name in (
        (config, "load_cfg"),
        (checks, "is_torch_bf16_gpu_available"),
        (transformers.training_args, "is_torch_bf16_gpu_available"),
        (transformers.training_args, "is_torch_tf32_available"),
        (model, "get_device_count"),
        *((loss, name) for name in _LIGER),
    ):
        if not hasattr(owner, name):
            found.append(f"{owner.__name__}.{name} is gone")
    return found


def load_config(file: str, overrides: Mapping[str, Any]) -> Any:
    """Read and check a configuration as `axolotl train` does, as on a machine with a card.

    Args:
        file: its file.
        overrides: as axolotl's commands pass them on: `{"micro_batch_size": "2", "trl__beta": "0.1"}`.

    Raises:
        ValueError: axolotl, or a plugin, refuses it.
    """
    from axolotl.cli.config import load_cfg

    return load_cfg(file, **overrides)


def make_trainer(config: Any, train: Any, evaluated: Any, steps: int) -> Trainer:
    """Make the trainer that `axolotl train` makes, for tokenized data."""
    from axolotl.common.datasets import TrainDatasetMeta
    from axolotl.train import setup_model_and_trainer

    data = TrainDatasetMeta(train_dataset=train, eval_dataset=evaluated, total_num_steps=steps)
    trainer: Trainer = setup_model_and_trainer(config, data)[0]
    return trainer


@contextlib.contextmanager
def as_with_a_card() -> Iterator[None]:
    """Within, axolotl sees one card, and without any takes bfloat16 and TF32, as do `TrainingArguments`."""
    from axolotl.cli import config
    from axolotl.loaders import model
    from axolotl.utils import config as checks

    version = torch.__version__.partition("+")[0]
    found = {**_CAPABILITIES, "n_gpu": int(os.environ.get("WORLD_SIZE", "1"))}, {"torch_version": version}
    without: tuple[tuple[Any, str, Any], ...] = (
        (config, "gpu_capabilities", found),
        (checks, "is_torch_bf16_gpu_available", True),
        (transformers.training_args, "is_torch_bf16_gpu_available", True),
        (transformers.training_args, "is_torch_tf32_available", True),
    )
    with contextlib.ExitStack() as stack:
        for owner, name, answer in (
            (model, "get_device_count", 1),  # with several, axolotl lets the model's layers be anywhere
            *(() if torch.cuda.is_available() else without),
        ):
            stack.enter_context(mock.patch.object(owner, name, lambda answer=answer: answer))
        yield


@contextlib.contextmanager
def without_kernels_of_liger() -> Iterator[None]:
    """Within, Liger's fused loss goes without its Triton kernels, which fill what is there and allocate nothing."""
    import liger_kernel.ops.fused_linear_cross_entropy as loss

    with contextlib.ExitStack() as stack:
        for name in _LIGER:
            stack.enter_context(mock.patch.object(loss, name, _NoKernel()))
        yield


class _NoKernel:
    """Instead of a Triton kernel, which is called as `kernel[grid](...)`."""

    def __getitem__(self, grid: Any) -> Any:
        return lambda *args, **kwargs: None
