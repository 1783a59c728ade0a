"""From a model and `optim_target_modules` to the parameters that are projected."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .config import GaLoreConfig
from .projection import is_projectable

ALL_LINEAR = "all-linear"


@dataclasses.dataclass(frozen=True)
class Targets:
    """The weights that are projected, and those that matched but are too small to be, by their modules' names."""

    projected: dict[str, Tensor]
    too_small: dict[str, Tensor]


def find_targets(model: nn.Module, target_modules: Any, config: GaLoreConfig) -> Targets:
    """The trainable weights of the linear layers of `model` that `target_modules` names, and of embeddings.

    Linear layers are `nn.Linear` and transformers' `Conv1D` (GPT-2). An embedding is a target only where an entry
    matches embeddings and no linear layer, such as `embed_tokens`. A weight shared by several modules appears once.

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
    names: Iterable[str]
    if is_all_linear(target_modules):
        get_head = getattr(model, "get_output_embeddings", None)
        head = get_head() if get_head is not None else None
        names = [name for name, module in trainable.items() if module is not head]
        if not names:
            raise ValueError(
                f"optim_target_modules is {ALL_LINEAR!r}, but {type(model).__name__} has no trainable linear layer "
                "besides its output head."
            )
    else:
        entries = _entries(target_modules)
        embeddings = {name: module for name, module in _embeddings(model) if _weight(module).requires_grad}
        chosen: set[str] = set()
        for entry, matches in entries.items():
            matched = [name for name in trainable if matches(name)] or [name for name in embeddings if matches(name)]
            if not matched:
                raise ValueError(_explain_no_match(entry, matches, model, linear, isinstance(target_modules, str)))
            chosen.update(matched)
        trainable = {name: module for name, module in model.named_modules() if name in chosen}
        names = list(trainable)

    unique = {id(_weight(trainable[name])): name for name in reversed(list(names))}
    weights = {name: _weight(trainable[name]) for name in names if unique[id(_weight(trainable[name]))] == name}
    projected = {name: weight for name, weight in weights.items() if is_projectable(weight.shape, config.rank)}
    if not projected:
        largest = max(min(weight.shape) for weight in weights.values())
        raise ValueError(
            f"GaLore's rank {config.rank} is not below the smaller side of any of the {len(weights)} target(s) (at "
            f"most {largest}), so nothing would be projected. Give a rank of at most {largest - 1}."
        )
    too_small = {name: weight for name, weight in weights.items() if name not in projected}
    return Targets(projected, too_small)


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
    entry: str, matches: Callable[[str], bool], model: nn.Module, linear: dict[str, nn.Module], is_regex: bool
) -> str:
    start = f"optim_target_modules: {entry!r} matches no trainable linear layer of {type(model).__name__}."
    if any(matches(name) for name in (*linear, *dict(_embeddings(model)))):
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
    return isinstance(module, (nn.Linear, Conv1D)) and _weight(module).is_floating_point()


def _weight(module: nn.Module) -> Tensor:
    return cast("Tensor", module.weight)


def embedding_weights(model: nn.Module) -> list[Tensor]:
    """The weights of the embedding layers of `model`."""
    return [_weight(module) for _, module in _embeddings(model)]


def _embeddings(model: nn.Module) -> Iterable[tuple[str, nn.Module]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, nn.Embedding))


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
        names = list(targets.too_small)
        shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        line += f", among them targets with no side above the rank: {shown}"
    return line + "."


def _elements(tensors: Iterable[Tensor]) -> str:
    count = float(sum(tensor.numel() for tensor in tensors))
    for unit in ("", "K", "M"):
        if count < 1000:
            return f"{count:.4g}{unit}"
        count /= 1000
    return f"{count:.4g}B"
