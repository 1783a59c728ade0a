"""From a model and `optim_target_modules` to the parameters that are projected."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..config import GaLoreConfig
from ..log import and_others
from ..lowrank.projection import is_projectable

ALL_LINEAR = "all-linear"


@dataclasses.dataclass(frozen=True)
class Targets:
    """The weights that are projected, and those that matched but are too small to be, by their modules' names."""

    projected: dict[str, Tensor]
    too_small: dict[str, Tensor]
    computed: tuple[str, ...] = ()
    """The layers that matched, but have no weight of their own: see `_is_computed`."""

    def lora_adapters(self) -> list[str]:
        """Those of the projected that are adapters of LoRA."""
        return [name for name in self.projected if _is_lora(name)]


def find_targets(model: nn.Module, target_modules: Any, config: GaLoreConfig) -> Targets:
    """The trainable weights of the linear layers of `model` that `target_modules` names, and of embeddings.

    Linear layers are `nn.Linear` and transformers' `Conv1D` (GPT-2). An embedding is a target only where an entry
    matches embeddings and no linear layer, such as `embed_tokens`. A weight shared by several modules appears once. A
    weight that is computed from other parameters (weight norm and the like) is no target: those train full-rank.

    Args:
        model: the model.
        target_modules: as in `TrainingArguments.optim_target_modules`. A string is a regular expression that has to
            match a module's whole name, or "all-linear": every linear layer but the output head. A list holds
            substrings of names, whole names or regular expressions.
        config: its rank decides which weights are too small to be projected.

    Raises:
        TypeError: `target_modules` is neither a string nor a list of strings.
        ValueError: it, or an entry of it, selects no trainable layer, or none that is large enough.
    """
    linear = {name: module for name, module in model.named_modules() if _is_linear(module)}
    trainable = {name: module for name, module in linear.items() if _weight(module).requires_grad}
    computed = [name for name, module in model.named_modules() if _is_computed(module) and _is_trainable(module)]
    names: Iterable[str]
    if is_all_linear(target_modules):
        in_head = _head_modules(model)
        names = [name for name, module in trainable.items() if id(module) not in in_head]
        computed = [name for name in computed if id(model.get_submodule(name)) not in in_head]
        if not names:
            others = f" It has some {_COMPUTED} ({_shown(computed)}), which cannot be projected." if computed else ""
            raise ValueError(
                f"optim_target_modules is {ALL_LINEAR!r}, but {type(model).__name__} has no trainable linear layer "
                f"besides its output head.{others}"
            )
    else:
        entries = _entries(target_modules)
        embeddings = {name: module for name, module in _embeddings(model) if _weight(module).requires_grad}
        chosen: set[str] = set()
        for entry, matches in entries.items():
            matched = [name for name in trainable if matches(name)]
            # What an entry means are embeddings only if it matches no linear layer, even one without its own weight.
            if not matched and not any(matches(name) for name in computed):
                matched = [name for name in embeddings if matches(name)]
            if not matched:
                raise ValueError(
                    _explain_no_match(entry, matches, model, linear, computed, isinstance(target_modules, str))
                )
            chosen.update(matched)
        computed = [name for name in computed if any(matches(name) for matches in entries.values())]
        trainable = {name: module for name, module in model.named_modules() if name in chosen}
        names = list(trainable)

    unique = {id(_weight(trainable[name])): name for name in reversed(list(names))}
    weights = {name: _weight(trainable[name]) for name in names if unique[id(_weight(trainable[name]))] == name}
    projected = {name: weight for name, weight in weights.items() if is_projectable(weight.shape, config.rank)}
    if not projected:
        raise ValueError(_explain_too_small(weights, config.rank))
    too_small = {name: weight for name, weight in weights.items() if name not in projected}
    return Targets(projected, too_small, tuple(computed))


