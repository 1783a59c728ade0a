"""What is said where `optim_target_modules`, or an entry of it, selects nothing that can be projected."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence

from torch import nn

from ..log import and_others
from .weights import DEPTHWISE, EMBEDDINGS, VECTORS, Weight, is_lora, weights_of

ALL_LINEAR = "all-linear"

# What `torch.nn.utils.parametrizations`, the older `weight_norm` and `spectral_norm`, and `prune` make of a layer: its
# weight is made anew for each forward pass, and no optimizer sees it.
COMPUTED_FROM = "whose weight is computed from other parameters (weight_norm, spectral_norm, orthogonal, pruning)"


def explain_nothing_linear(model: nn.Module, chosen: Sequence[Weight], computed: Sequence[str]) -> str:
    """The message where "all-linear" selects nothing.

    Args:
        model: the model.
        chosen: what it selects that cannot be projected.
        computed: the layers without a weight of their own.
    """
    others = _left_alone(chosen)
    if computed:
        others = f"layers {COMPUTED_FROM} ({shown(computed)})"
    return (
        f"optim_target_modules is {ALL_LINEAR!r}, but {type(model).__name__} has no trainable linear layer (nor "
        "experts, convolutions, or weights of recurrence or attention) besides its output head."
        + (f" It has some {others}, which cannot be projected." if others else "")
        + _by_their_names(weights_of(model))
    )


def explain_too_small(shapes: Mapping[str, Sequence[int]], rank: int) -> str:
    """The message where no target has a side above the rank; shapes by names, of what is projected as matrices."""
    largest = max((min(shape[-2:]) for shape in shapes.values()), default=0)
    if shapes and all(map(is_lora, shapes)):
        advice = (
            "They are the adapters of LoRA, whose optimizer state is small as it is: train them with "
            "optim='adamw_torch', or train the model itself without LoRA."
        )
    elif largest > 1:
        advice = f"Give a rank of at most {largest - 1}."
    else:
        advice = "Matrices of one row or column have no low-rank gradient: name larger ones."
    return (
        f"GaLore's rank {rank} is not below the smaller side of any of the {len(shapes)} target(s) (at most "
        f"{largest}), so nothing would be projected. {advice}"
    )


def explain_no_match(
    entry: str,
    matches: Callable[[str], bool],
    model: nn.Module,
    weights: Sequence[Weight],
    matched: Sequence[Weight],
    computed: Sequence[str],
    is_regex: bool,
) -> str:
    """The message where an entry selects nothing that can be projected.

    Args:
        entry: as it was given.
        matches: its rule for names.
        model: the model.
        weights: all of its weights that have names, frozen ones too.
        matched: those trainable ones that it matches: none can be projected.
        computed: the layers without a weight of their own that it matches.
        is_regex: whether it is a regular expression for whole names.
    """
    start = f"optim_target_modules: {entry!r} matches no trainable matrix of {type(model).__name__}."
    if computed:
        return (
            f"{start} It matches only layers {COMPUTED_FROM}: {shown(computed)}. Such a weight cannot be "
            "projected; what it is computed from trains full-rank. Leave it out, or take the parametrization off the "
            "layer."
        )
    if matched:
        return f"{start} It matches only {_left_alone(matched)}, which train full-rank: leave it out."
    if any(matches(weight.name) for weight in weights):
        if any(is_lora(name) for name, _ in model.named_parameters()):
            return (
                f"{start} It matches what LoRA has frozen. Train its adapters with optim='adamw_torch', without "
                "optim_target_modules and optim_args; or train the model itself without LoRA (in a recipe without "
                "use_peft)."
            )
        return f"{start} It matches frozen ones: unfreeze them, or leave it out."
    modules = {name: module for name, module in model.named_modules() if name and matches(name)}
    inside = [weight.name for weight in weights if any(weight.name.startswith(f"{name}.") for name in modules)]
    if inside:
        return (
            f"{start} It matches modules, and the weights in them have names of their own, such as {inside[0]!r}: a "
            f"regular expression has to match the whole name. Give a list of parts of names, or put '.*' behind."
        )
    others = sorted({type(module).__name__ for module in modules.values()})
    if others:
        return f"{start} It matches only modules of other kinds ({', '.join(others)}), which cannot be projected."
    vectors = [weight.name for weight in weights_of(model) if weight.kind == VECTORS and matches(weight.name)]
    if vectors:
        return f"{start} It matches only norms, biases and other vectors ({shown(vectors)}), which cannot be projected."
    return f"{start} {_suggestion(entry, weights, is_regex)}"


def _left_alone(weights: Iterable[Weight]) -> str:
    """What these are that can be trained, but not projected."""
    depthwise = [weight.name for weight in weights if weight.kind == DEPTHWISE]
    sharded = [weight.name for weight in weights if weight.is_left_sharded]
    parts = []
    if depthwise:
        parts.append(f"depthwise convolutions, of one filter for each channel ({shown(depthwise)})")
    if sharded:
        parts.append(f"stacks and convolutions that are sharded by FSDP2 ({shown(sharded)})")
    return " and ".join(parts)


def _suggestion(entry: str, weights: Sequence[Weight], is_regex: bool) -> str:
    """What may have been meant by an entry that matches nothing."""
    maps = [weight.name for weight in weights if weight.role == "linear map"]
    names = f"Names in it: {', '.join(_parts(maps or [weight.name for weight in weights]))}."
    if is_regex:
        example = maps[0] if maps else "model.layers.0.mlp.up_proj"
        whole = f"A string is a regular expression that has to match a whole name, such as {example!r}"
        if any(entry in weight.name for weight in weights):
            return f"{whole}; for parts of names give a list: [{entry!r}]."
        return f"{whole}. {names}"
    # By parts of parts as well: entries are substrings, and 'atn' is meant to be the end of 'self_attn'.
    parts = _parts(weight.name for weight in weights)
    pieces = {piece.lower(): part for part in parts for piece in (*part.split("_"), part)}
    close = difflib.get_close_matches(entry.lower(), sorted(pieces), n=3)
    near = list(dict.fromkeys(pieces[piece] for piece in close))
    if near:
        return f"Did you mean {' or '.join(repr(n) for n in near)}?"
    return names + _by_their_names(weights)


def _by_their_names(weights: Iterable[Weight]) -> str:
    """A sentence on the matrices that only an entry of their own reaches, embeddings aside; nothing where none are."""
    names = [w.name for w in weights if w.role == "by name" and w.kind != EMBEDDINGS and w.param.requires_grad]
    return f" Other matrices, by their own names: {shown(names)}." if names else ""


def _parts(names: Iterable[str]) -> list[str]:
    return sorted({part for name in names for part in name.split(".") if part and not part.isdigit()})


def shown(names: Sequence[str]) -> str:
    """The first few of these names, and how many there are besides."""
    return ", ".join(names[:8]) + and_others(len(names) - 8, "more")
