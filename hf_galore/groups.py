"""Parameter groups: splitting and naming them, and whether two of them are of one run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from .config import GaLoreConfig
from .projection import is_projectable

Group = dict[str, Any]
ParamOptions = Mapping[Tensor, Mapping[str, Any]]


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


def with_names(groups: list[dict[str, Any]], names: Mapping[int, str]) -> list[dict[str, Any]]:
    """The groups with (name, parameter) pairs, where all names are known: torch keeps them in checkpoints.

    Without them moments could be loaded into other matrices of the same shapes.
    """
    params = [entry for group in groups for entry in group["params"]]
    if not all(isinstance(param, Tensor) and id(param) in names for param in params):
        return groups
    return [{**group, "params": [(names[id(param)], param) for param in group["params"]]} for group in groups]


def is_target(param: Tensor, group: Group) -> bool:
    """Whether a parameter of a group is projected."""
    return "rank" in group and is_projectable(param.shape, group["rank"])


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
        others = f", and {len(differing) - 1} more" if len(differing) > 1 else ""
        raise ValueError(
            f"The checkpoint's optimizer state is of other parameters: of {there} where this optimizer has {here}"
            f"{others}. Resume with the optim_target_modules and model of the run that wrote it, or start from its "
            "weights only."
        )


def check_same_options(group: Group, saved_group: Group) -> None:
    """Check that a saved group was made with the same of GaLore's options.

    Raises:
        ValueError: it was not; the message has both.
    """
    (own, own_rounding), (saved, saved_rounding) = (
        (GaLoreConfig.from_group(g), bool(g.get("stochastic_rounding"))) for g in (group, saved_group)
    )
    if (own, own_rounding) != (saved, saved_rounding):
        raise ValueError(
            f"The checkpoint was written with {_described(saved, saved_rounding)}, this optimizer was made with "
            f"{_described(own, own_rounding)}. A resumed run continues the old one: give it the same, or start a new "
            "one from the checkpoint's weights."
        )


def _described(config: GaLoreConfig | None, stochastic_rounding: bool) -> str:
    words = ["no projection"] if config is None else [f"{k}={v}" for k, v in config.group_options().items()]
    if stochastic_rounding:
        words.append("stochastic_rounding=True")
    return ", ".join(words)