def _explain_too_small(weights: dict[str, Tensor], rank: int) -> str:
    largest = max((min(weight.shape) for weight in weights.values()), default=0)
    if weights and all(map(_is_lora, weights)):
        advice = (
            "They are the adapters of LoRA, whose optimizer state is small as it is: train them with "
            "optim='adamw_torch', or train the model itself without LoRA."
        )
    elif largest > 1:
        advice = f"Give a rank of at most {largest - 1}."
    else:
        advice = "Matrices of one row or column have no low-rank gradient: name larger ones."
    return (
        f"GaLore's rank {rank} is not below the smaller side of any of the {len(weights)} target(s) (at most "
        f"{largest}), so nothing would be projected. {advice}"
    )


def is_all_linear(target_modules: Any) -> bool:
    """Whether `target_modules` asks for every linear layer; a list of that one word counts."""
    if isinstance(target_modules, (list, tuple)) and len(target_modules) == 1:
        target_modules = target_modules[0]
    return isinstance(target_modules, str) and target_modules.replace("_", "-") == ALL_LINEAR


def _entries(target_modules: Any) -> dict[str, Callable[[str], bool]]:
    """Each entry with its matching rule, that of transformers' `check_target_module_exists`."""
    if isinstance(target_modules, str):
        try:
            pattern = re.compile(target_modules)
        except (re.error, OverflowError) as error:
            raise ValueError(
                f"optim_target_modules {target_modules!r} is not a valid regular expression: {error}. A string is "
                "one; for parts of module names give a list, such as ['attn', 'mlp']."
            ) from None
        return {target_modules: lambda name: pattern.fullmatch(name) is not None}
    if not isinstance(target_modules, (list, tuple)) or not all(isinstance(e, str) for e in target_modules):
        raise TypeError(
            "optim_target_modules has to be a string or a list of strings, such as ['attn', 'mlp'] or 'all-linear', "
            f"but is {target_modules!r}."
        )
    if not target_modules or not all(target_modules):
        raise ValueError(
            f"optim_target_modules is {target_modules!r}: name at least one module, such as ['attn', 'mlp'], or give "
            "'all-linear'. An empty name would match everything."
        )
    return {entry: _list_rule(entry) for entry in target_modules}


def _list_rule(entry: str) -> Callable[[str], bool]:
    try:
        pattern = re.compile(entry)
    except (re.error, OverflowError):  # still a substring, such as 'layers.0.('
        return lambda name: entry in name
    return lambda name: entry in name or pattern.fullmatch(name) is not None


def _explain_no_match(
    entry: str,
    matches: Callable[[str], bool],
    model: nn.Module,
    linear: dict[str, nn.Module],
    computed: list[str],
    is_regex: bool,
) -> str:
    start = f"optim_target_modules: {entry!r} matches no trainable linear layer of {type(model).__name__}."
    without_weight = [name for name in computed if matches(name)]
    if without_weight:
        return (
            f"{start} It matches only layers {_COMPUTED}: {_shown(without_weight)}. Such a weight cannot be projected; "
            "what it is computed from trains full-rank. Leave it out, or take the parametrization off the layer."
        )
    if any(matches(name) for name in (*linear, *dict(_embeddings(model)))):
        if any(_is_lora(name) for name, _ in model.named_parameters()):
            return (
                f"{start} It matches what LoRA has frozen. Train its adapters with optim='adamw_torch', without "
                "optim_target_modules and optim_args; or train the model itself without LoRA (in a recipe without "
                "use_peft)."
            )
        return f"{start} It matches frozen ones: unfreeze them, or leave it out."
    others = sorted({type(module).__name__ for name, module in model.named_modules() if name and matches(name)})
    if others:
        return f"{start} It matches only modules of other kinds ({', '.join(others)}), which cannot be projected."
    if is_regex:
        return (
            f"{start} A string is a regular expression that has to match a module's whole name, such as "
            f"{_example(list(linear))!r}; for parts of names give a list: [{entry!r}]."
        )
    parts = sorted({part for name in linear for part in name.split(".") if not part.isdigit()})
    # By parts of parts as well: entries are substrings, and 'atn' is meant to be the end of 'self_attn'.
    pieces = {piece: part for part in parts for piece in (*part.split("_"), part)}
    near = list(dict.fromkeys(pieces[piece] for piece in difflib.get_close_matches(entry, sorted(pieces), n=3)))
    hint = f"Did you mean {' or '.join(repr(n) for n in near)}?" if near else f"Names in it: {', '.join(parts)}."
    return f"{start} {hint}"


