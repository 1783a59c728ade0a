"""All contact with the internals of `DistributedDataParallel`: what it reduces, and what the present pass is to it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

_IGNORED = "_ddp_params_and_buffers_to_ignore"

# What of it is used here, all of it private.
PARTS = (
    "_active_ddp_module",
    "_build_params_for_reducer",
    "_build_debug_param_to_name_mapping",
    "_ddp_init_helper",
)


not_compiled = torch._disable_dynamo  # type: ignore[attr-defined]
"""Decorates a function that torch.compile is to call and not to look into."""


def moved_parts() -> list[str]:
    """What this torch no longer has as it is needed here, in words; empty where all is well."""
    return [f"DistributedDataParallel.{part} is gone" for part in PARTS if not hasattr(DistributedDataParallel, part)]


def may_come() -> bool:
    """Whether models may be wrapped: torch.distributed runs."""
    return dist.is_available() and dist.is_initialized()


def trains_next() -> bool:
    """Whether a backward pass may follow the present forward pass."""
    return torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


def active() -> DistributedDataParallel | None:
    """The wrapper whose forward pass this is in, if any."""
    found: DistributedDataParallel | None = DistributedDataParallel._active_ddp_module
    return found


def inside(model: nn.Module) -> nn.Module:
    """The model in a wrapper, or the one given where it is none."""
    found: nn.Module = model.module if isinstance(model, DistributedDataParallel) else model
    return found


def reduces_next(wrapper: DistributedDataParallel) -> bool:
    """Whether the gradients of a pass that begins now are reduced: not within `no_sync()`."""
    return bool(wrapper.require_backward_grad_sync)


def tolerates_unused(wrapper: DistributedDataParallel) -> bool:
    """Whether parameters may have no gradient in a pass."""
    return bool(wrapper.find_unused_parameters or wrapper.static_graph)


def bucket_bytes(wrapper: DistributedDataParallel) -> int:
    """How many bytes are reduced at a time."""
    return int(wrapper.bucket_bytes_cap)


def group_like(wrapper: DistributedDataParallel) -> Any:
    """A group of a wrapper's processes, whose collectives keep an order of their own.

    In the wrapper's the two orders would have to be one, on all processes: they are not where some leave parameters
    unused. It gives up as early as the wrapper's. A collective of its processes.
    """
    group: Any = wrapper.process_group
    backend = group._get_backend(torch.device(wrapper.device_type))
    return dist.new_group(
        dist.get_process_group_ranks(group),
        timeout=getattr(getattr(backend, "options", None), "_timeout", None),  # not every backend has one
        backend=dist.get_backend(group),
        use_local_synchronization=True,
    )


def why_not(wrapper: DistributedDataParallel) -> str | None:
    """What a wrapper does that goes only with reducing all gradients, and the way out; `None` if there is nothing."""
    if wrapper.mixed_precision is not None:
        return "its mixed_precision has copies of the weights that it reduces. Use torch.autocast instead"
    if wrapper.__dict__.get("_comm_hooks"):
        return (
            "it has a communication hook, which low-rank gradients would not pass. Leave the hook out: low-rank "
            "gradients are small as they are"
        )
    if wrapper._join_config.enable:
        return (
            "processes with fewer batches than others (join()) answer to its own collectives only. Give all of them "
            "as many batches"
        )
    return None


class _Undo:
    """Undoes something once, by `remove()`."""

    def __init__(self, undo: Callable[[], None]) -> None:
        self._undo: Callable[[], None] | None = undo

    def remove(self) -> None:
        undo, self._undo = self._undo, None
        if undo is not None:
            undo()


class _TakingIn:
    """A forward pre-hook of a wrapper, or of what is in it: the wrapper reduces again what it has left out.

    It does so once, before a forward pass that a backward pass may follow: not before, as it takes room for all
    gradients of a model that may be trained no more.

    Args:
        names: of the parameters, in what is wrapped.
    """

    def __init__(self, names: frozenset[str]) -> None:
        self._names = names
        self._handle: Any = None

    @classmethod
    def put_on(cls, module: nn.Module, names: frozenset[str]) -> None:
        """Put it on a module."""
        hook = cls(names)
        hook._handle = module.register_forward_pre_hook(hook)

    def __call__(self, module: nn.Module, args: Any) -> None:
        if not self._names or not trains_next():
            return
        names, self._names = self._names, frozenset()
        if self._handle is not None:
            self._handle.remove()
        wrapper = module if isinstance(module, DistributedDataParallel) else active()
        if wrapper is not None and (wrapper is module or wrapper.module is module):
            _set_ignored(wrapper, set(wrapper.parameters_to_ignore) - names)

    def __reduce__(self) -> Any:
        return _TakingIn, (self._names,)


class Telling:
    """A wrapper's forward pre-hook that tells somebody of its passes; on a copy, which nobody knows, a `_TakingIn`.

    Args:
        tell: is told the wrapper before each forward pass that a backward pass may follow.
        names: of what it leaves out.
    """

    def __init__(self, tell: Callable[[DistributedDataParallel], None], names: frozenset[str]) -> None:
        self._tell = tell
        self._names = names

    def __call__(self, wrapper: nn.Module, args: Any) -> None:
        if trains_next():
            assert isinstance(wrapper, DistributedDataParallel)
            self._tell(wrapper)

    def __reduce__(self) -> Any:
        return _TakingIn, (self._names,)


def leave_out_of_next(model: nn.Module, params: Iterable[Tensor]) -> _Undo:
    """Let a wrapper that somebody is going to put around `model` leave parameters alone.

    Returns:
        What undoes that, by `remove()`.
    """
    present = set(getattr(model, _IGNORED, ()))
    names = frozenset(_names_of(model, params)) - present
    if names:
        setattr(model, _IGNORED, present | names)

    def undo() -> None:
        remaining = set(getattr(model, _IGNORED, ())) - names
        if remaining or present:
            setattr(model, _IGNORED, remaining)
        elif hasattr(model, _IGNORED):
            delattr(model, _IGNORED)
        if names:
            _TakingIn.put_on(model, names)  # the wrapper may be there, and known to nobody

    return _Undo(undo)


def left_out(wrapper: DistributedDataParallel) -> list[Tensor]:
    """The parameters to train that a wrapper does not reduce."""
    ignored = wrapper.parameters_to_ignore
    return [param for name, param in wrapper.module.named_parameters() if name in ignored and param.requires_grad]


def set_left_out(
    wrapper: DistributedDataParallel,
    out: Iterable[Tensor],
    of: Iterable[Tensor],
    tell: Callable[[DistributedDataParallel], None],
) -> _Undo:
    """Let a wrapper reduce all but some parameters.

    Args:
        wrapper: whose buckets are made anew, if need be.
        out: those that it is to leave alone.
        of: those that this is about, of which it is to reduce the others.
        tell: is told the wrapper before each forward pass from now on that a backward pass may follow.

    Returns:
        What lets it reduce them all from its next pass on, and tells no more, by `remove()`.
    """
    names = frozenset(_names_of(wrapper.module, out))
    others = set(_names_of(wrapper.module, of)) - names
    _set_ignored(wrapper, (set(wrapper.parameters_to_ignore) | names) - others)
    handle, ref = wrapper.register_forward_pre_hook(Telling(tell, names)), weakref.ref(wrapper)

    def undo() -> None:
        handle.remove()
        wrapper = ref()
        if wrapper is not None:
            _TakingIn.put_on(wrapper, names)

    return _Undo(undo)


def _set_ignored(wrapper: DistributedDataParallel, ignored: set[str]) -> None:
    if ignored == set(wrapper.parameters_to_ignore):
        return
    wrapper.parameters_to_ignore = ignored
    named = wrapper.module.named_parameters()
    wrapper._module_parameters = [param for name, param in named if name not in ignored]
    # As in its `__setstate__`. The reducer of before takes its hooks off when it goes.
    parameters, sparse = wrapper._build_params_for_reducer()
    names_of_all = wrapper._build_debug_param_to_name_mapping(parameters)
    wrapper._ddp_init_helper(parameters, sparse, names_of_all, wrapper.static_graph)
    wrapper._has_rebuilt_buckets = False
    if wrapper.static_graph:
        wrapper.static_graph = False  # or else it takes its reducer for one that knows
        wrapper._set_static_graph()


def _names_of(model: nn.Module, params: Iterable[Tensor]) -> list[str]:
    """All names of parameters: a tied one has several, and one of the top module two ways to write it."""
    wanted = {id(param) for param in params}
    found = [name for name, param in model.named_parameters(remove_duplicate=False) if id(param) in wanted]
    return found + [f".{name}" for name in found if "." not in name]
