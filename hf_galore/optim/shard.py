"""A parameter that FSDP2 has sharded (a DTensor), as this process sees it: its own rows, as a plain tensor.

`torch.distributed.tensor` takes a second to import, and is imported by nobody here before there is a DTensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from ..lowrank.ranks import Ranks


def is_sharded(param: Tensor) -> bool:
    """Whether a parameter is a DTensor."""
    return hasattr(param, "device_mesh")


def local_of(tensor: Tensor) -> Tensor:
    """What this process has of a DTensor; any other tensor as it is."""
    return cast("Tensor", tensor._local_tensor) if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def check_sharding(name: str, param: Tensor) -> None:
    """Check that a DTensor is sharded as FSDP2 does it: its first dimension, or the second of a matrix.

    Args:
        name: for the message.
        param: a DTensor.

    Raises:
        ValueError: it is divided otherwise; or it is on another device than the processes work on.
    """
    shard: Any = param
    mesh, placements = shard.device_mesh, shard.placements
    names = mesh.mesh_dim_names or ("",) * len(placements)
    divided = [i for i, placement in enumerate(placements) if not placement.is_replicate()]
    tensor_parallel = [names[i] for i in divided if names[i] in ("tp", "tensor", "tensor_parallel")]
    if tensor_parallel or len(divided) != 1:
        raise ValueError(
            f"GaLore trains parameters that FSDP2 divides over one dimension of a mesh, but {name} is {placements} on "
            f"a mesh of {tuple(names)}, as tensor parallelism makes it. Use fully_shard alone, on a mesh of data "
            "parallel processes (with a second dimension that replicates, if need be)."
        )
    (dim,) = divided
    allowed = (0, 1) if param.ndim == 2 else (0,)
    # A strided shard is what two kinds of parallelism make of one dimension.
    if type(placements[dim]).__name__ != "Shard" or placements[dim].dim not in allowed:
        raise ValueError(
            f"GaLore trains parameters that are divided along their first dimension, or matrices along their second, "
            f"but {name} of shape {tuple(param.shape)} is {placements[dim]}. Leave out shard_placement_fn, or let it "
            f"return one of {', '.join(f'Shard({i})' for i in allowed)}."
        )
    if param.device.type not in (mesh.device_type, "meta"):
        raise ValueError(
            f"GaLore does not work under FSDP2's CPU offload policy: {name} is on {param.device.type}, and its "
            f"processes work on {mesh.device_type}, where low-rank gradients are summed. Leave out offload_policy "
            "(fsdp_offload_params); GaLore's state takes little of the card."
        )


class Shard:
    """This process's part of a sharded parameter, which stands for it where gradients are looked for.

    Gradients keep to FSDP2's form: `.grad` of the parameter is a DTensor, to which FSDP2 adds in place. What is set
    here lies inside of it, so that others who take norms of it or scale it find what is linear in the gradient.

    Args:
        param: a DTensor that `check_sharding` allows.
    """

    def __init__(self, param: Any) -> None:
        self._param = param
        placements: Any = self._param.placements
        self._mesh_dim = next(i for i, placement in enumerate(placements) if not placement.is_replicate())
        self.dim: int = placements[self._mesh_dim].dim
        """The dimension that is divided."""
        self.ranks = Ranks(self._param.device_mesh.get_group(self._mesh_dim))

    @property
    def tensor(self) -> Tensor:
        """The part itself: what moves when it is updated."""
        return local_of(self._param)

    @property
    def grad(self) -> Tensor | None:
        """The gradient of the part, or what stands for it."""
        whole = self._param.grad
        return None if whole is None else local_of(whole)

    @grad.setter
    def grad(self, value: Tensor | None) -> None:
        if value is None:
            self._param.grad = None
        elif self._param.grad is None:
            from torch.distributed.tensor import DTensor

            # `from_local` would make views, which stand-ins have none of.
            self._param.grad = DTensor(value, self._param._spec, requires_grad=False)
        else:
            self._param.grad._local_tensor = value

    # What a stand-in for its gradient is made like.

    @property
    def shape(self) -> torch.Size:
        """Of the part."""
        return self.tensor.shape

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameter."""
        return self.tensor.dtype

    @property
    def device(self) -> torch.device:
        """Of the part."""
        return self.tensor.device

    def stride(self) -> Sequence[int]:
        """Of the part."""
        return self.tensor.stride()

    @property
    def _backward_hooks(self) -> Any:
        return self._param._backward_hooks

    # ---- checkpoints

    def as_dtensor(self, own: Tensor, rows: int) -> Tensor:
        """A DTensor of so many rows around those that this process has, which are not copied."""
        from torch.distributed.tensor import DTensor

        shape = torch.Size((rows, *own.shape[1:]))
        stride = torch.empty(shape, device="meta").stride()
        mesh, placements = self._param.device_mesh, self._row_placements()
        return DTensor.from_local(own, mesh, placements, run_check=False, shape=shape, stride=stride)

    def own_of(self, value: Tensor, rows: int) -> Tensor:
        """This process's rows of a DTensor, or of a whole tensor."""
        if not is_sharded(value):
            return value[self.ranks.own(rows)]
        whole: Any = value
        mesh, placements = self._param.device_mesh, self._row_placements()
        if whole.device_mesh != mesh or tuple(whole.placements) != tuple(placements):
            whole = whole.redistribute(mesh, placements)
        return local_of(whole)

    def _row_placements(self) -> list[Any]:
        from torch.distributed.tensor import Replicate
        from torch.distributed.tensor import Shard as ByRows

        count = len(self._param.placements)
        return [ByRows(0) if i == self._mesh_dim else Replicate() for i in range(count)]
