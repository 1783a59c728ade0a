"""From a model and `optim_target_modules` to the parameters that are projected."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ..config import GaLoreConfig
from ..lowrank.matrices import ViewAs, matrix_shape
from ..lowrank.projection import is_projectable
from .target_mistakes import ALL_LINEAR, explain_no_match, explain_nothing_linear, explain_too_small
from .weights import DEPTHWISE, Weight, computed_layers, head_modules, is_lora, unique, weights_of

__all__ = ["ALL_LINEAR", "Targets", "find_targets", "is_all_linear"]


@dataclasses.dataclass(frozen=True)
class Targets:
    """The weights that are projected, and what matched and is not, by their names: the module's, or their own."""

    projected: dict[str, Tensor]
    too_small: dict[str, Tensor]
    computed: tuple[str, ...] = ()
    """The layers that matched, but have no weight of their own: `computed_layers`."""
    views: dict[str, ViewAs] = dataclasses.field(default_factory=dict)
    """`view_as` of those projected whose elements make matrices in another way than is usual for their dimensions."""
    depthwise: tuple[str, ...] = ()
    """Convolutions that matched, but have a filter of its own for each channel: no matrix."""
    sharded: tuple[str, ...] = ()
    """Stacks and convolutions that matched, but are sharded by FSDP2."""

    def lora_adapters(self) -> list[str]:
        """Those of the projected that are adapters of LoRA."""
        return [name for name in self.projected if is_lora(name)]

    def matrices(self) -> list[tuple[int, ...]]:
        """What each of the projected is projected as: (m, n), or (k, m, n) for a stack of k."""
        return [matrix_shape(weight.shape, self.views.get(name)) for name, weight in self.projected.items()]


def find_targets(model: nn.Module, target_modules: Any, config: GaLoreConfig) -> Targets:
    """The trainable weights of `model` that `target_modules` names: of linear maps, and where it is meant of others.

    Linear maps are the weights of `nn.Linear`, transformers' `Conv1D` (GPT-2), `nn.Bilinear` and convolutions, by
    their modules' names; and by their own experts, bare routers, and those of `nn.LSTM`, `nn.GRU`, `nn.RNN` and
    `nn.MultiheadAttention`. An embedding, or another parameter that is a matrix (a table of positions), is a target
    only where an entry matches it and no linear map, such as `embed_tokens`. A weight shared by several modules appears
    once. A weight that is computed from other parameters (weight norm and the like), a depthwise convolution, and a
    stack or a convolution that FSDP2 has sharded are no targets: those train full-rank.

    Args:
        model: the model.
        target_modules: as in `TrainingArguments.optim_target_modules`. A string is a regular expression that has to
            match a whole name, or "all-linear": every linear map but the output head. A list holds substrings of
            names, whole names or regular expressions, and may have "all-linear" among them.
        config: its rank decides which weights are too small to be projected.

    Raises:
        TypeError: `target_modules` is neither a string nor a list of strings.
        ValueError: it, or an entry of it, selects no trainable weight, or none that is large enough.
    """
    weights = [weight for weight in weights_of(model) if weight.role != "none" or weight.kind == DEPTHWISE]
    trainable = [weight for weight in weights if weight.param.requires_grad]
    maps = [weight for weight in trainable if weight.role != "by name"]
    computed = list(computed_layers(model))
    names: set[str] = set()
    computed_names: set[str] = set()
    for entry, matches in _entries(target_modules).items():
        if is_all_linear(entry):
            matched = [weight for weight in maps if not weight.in_head]
            in_head = head_modules(model)
            of_entry = [name for name in computed if id(model.get_submodule(name)) not in in_head]
            if not any(map(_can_be_projected, matched)):
                raise ValueError(explain_nothing_linear(model, matched, of_entry))
        else:
            matched = [weight for weight in maps if matches(weight.name)]
            of_entry = [name for name in computed if matches(name)]
            # What an entry means are others only if it matches no linear map, even one that cannot be projected.
            if not matched and not of_entry:
                matched = [weight for weight in trainable if weight.role == "by name" and matches(weight.name)]
            if not any(map(_can_be_projected, matched)):
                is_regex = isinstance(target_modules, str)
                raise ValueError(explain_no_match(entry, matches, model, weights, matched, of_entry, is_regex))
        names.update(weight.name for weight in matched)
        computed_names.update(of_entry)
    chosen = [weight for weight in trainable if weight.name in names]

    targets = unique(filter(_can_be_projected, chosen))
    projected = [weight for weight in targets if is_projectable(_shape(weight), config.rank)]
    if not projected:
        raise ValueError(explain_too_small({weight.name: _shape(weight) for weight in targets}, config.rank))
    return Targets(
        {weight.name: weight.param for weight in projected},
        {weight.name: weight.param for weight in targets if weight not in projected},
        tuple(name for name in computed if name in computed_names),
        {weight.name: weight.view_as for weight in projected if weight.view_as is not None},
        tuple(weight.name for weight in unique(chosen) if weight.kind == DEPTHWISE),
        tuple(weight.name for weight in unique(chosen) if weight.is_left_sharded),
    )


def _can_be_projected(weight: Weight) -> bool:
    return weight.role != "none" and not weight.is_left_sharded


def _shape(weight: Weight) -> tuple[int, ...]:
    return matrix_shape(weight.param.shape, weight.view_as)


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
