"""Whether an optimizer hooks into the backward pass of its model, and how: by its keywords."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from ..backward.hooks import BackwardHooks
from ..backward.processes import world_size
from ..backward.shards import ShardHooks
from ..config import Exchange
from ..integrations.engines import will_shard
from ..integrations.fully_shard import check_sharded
from ..log import and_others, logger
from .groups import check_held_options
from .needs import all_need_gradients, check_needs
from .refreshes import share_when_wrapped
from .shard import is_sharded

if TYPE_CHECKING:
    from .optimizer import GaLoreOptimizer
    from .trained import Trained


class LateHooks(ShardHooks):
    """Hooks on parameters that are still to be sharded: they come on the model when those are there.

    A Trainer puts them on when it has prepared the model. In a loop of one's own the first step does.
    """

    _waits = True

    def attach(self) -> None:
        """Put the hooks on the model, if its parameters are sharded by now."""
        optimizer = self._optimizer()
        if optimizer is not None and all(trained.ranks for trained in optimizer.trained_parameters()):
            self._waits = False
            super().attach()

    def start_window(self, parameters: list[Trained]) -> None:
        """Begin the next window."""
        super().start_window(parameters)
        if self._waits:
            self.attach()

    def detach(self) -> None:
        """Take the hooks off the model, and wait no more."""
        super().detach()
        self._waits = False


def waits_for_shards(groups: Iterable[Mapping[str, Any]]) -> bool:
    """Whether the parameters that an optimizer is given are to be replaced by sharded ones.

    Args:
        groups: of parameters, alone or in pairs with their names.
    """
    if not will_shard():
        return False
    entries = (entry for group in groups for entry in group["params"])
    return not any(is_sharded(entry[1] if isinstance(entry, tuple) else entry) for entry in entries)


def hooks_for(
    optimizer: GaLoreOptimizer, model: nn.Module | None, options: Mapping[str, Any], *, waits: bool
) -> BackwardHooks | None:
    """The hooks that an optimizer's keywords ask for, on the model; `None` where they ask for none.

    Args:
        optimizer: the optimizer.
        model: `module`.
        options: the keywords, those of `GaLoreOptions`.
        waits: whether accelerate is to shard the parameters.

    Raises:
        ValueError: they do not go together, or there is no model.
    """
    layerwise: bool = options.get("layerwise", False)
    projected_backward: bool | None = options.get("projected_backward")
    sharded = any(is_sharded(param) for group in optimizer.param_groups for param in group["params"])
    if model is not None:
        check_sharded(model, {id(param) for group in optimizer.param_groups for param in group["params"]})
    if waits or sharded:
        _check_sharded(options)
    if sharded:
        _check_all_sharded(optimizer, layerwise=layerwise)
    parameters, is_asked = optimizer.trained_parameters(), projected_backward is not None
    hold_gradients: bool = options.get("hold_gradients", False)
    check_needs(
        parameters,
        layerwise=layerwise,
        hold_gradients=hold_gradients,
        projected_backward=bool(projected_backward),
        low_rank_exchange=options.get("exchange") == "low_rank",
    )
    if projected_backward is None:
        projected_backward = layerwise and options.get("exchange") != "dense" and not all_need_gradients(parameters)
    exchange = _exchange(options.get("exchange"), projected_backward=projected_backward)
    hooked = layerwise or projected_backward or exchange == "low_rank"
    check_held_options(optimizer.param_groups, hooked=hooked)
    if not hooked:
        if model is not None:
            share_when_wrapped(optimizer, model)
        return None
    kind: Callable[..., BackwardHooks] = BackwardHooks
    if waits or sharded:
        kind = functools.partial(LateHooks if waits else ShardHooks, may_fall_back=not is_asked)
    return kind(
        optimizer,
        _hooked(model, type(optimizer).__name__),
        layerwise=layerwise,
        projected_backward=projected_backward,
        hold_gradients=hold_gradients,
        exchange=exchange,
    )


def check_new_needs(optimizer: GaLoreOptimizer, hooks: BackwardHooks | None) -> None:
    """Check that a new group of an optimizer needs no gradients that its hooks have not.

    Args:
        optimizer: the optimizer, with the group.
        hooks: its hooks, if it has any.

    Raises:
        ValueError: it does.
    """
    if hooks is not None:
        check_needs(
            optimizer.trained_parameters(),
            layerwise=hooks.layerwise,
            hold_gradients=hooks.hold_gradients,
            projected_backward=hooks.projected_backward and not hooks.layerwise,
            low_rank_exchange=not hooks.layerwise and not hooks.projected_backward,
        )


def _check_sharded(options: Mapping[str, Any]) -> None:
    """Check what is asked for of sharded parameters.

    Raises:
        ValueError: it does not go with them.
    """
    if options.get("exchange") is not None:
        raise ValueError(
            f"exchange={options['exchange']!r} says what the processes of DistributedDataParallel reduce. FSDP2 "
            "reduces the gradients of what it shards by itself: leave it out."
        )


def _check_all_sharded(optimizer: GaLoreOptimizer, *, layerwise: bool) -> None:
    """Check that no parameter has a gradient of one process alone, beside others that are reduced; warn of it, else.

    Raises:
        ValueError: one has, and updates are to be made as soon as it is there.
    """
    params = [param for group in optimizer.param_groups for param in group["params"] if param.requires_grad]
    whole = [param for param in params if not is_sharded(param)]
    if not whole or world_size() == 1:
        return
    others = and_others(len(whole) - 1, "other parameter(s)")
    found = (
        f"FSDP2 shards other parameters, but not {optimizer.name_of(whole[0])}{others}: each process has a gradient "
        "from its own rows there, and nobody reduces it. Call fully_shard of the model itself too, after its layers"
    )
    if layerwise:
        raise ValueError(f"{found}, and leave nothing out (ignored_params); or make it with layerwise=False.")
    logger.warning("%s, or reduce these gradients yourself before each step.", found)


def _exchange(exchange: Exchange | None, *, projected_backward: bool) -> Exchange:
    """What processes reduce of a target.

    Raises:
        ValueError: gradients are to be reduced that a projected backward does not build.
    """
    if projected_backward and exchange == "dense":
        raise ValueError(
            "exchange='dense' reduces gradients, which a projected backward does not build. Leave exchange out, or "
            "make the optimizer with projected_backward=False."
        )
    return exchange or ("low_rank" if projected_backward else "dense")


def _hooked(model: nn.Module | None, cls_name: str) -> nn.Module:
    """The model whose backward pass an optimizer hooks into.

    Raises:
        ValueError: it was not given.
    """
    if model is None:
        raise ValueError(
            f"{cls_name} hooks into the backward pass of the model for layerwise=True, projected_backward=True and "
            "exchange='low_rank': pass it, module=model."
        )
    return model
