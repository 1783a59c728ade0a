"""Saving and loading an optimizer's state: bit for bit, into the tensors that are there, or not at all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from .bases import ON_HOST, Before
from .groups import check_plain_state, check_same_names, check_same_options, check_unchanged
from .target import Trained

FORMAT_KEY, FORMAT = "hf_galore_format", 1
"""The version of what is saved, which stands beside `state` and `param_groups`; checkpoints without one are of 1."""

Copy = tuple[Trained, str, Tensor]
"""A parameter, a key of its state, and what to put there."""


def without_windows(
    saved: dict[str, Any], parameters: list[Trained], before: Callable[[Tensor], Before | None]
) -> None:
    """Take the refreshes of windows that have not had their step out of a state dict, in place.

    The gradients of a window are not saved, and so its refreshes are to come.

    Args:
        saved: shares the tensors of the optimizer's state, which stay as they are.
        parameters: of the optimizer.
        before: the basis of a parameter before the refresh of its window, where there was one.
    """
    for trained in parameters:
        undone = before(trained.param)
        if undone is not None and undone.complete:
            saved["state"][trained.index] = undone.restored(trained.state)


def checked(
    cls_name: str, groups: list[dict[str, Any]], saved: Mapping[str, Any], parameter_of: Callable[[Tensor], Trained]
) -> Iterator[Copy]:
    """What a state dict has for each parameter, if all of it is the optimizer's.

    Args:
        cls_name: the optimizer's.
        groups: its parameter groups.
        saved: the state dict.
        parameter_of: gives what a tensor is to the optimizer.

    Raises:
        ValueError: it is not; the message says what differs.
    """
    check_plain_state(saved)
    if saved.get(FORMAT_KEY, FORMAT) > FORMAT:
        raise ValueError(
            f"The checkpoint's optimizer state is of format {saved[FORMAT_KEY]}, and this hf_galore reads formats up "
            f"to {FORMAT}: a newer one wrote it. Resume with that, or a newer one still."
        )
    saved_groups = saved["param_groups"]
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
            trained = parameter_of(param)
            _check_same_state(cls_name, trained, index, of_param)
            yield from ((trained, key, value) for key, value in of_param.items())


def _check_same_state(cls_name: str, trained: Trained, index: int, saved: Mapping[str, Tensor]) -> None:
    present = trained.present_state
    if not saved and not present:
        return
    with torch.device("meta"):
        needed = trained.made_now().new_state(trained.param.detach().to("meta"))
    check_unchanged(trained.name, trained.param.shape, present, needed)
    expected = {key: (tuple(value.shape), value.dtype) for key, value in needed.items()}
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


def fill(copies: list[Copy]) -> None:
    """Put what was loaded where the optimizer has it."""
    for trained, key, value in copies:
        current = trained.present_state
        device = torch.device("cpu") if key in ON_HOST else trained.param.device
        if key in current and current[key].device == device:
            if current[key] is not value:
                current[key].copy_(value)
        else:  # the model has moved since the state was made, or the parameter was frozen then
            current[key] = value.to(device, copy=True)
