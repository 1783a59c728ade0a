"""Saving and loading an optimizer's state: bit for bit, into the tensors that are there, or not at all."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .bases import ON_HOST
from .groups import check_fits, check_plain_state, check_same_names, check_same_options
from .trained import Trained

if TYPE_CHECKING:
    from .optimizer import GaLoreOptimizer

FORMAT_KEY, FORMAT = "hf_galore_format", 1
"""The version of what is saved, which stands beside `state` and `param_groups`; checkpoints without one are of 1."""

Copy = tuple[Trained, str, Tensor]
"""A parameter, a key of its state, and what to put there."""


@contextlib.contextmanager
def saving(optimizer: GaLoreOptimizer) -> Iterator[None]:
    """Let `state_dict()` of torch's optimizer, within, give what a checkpoint is to have.

    The gradients of a window that has not had its step are not saved, and so its refreshes are to come: the state is
    as it was before them. Updates that only the device knew to be skipped are counted, for which the host waits.
    """
    optimizer.skipped_updates()

    def complete(_: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
        saved[FORMAT_KEY] = FORMAT
        for trained in optimizer.trained_parameters():
            before = None if optimizer.hooks is None else optimizer.hooks.before(trained.param)
            if trained.index in saved["state"]:
                undone = before is not None and before.complete
                state = before.restored(trained.state) if before is not None and undone else trained.present_state
                saved["state"][trained.index] = trained.to_saved(state)

    # The first of the hooks on it: others see what is saved.
    handle = optimizer.register_state_dict_post_hook(complete, prepend=True)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def loading(optimizer: GaLoreOptimizer) -> Iterator[None]:
    """Let `load_state_dict()` of torch's optimizer, within, load bit for bit, and nothing of what does not fit.

    Torch would cast every floating-point tensor to the dtype of its parameter: float32 moments of bfloat16 weights
    would lose their lower half.
    """
    optimizer.skipped_updates()  # of the state that is there, not of the one to come
    copies: list[Copy] = []
    state = optimizer.state

    def check(_: torch.optim.Optimizer, loaded: dict[str, Any]) -> dict[str, Any]:
        copies.extend(_checked(optimizer, loaded))
        groups = [_seeded(*pair) for pair in zip(optimizer.param_groups, loaded["param_groups"], strict=True)]
        return {**loaded, "param_groups": groups, "state": {}}  # the state is what torch would cast

    def fill(_: torch.optim.Optimizer) -> None:
        optimizer.state = state
        for target in optimizer.targets():
            target.forget_version()
        _fill(copies)

    # Among the hooks of others: theirs before loading change what is checked, and theirs after see it loaded.
    handles = [
        optimizer.register_load_state_dict_pre_hook(check),
        optimizer.register_load_state_dict_post_hook(fill, prepend=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _seeded(group: Mapping[str, Any], saved: dict[str, Any]) -> dict[str, Any]:
    """A saved group with the seed that weights in 8 bits need, which a run with others has not written."""
    return {"rounding_seed": group["rounding_seed"], **saved} if "rounding_seed" in group else saved


def _checked(optimizer: GaLoreOptimizer, saved: Mapping[str, Any]) -> Iterator[Copy]:
    """What a state dict has for each parameter, if all of it is the optimizer's.

    Raises:
        ValueError: it is not; the message says what differs.
    """
    check_plain_state(saved)
    if saved.get(FORMAT_KEY, FORMAT) > FORMAT:
        raise ValueError(
            f"The checkpoint's optimizer state is of format {saved[FORMAT_KEY]}, and this hf_galore reads formats up "
            f"to {FORMAT}: a newer one wrote it. Resume with that, or a newer one still."
        )
    groups, saved_groups = optimizer.param_groups, saved["param_groups"]
    if [len(group["params"]) for group in groups] != [len(group["params"]) for group in saved_groups]:
        raise ValueError(
            "The checkpoint's optimizer state was made for other parameter groups: it has "
            f"{[len(g['params']) for g in saved_groups]} parameters in its groups, this optimizer has "
            f"{[len(g['params']) for g in groups]}. Resume with the optim, optim_target_modules and model of "
            "the run that wrote it, or start from its weights only."
        )
    for group, saved_group in zip(groups, saved_groups, strict=True):
        check_same_options(group, saved_group)
        check_same_names(group, saved_group)
        for param, index in zip(group["params"], saved_group["params"], strict=True):
            of_param = saved["state"].get(index, {})
            trained = optimizer.trained(param)
            _check_same_state(type(optimizer).__name__, trained, index, of_param)
            if of_param:
                yield from ((trained, key, value) for key, value in trained.of_saved(of_param).items())


def _check_same_state(cls_name: str, trained: Trained, index: int, saved: Mapping[str, Tensor]) -> None:
    present = trained.present_state
    if not saved and not present:
        return
    check_fits(trained.name, trained.param.shape, present, trained.new_state_on_meta())
    expected = trained.saved_shapes()
    found = {key: (tuple(value.shape), value.dtype) for key, value in saved.items()}
    if found == expected:
        return
    differing = sorted(key for key in {**found, **expected} if found.get(key) != expected.get(key))
    details = "; ".join(f"{key}: saved {found.get(key)}, needed {expected.get(key)}" for key in differing)
    raise ValueError(
        f"The checkpoint's optimizer state does not fit {cls_name} at parameter {index} of shape "
        f"{tuple(trained.param.shape)} ({details}). Resume with the optim and optim_args of the run that wrote it, or "
        "start from its weights only."
    )


def _fill(copies: list[Copy]) -> None:
    """Put what was loaded where the optimizer has it."""
    for trained, key, value in copies:
        current = trained.owner.state[trained.param]
        device = torch.device("cpu") if key in ON_HOST else trained.param.device
        if key in current and current[key].device == device:
            if current[key] is not value:
                current[key].copy_(value)
        else:  # the model has moved since the state was made, or the parameter was frozen then
            current[key] = value.to(device, copy=True)
