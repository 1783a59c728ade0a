"""Parameter groups: splitting and naming them, what may be in them, and whether two of them are of one run."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from ..config import GROUP_OPTIONS, NORM_PROBES, Exchange, GaLoreConfig, nearest
from ..int8 import is_int8
from ..log import and_others
from ..lowrank.matrices import matrix_shape
from ..lowrank.methods import METHODS
from ..lowrank.projection import is_projectable
from ..option import written

Group = dict[str, Any]
ParamOptions = Mapping[Tensor, Mapping[str, Any]]


class GaLoreOptions(TypedDict, total=False):
    """What every GaLore optimizer takes besides its hyperparameters, all by keyword."""

    param_options: ParamOptions | None
    """Group entries for single parameters (`{weight: {"rank": 128}}`): a group with such parameters is split. The way
    to project parameters of groups that somebody else has made."""
    module: nn.Module | None
    """The model that the parameters belong to: names them in messages; needed by the options below. (Not called
    `model`: a Trainer takes that from an optimizer's arguments.)"""
    layerwise: bool
    """Whether to update each weight during the backward pass, so that no two gradients are alive at a time."""
    projected_backward: bool | None
    """Whether linear layers compute their low-rank gradient without the gradient; by default as `layerwise`."""
    hold_gradients: bool
    """Whether layerwise holds low-rank gradients until `step()`, as clipping needs; an accumulation does so itself."""
    exchange: Exchange | None
    """What the processes of `DistributedDataParallel` reduce of a target: `low_rank` gradients, or `dense` ones; by
    default low-rank ones where the backward pass is projected."""
    stochastic_rounding: bool
    """Whether updates of bfloat16 weights are rounded stochastically, from torch's initial seed."""


def split_groups(params: Iterable[Any], options: ParamOptions) -> list[dict[str, Any]]:
    """Groups in which all parameters have the same options: those of each group, in the order given."""
    groups = list(params)
    if groups and not isinstance(groups[0], dict):
        groups = [{"params": groups}]
    split: list[dict[str, Any]] = []
    for group in groups:
        entries = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
        # Keyed by the options themselves: parameters with equal options share a group.
        parts: dict[tuple[tuple[str, Any], ...], list[Any]] = {}
        for entry in entries:
            param = entry[1] if isinstance(entry, tuple) else entry
            parts.setdefault(tuple(sorted(options.get(param, {}).items())), []).append(entry)
        # An empty group, such as a Trainer makes where nothing is undecayed, falls away: torch cannot name it.
        split.extend({**group, **dict(key), "params": part} for key, part in parts.items())
    if not split:
        raise ValueError("The optimizer was given no parameters.")
    return split


def with_seeds(group: dict[str, Any]) -> dict[str, Any]:
    """A group with the seeds of the random numbers that its options ask for: torch's initial seed, if it has none.

    They are in the group so that a resumed run goes on with the numbers of the first.
    """
    asked = {
        "rounding_seed": bool(group.get("stochastic_rounding")) or any(map(is_int8, _params_of(group))),
        "gradient_seed": group.get("gradient_bits") == 8,
        "basis_seed": "refresh" in group
        and (not METHODS[group["refresh"]].by_gradient or group.get("scaling", "none") != "none"),
    }
    return {**{key: torch.initial_seed() for key, needed in asked.items() if needed}, **group}


def _params_of(group: dict[str, Any]) -> list[Any]:
    """The parameters of a group as it is given: one, or a list of them, with names or without."""
    given = group.get("params", ())
    entries = [given] if isinstance(given, torch.Tensor) else given
    return [entry[1] if isinstance(entry, tuple) else entry for entry in entries]


def check_held_options(groups: Iterable[Group], *, hooked: bool) -> None:
    """Check that something is said of low-rank gradients, their bits and norm probes, only where there are any.

    Args:
        groups: of the optimizer.
        hooked: whether it has hooks into the backward pass.

    Raises:
        ValueError: it has none, so that there are gradients only, whole ones, until the step.
    """
    if hooked:
        return
    instead = (
        "Leave it out, or make the optimizer with layerwise=True or projected_backward=True (with a Trainer: an optim "
        "that ends in _layerwise, or projected_backward=true in optim_args)."
    )
    for group in groups:
        if group.get("gradient_bits") == 8:
            raise ValueError(
                "gradient_bits=8 is for low-rank gradients that are held until the step, and this optimizer gets whole "
                f"gradients, in their own dtype. {instead}"
            )
        probes = group.get("norm_probes", NORM_PROBES)
        if probes != NORM_PROBES:
            raise ValueError(
                f"norm_probes={probes} is for low-rank gradients, and this optimizer gets whole gradients, whose norm "
                f"is exact. {instead}"
            )


def is_target(param: Tensor, group: Group) -> bool:
    """Whether a parameter of a group is projected."""
    # Flat pieces, which engines put in the place of matrices, are none: who looks for those says so.
    return "rank" in group and param.ndim >= 2 and is_projectable(shape_in(param, group), group["rank"])


def shape_in(param: Tensor, group: Group) -> tuple[int, ...]:
    """The shape that a parameter of a group with a rank is projected in: m × n, or that of a stack of matrices."""
    return matrix_shape(param.shape, group.get("view_as"))


# Where an option belongs that is not a group's, by its name.
_NOT_IN_A_GROUP: dict[str, str] = {
    **dict.fromkeys(
        ("layerwise", "projected_backward", "hold_gradients", "exchange", "module", "param_options"),
        "It concerns the optimizer as a whole: give it by keyword, beside the groups, as in "
        "GaLoreAdamW(groups, lr=1e-3, module=model, layerwise=True).",
    ),
    "embedding_bits": "It is a key of optim_args; a group of GaLoreAdamW8bit says the same by 'optim_bits': 32 or 8.",
}
# What a misspelt key may have meant.
_KNOWN = (*GROUP_OPTIONS, "view_as", "stochastic_rounding", "optim_bits", "weight_decay")
# Nobody but GaLore has keys that begin so.
_OUR_PREFIXES = ("galore_", "proj_", "projection_", "update_proj")


def check_group_keys(group: Mapping[Any, Any]) -> None:
    """Check that a group has no key that is nearly one of GaLore's, or one that has no effect there.

    Any other key is allowed: schedulers, frameworks and users keep their own in groups (`initial_lr`, `lr_scale`,
    `name`, `momentum`).

    Raises:
        ValueError: it has; the message names the key that is meant, or where the option belongs.
    """
    if "view_as" in group and "rank" not in group:
        raise ValueError(
            "A parameter group sets view_as, which says how parameters are projected, but no rank. Add a rank, or drop "
            "it."
        )
    for key in group:
        if not isinstance(key, str) or key in _KNOWN:
            continue
        if key in _NOT_IN_A_GROUP:
            raise ValueError(f"A parameter group sets {key!r}, which has no effect there. {_NOT_IN_A_GROUP[key]}")
        name = key.lower().replace("-", "_")
        close = [option for option in _KNOWN if _nearly_same(name, option)]
        if close or name.startswith(_OUR_PREFIXES):
            (meant,) = difflib.get_close_matches(name.removeprefix("galore_"), close or GROUP_OPTIONS, n=1, cutoff=0.0)
            raise ValueError(
                f"A parameter group sets {key!r}, which GaLore does not know. Did you mean {meant!r}? It has "
                f"{', '.join(GROUP_OPTIONS)}."
            )


def _nearly_same(name: str, option: str) -> bool:
    """Whether a name is an option with a slip of the pen, one in a short name and two in a long one, or is parts of it.

    Ratios of `difflib` cannot tell `rnak` (for `rank`) from `lr_scale`, or `moment` from `momentum`.
    """
    parts = name.split("_")
    return _slips(name, option) <= (1 if len(option) < 8 else 2) or (
        len(parts) > 1 and set(parts) <= set(option.split("_"))
    )


def _slips(a: str, b: str) -> int:
    """Letters added, left out, changed, or swapped with their neighbour, on the shortest way from `a` to `b`."""
    before_last: list[int] = []
    last = list(range(len(b) + 1))
    for i, letter in enumerate(a, 1):
        row = [i]
        for j, other in enumerate(b, 1):
            best = min(last[j] + 1, row[j - 1] + 1, last[j - 1] + (letter != other))
            if i > 1 and j > 1 and letter == b[j - 2] and a[i - 2] == other:
                best = min(best, before_last[j - 2] + 1)
            row.append(best)
        before_last, last = last, row
    return last[-1]


def check_options(cls_name: str, options: Iterable[str], known: Sequence[str]) -> None:
    """Check the names of keyword arguments of a GaLore optimizer.

    Args:
        cls_name: the optimizer's.
        options: the keywords that were given.
        known: all that there are.

    Raises:
        TypeError: one is unknown; the message says what is nearest, or where it belongs.
    """
    for name in options:
        if name in known:
            continue
        if name in GROUP_OPTIONS:
            advice = (
                f"It belongs into a parameter group, {cls_name}([{{'params': others}}, {{'params': matrices, "
                f"'rank': 128}}]), or into param_options={{weight: {{'rank': 128}}}}."
            )
        elif name == "embedding_bits":
            advice = _NOT_IN_A_GROUP[name]
        else:
            advice = f"It has {', '.join(known)}.{nearest(name, [*known, *GROUP_OPTIONS])}"
        raise TypeError(f"{cls_name} has no keyword {name!r}. {advice}")


def check_same_names(group: Group, saved_group: Group) -> None:
    """Check that a saved group is of the same parameters.

    Raises:
        ValueError: it is not; the message names the first that differs.
    """
    # Wrappers (torch.compile, DistributedDataParallel) put these before a name.
    own, saved = (
        [name.replace("_orig_mod.", "").removeprefix("module.") for name in g.get("param_names", ())]
        for g in (group, saved_group)
    )
    differing = [pair for pair in zip(saved, own, strict=False) if pair[0] != pair[1]]
    if differing:
        there, here = differing[0]
        others = and_others(len(differing) - 1, "more", link=", and ")
        raise ValueError(
            f"The checkpoint's optimizer state is of other parameters: of {there} where this optimizer has {here}"
            f"{others}. Resume with the optim_target_modules and model of the run that wrote it, or start from its "
            "weights only."
        )


def check_same_options(group: Group, saved_group: Group) -> None:
    """Check that a saved group was made with the same of GaLore's options.

    Raises:
        ValueError: it was not; the message has those that differ.
    """
    own, saved = (_described(g) for g in (group, saved_group))
    if own != saved:
        there, here = (
            ", ".join(f"{k}={written(v)}" if k else v for k, v in one.items() if k not in other or other[k] != v)
            for one, other in ((saved, own), (own, saved))
        )
        raise ValueError(
            f"The checkpoint was written with {there}, this optimizer was made with {here}. A resumed run continues "
            "the old one: give it the same, or start a new one from the checkpoint's weights."
        )


FROM_WEIGHTS = (
    "To start from its weights, load the model with from_pretrained(<the checkpoint's folder>) and train without "
    "resume_from_checkpoint."
)
"""What is left to do with a checkpoint whose optimizer state is of no use."""


def check_plain_state(state_dict: Mapping[str, Any]) -> None:
    """Check that a state dict is an optimizer's whose state is tensors, as GaLore's is here.

    Raises:
        ValueError: it is not; the message says who wrote it, as far as that can be seen.
    """
    if not {"state", "param_groups"} <= set(state_dict):
        raise ValueError(
            f"This is no state dict of an optimizer: it has {', '.join(map(repr, state_dict)) or 'nothing'} where "
            "'state' and 'param_groups' are needed. Give what optimizer.state_dict() returned."
        )
    states, groups = state_dict["state"], state_dict["param_groups"]
    if any("projector" in state for state in states.values()):
        raise ValueError(written_by_galore_torch())
    if not states and len(groups) == 1 and len(groups[0]["params"]) == 1 and set(groups[0]) <= _DUMMY_KEYS:
        raise ValueError(
            "The checkpoint was written by a layerwise optimizer of transformers itself (its galore_*_layerwise or "
            f"apollo_*_layerwise), which saves no state of its own. {FROM_WEIGHTS}"
        )
    others = [
        f"{key!r} of parameter {index} is of type {type(value).__name__}"
        for index, state in states.items()
        for key, value in state.items()
        if not isinstance(value, Tensor)
    ]
    if others:
        raise ValueError(
            f"The checkpoint's optimizer state is another optimizer's: {others[0]}, where GaLore has tensors only. "
            f"Resume with the optim of the run that wrote it. {FROM_WEIGHTS}"
        )


# What a group of transformers' `LayerWiseDummyOptimizer` has.
_DUMMY_KEYS = {"params", "lr", "initial_lr"}


def written_by_galore_torch() -> str:
    """The message for state that a `galore_torch` optimizer has written."""
    return (
        "The checkpoint was written by the GaLore of galore_torch, which is what transformers itself has under the "
        "galore_* names. Its bases are Python objects in the optimizer's state, and cannot be taken over into "
        f"hf_galore. {FROM_WEIGHTS}"
    )


def check_fits(name: str, shape: Sequence[int], current: Mapping[str, Tensor], needed: Mapping[str, Any]) -> None:
    """Check that the state of a parameter is of the shape and the options that it has now.

    Args:
        name: the parameter's.
        shape: its shape now.
        current: its state; empty where there is none.
        needed: that state as it would be made now: tensors, or anything with a `shape`, by the same keys.

    Raises:
        ValueError: it is of others.
    """
    if not current:
        return
    found = {key: tuple(value.shape) for key, value in current.items()}
    differing = [key for key, value in needed.items() if found.get(key) != tuple(value.shape)]
    if not differing:
        return
    raise ValueError(
        f"{name} has changed since the optimizer was made: its shape is {tuple(shape)} now, and its moments were made "
        f"for another (resize_token_embeddings does that) or for other options of its group ({', '.join(differing)}). "
        "Change the model and its groups first, then make the optimizer or the Trainer."
    )


def _described(group: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a group by their keys; what has no key says that nothing is projected."""
    config = GaLoreConfig.from_group(group)
    found = {"": "no projection"} if config is None else config.group_options()
    return {**found, "stochastic_rounding": bool(group.get("stochastic_rounding"))}