def _example(names: Sequence[str]) -> str:
    return names[0] if names else "model.layers.0.mlp.up_proj"


def _is_linear(module: nn.Module) -> bool:
    # A quantised layer has a weight that no optimizer can train.
    is_linear = isinstance(module, (nn.Linear, Conv1D)) and _owns_weight(module)
    return is_linear and _weight(module).is_floating_point()


def _owns_weight(module: nn.Module) -> bool:
    return isinstance(module._parameters.get("weight"), Tensor)


# What `torch.nn.utils.parametrizations`, the older `weight_norm` and `spectral_norm`, and `prune` make of a layer: its
# weight is made anew for each forward pass, and no optimizer sees it.
_COMPUTED = "whose weight is computed from other parameters (weight_norm, spectral_norm, orthogonal, pruning)"


def _is_computed(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, Conv1D)) and not _owns_weight(module)


def _is_trainable(module: nn.Module) -> bool:
    return any(param.requires_grad for param in module.parameters())


def _is_lora(name: str) -> bool:
    return any(part.startswith("lora_") for part in name.split("."))


def _head_modules(model: nn.Module) -> set[int]:
    """The output heads in `model`, with all that is inside them, by `id`.

    PEFT's `modules_to_save` and adapters put the head inside a wrapper; and the model itself may be in one that does
    not know of heads (a model with a value head, `torch.compile`).
    """
    inside: set[int] = set()
    for module in model.modules():
        get_head: Any = getattr(module, "get_output_embeddings", None)
        try:
            head = get_head() if get_head is not None else None
        except (AttributeError, NotImplementedError):  # it has none
            continue
        if isinstance(head, nn.Module):
            inside.update(id(part) for part in head.modules())
    return inside


def _weight(module: nn.Module) -> Tensor:
    return cast("Tensor", module.weight)


def embedding_weights(model: nn.Module) -> list[Tensor]:
    """The weights of the embedding layers of `model`."""
    return [_weight(module) for _, module in _embeddings(model)]


def _embeddings(model: nn.Module) -> Iterable[tuple[str, nn.Module]]:
    return (
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and _owns_weight(module)
    )


def summarize(model: nn.Module, targets: Targets, config: GaLoreConfig) -> str:
    """One line: how many parameters are projected and at what rank, how many train full-rank."""
    trainable = [param for param in model.parameters() if param.requires_grad]
    projected = {id(weight) for weight in targets.projected.values()}
    full_rank = [param for param in trainable if id(param) not in projected]
    line = (
        f"GaLore projects {len(projected)} matrices ({_elements(targets.projected.values())} parameters) at rank "
        f"{config.rank}; {len(full_rank)} tensors ({_elements(full_rank)} parameters) train full-rank"
    )
    if targets.too_small:
        line += f", among them targets with no side above the rank: {_shown(list(targets.too_small))}"
    if targets.computed:
        line += f", among them those of layers {_COMPUTED}: {_shown(targets.computed)}"
    return line + "."


def _shown(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + and_others(len(names) - 8, "more")


def _elements(tensors: Iterable[Tensor]) -> str:
    count = float(sum(tensor.numel() for tensor in tensors))
    for unit in ("", "K", "M"):
        if count < 1000:
            return f"{count:.4g}{unit}"
        count /= 1000
    return f"{count:.4g}B"
