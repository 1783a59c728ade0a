"""What shards or flattens a model under an optimizer: how its parameters show it, and what to use instead.

Read in torch 2.13, accelerate 1.15 and DeepSpeed 0.19. An optimizer can be handed to any of them without a Trainer, and
sees them in three places: in accelerate's state when it is made; in its parameters, then or at a step; and in that
its groups hold others than it was given.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any, Protocol

from torch import Tensor, nn


class _Member(Protocol):
    """What an optimizer knows of one of its parameters."""

    param: Tensor

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def group(self) -> Any: ...


def supports_fsdp2() -> bool:
    """Whether FSDP2 is let through: parameters that `fully_shard` has made DTensors, accelerate's `fsdp_version` 2."""
    return True


def instead() -> str:
    """What to run in place of an engine that is refused, to end a sentence."""
    return f"run on one GPU, or under DDP{', or under FSDP2 (fsdp_version: 2)' if supports_fsdp2() else ''}"


DEEPSPEED = "DeepSpeed: ZeRO-1 and 2 hand an optimizer flat pieces of many weights, and ZeRO-3 shards each weight"
FSDP1 = "FSDP1, which flattens the weights of a layer into one vector"
TENSOR_PARALLEL = "tensor parallelism, where each process has a part of each matrix"


def holder_of(param: Tensor) -> str | None:
    """The engine that has put a parameter's numbers into parts of its own, in words; `None` where none has."""
    if hasattr(param, "ds_id"):
        return DEEPSPEED
    if getattr(param, "_fsdp_flattened", False):
        return FSDP1
    mesh = getattr(param, "device_mesh", None)  # a DTensor's, without importing torch.distributed.tensor
    if mesh is None:
        return None
    if "tp" in (mesh.mesh_dim_names or ()):  # as transformers and accelerate name it
        return TENSOR_PARALLEL
    return None if supports_fsdp2() else "FSDP2 or another that makes DTensors of parameters"


def refusal(asked: str, engine: str) -> ValueError:
    """The error that says that an optimizer does not work under an engine."""
    return ValueError(
        f"{asked} does not work under {engine}: no whole matrix is there to project. Instead {instead()}."
    )


def refusal_of_int8(asked: str, engine: str) -> ValueError:
    """The error that says that weights in 8 bits are not sharded."""
    return ValueError(
        f"{asked} has weights in 8 bits, which have to be whole, and does not work under {engine}. Run on one GPU, or "
        "under DDP; or load the model without weight_bits=8."
    )


def check_no_accelerator(asked: str) -> None:
    """Refuse the engines that accelerate hands an optimizer to, where an `Accelerator` for one has been made.

    With an optimizer that is offloaded accelerate would replace this one by DeepSpeed's Adam, without a word.

    Args:
        asked: the optimizer's class.

    Raises:
        ValueError: the process has an `Accelerator` for DeepSpeed or FSDP1.
    """
    module = sys.modules.get("accelerate.state")
    if module is None:
        return
    state = module.AcceleratorState._shared_state or {}
    kind = str(getattr(state.get("distributed_type"), "value", ""))
    if kind == "DEEPSPEED":
        raise refusal(asked, DEEPSPEED)
    if kind == "FSDP" and getattr(state.get("fsdp_plugin"), "fsdp_version", 1) != 2:
        raise refusal(asked, FSDP1)


def will_shard() -> bool:
    """Whether accelerate is going to shard the parameters that an optimizer is given now, by FSDP2."""
    module = sys.modules.get("accelerate.state")
    state = {} if module is None else module.AcceleratorState._shared_state or {}
    kind = str(getattr(state.get("distributed_type"), "value", ""))
    return kind == "FSDP" and getattr(state.get("fsdp_plugin"), "fsdp_version", 1) == 2


def check_whole(asked: str, members: Iterable[_Member]) -> None:
    """Refuse a step on parameters that an engine has replaced, flattened or emptied since the optimizer was made.

    Args:
        asked: the optimizer's class.
        members: its parameters. Looks at their shapes, and reads no numbers.

    Raises:
        ValueError: one is no longer what it was.
    """
    for member in members:
        param = member.param
        replaced = "rank" in member.group and param.ndim < 2  # a target's place, and no matrix in it
        if not replaced and param.shape == member.shape and type(param) is nn.Parameter:
            continue
        engine = holder_of(param)
        if engine is not None:
            raise refusal(asked, engine)
        if replaced:
            raise ValueError(
                f"{asked} was given matrices to project, and one of its groups now holds a tensor of shape "
                f"{tuple(param.shape)}: something has replaced its parameters, as DeepSpeed does with flat pieces of "
                f"them. No whole matrix is there to project. Instead {instead()}."
            )
