"""What torch's FSDP2 (`fully_shard`) has made of a model, and does to its gradients, which no public function tells.

Read in torch 2.13. `torch.distributed` is imported by whoever has sharded a model, and not here.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator
from typing import Any

from torch import Tensor, nn

_ORDINARY = ("DefaultReduceScatter", "ProcessGroupAllocReduceScatter", "SymmMemReduceScatter")


class Unit:
    """The parameters that FSDP2 gathers and reduces together.

    Args:
        group: a `torch.distributed.fsdp._fully_shard._fsdp_param_group.FSDPParamGroup`.
    """

    def __init__(self, group: Any) -> None:
        self._group = group

    def parameters(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Each sharded parameter, and what it has been gathered into, once it has."""
        for param in self._group.fsdp_params:
            yield param.sharded_param, getattr(param, "_unsharded_param", None)

    def divisor(self, processes: int) -> float:
        """What the sum of the processes' gradients is divided by: their number, unless a program has set another."""
        factor = self._group.gradient_divide_factor
        return float(processes if factor is None else factor)

    def own_reduction(self) -> str | None:
        """What a program has FSDP2 do to gradients that it reduces, besides, in words; `None` where it is nothing."""
        group = self._group
        if getattr(group, "_all_reduce_hook", None) is not None:
            return "set_all_reduce_hook changes gradients as FSDP2 reduces them"
        comm = getattr(group, "_reduce_scatter_comm", None)
        if comm is not None and type(comm).__name__ not in _ORDINARY:
            return "set_custom_reduce_scatter has gradients reduced otherwise"
        if getattr(group, "reduce_scatter_unused_params", False):
            return "set_reduce_scatter_unused_params lets each process leave out layers of its own"
        return None


def units(model: nn.Module) -> Iterator[Unit]:
    """The units of a model, none of one that is not sharded."""
    seen = set()
    modules: Iterator[Any] = model.modules()
    for module in modules:
        state = module._get_fsdp_state() if is_unit(type(module)) else None
        if state is None or id(state) in seen:
            continue
        seen.add(id(state))  # several modules may be one unit
        groups = getattr(state, "_fsdp_param_groups", None)
        if groups is None:  # before torch 2.13
            groups = [] if state._fsdp_param_group is None else [state._fsdp_param_group]
        yield from map(Unit, groups)


def is_unit(cls: type) -> bool:
    """Whether this is a class that FSDP2 has made of a module's, which follows behind its own."""
    return len(cls.__mro__) > 2 and cls.__bases__[0].__name__ == "FSDPModule"


def was(cls: type) -> type:
    """The class that a module had before FSDP2 made a unit of it, or that it has."""
    return cls.__mro__[2] if is_unit(cls) else cls


def as_unit(cls: type, of: type) -> type:
    """A class as FSDP2 makes it of another one.

    Args:
        cls: what it is to be made of.
        of: one that FSDP2 has made of a module's class, or another: then `cls` as it is.
    """
    if not is_unit(of):
        return cls
    return type(of.__name__, (of.__bases__[0], cls), {"__deepcopy__": of.__dict__["__deepcopy__"]})


def check_sharded(model: nn.Module, given: Container[int]) -> None:
    """Check that an optimizer has a model's shards, and not what they are gathered into for a pass.

    Args:
        given: the ids of its parameters.

    Raises:
        ValueError: a parameter is gathered at this moment.
    """
    gathered = {id(whole) for unit in units(model) for _, whole in unit.parameters() if whole is not None}
    for name, param in model.named_parameters():
        if id(param) in gathered and id(param) in given:
            raise ValueError(
                f"{name} is gathered at this moment, by a forward pass without a backward pass or by unshard(), and "
                "FSDP2 trains its shards: an optimizer of what is gathered would train nothing. Make the optimizer "
                "before the first forward pass, or call reshard() of the model, and of its layers, before."
            )


def check_not_sharded_since(model: nn.Module, given: Iterable[tuple[str, Tensor]]) -> None:
    """Check that a model was not sharded after its optimizer was made.

    Args:
        given: the optimizer's parameters, with the names that they have in the model.

    Raises:
        RuntimeError: it was.
    """
    present = dict(model.named_parameters(remove_duplicate=False))
    for name, param in given:
        if not hasattr(param, "device_mesh") and hasattr(present.get(name), "device_mesh"):
            raise RuntimeError(
                f"{name} was sharded after the optimizer had been made, which has the parameter that was there before, "
                "and would train nothing. Call fully_shard first, and make the optimizer after it (accelerator.prepare "
                "switches one over that it is given with the model)."
            )
