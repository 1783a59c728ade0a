"""What is said of targets before the first step: how much is projected, and of what kinds the rest is."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from ..config import GaLoreConfig
from .target_mistakes import ALL_LINEAR, COMPUTED_FROM
from .target_modules import Targets, is_all_linear
from .weights import EMBEDDINGS, OTHERS, Weight, elements, unique, weights_of

MUCH = 0.2
"""The share of all trainable parameters from which on a warning says that no entry reaches them."""


def summarize(model: nn.Module, targets: Targets, config: GaLoreConfig) -> str:
    """One line: how many parameters are projected and at what rank, and of what kinds the rest is."""
    line = projection_line(model, targets.projected.values(), targets.matrices(), f"rank {config.rank}")
    for names, what in (
        (list(targets.too_small), "no side above the rank"),
        (targets.depthwise, "depthwise, with a filter for each channel and no matrix"),
        (targets.sharded, "stacks and convolutions that are sharded by FSDP2"),
        (targets.computed, f"layers {COMPUTED_FROM}"),
    ):
        if names:
            line += f"; {what}: {grouped(names)}"
    return f"{line}."


def projection_line(
    model: nn.Module, projected: Iterable[Tensor], matrices: Sequence[Sequence[int]], ranks: str
) -> str:
    """What is projected of the trainable parameters of a model, and of what kinds the rest is, without a full stop.

    Args:
        model: the model.
        projected: the parameters that are.
        matrices: the shape that each is projected in.
        ranks: at what rank, in words.
    """
    trainable = _trainable(model)
    chosen = {id(param) for param in projected}
    counts: Counter[str] = Counter()
    for weight in trainable:
        if id(weight.param) not in chosen:
            counts[weight.kind] += elements([weight])
    total = elements(trainable)
    done = total - sum(counts.values())
    line = f"GaLore projects {_matrices(matrices)} ({_rounded(done)} parameters, {_share(done, total)}) at {ranks}"
    rest = [f"{kind} {_share(count, total)}" for kind, count in counts.most_common()]
    return f"{line}; full-rank: {', '.join(rest)}" if rest else f"{line}; nothing trains full-rank"


def warning_of_unreached(model: nn.Module, target_modules: Any, targets: Targets, config: GaLoreConfig) -> str | None:
    """A warning where many of the trainable parameters are matrices that `target_modules` does not reach.

    Embeddings and the output head do not count: as full-rank as they are, they are so with "all-linear". Nor does what
    the rank is too large for.
    """
    trainable = _trainable(model)
    reached = {id(weight) for weights in (targets.projected, targets.too_small) for weight in weights.values()}
    missed = [
        weight
        for weight in trainable
        if id(weight.param) not in reached
        and weight.role != "none"
        and not weight.in_head
        and weight.kind != EMBEDDINGS
        and weight.is_projectable(config.rank)
    ]
    total = elements(trainable)
    if elements(missed) <= MUCH * total:
        return None
    start = f"{_share(elements(missed), total)} of the trainable parameters are matrices that train full-rank"
    # Alike but for the numbers of layers: what an entry reaches.
    alike: dict[str, list[Weight]] = {}
    for weight in missed:
        alike.setdefault(_pattern(weight.name), []).append(weight)
    first = max(max(alike.values(), key=elements), key=lambda weight: elements([weight]))
    largest = f"{first.name} ({' × '.join(map(str, first.param.shape))})"
    if first.is_left_sharded:
        return f"{start}, most of them because FSDP2 has sharded what is no single matrix, such as {largest}."
    entry = _entry_for(first, missed, [weight for weight in trainable if weight.role != "none"])
    if is_all_linear(target_modules):
        advice = f"give [{ALL_LINEAR!r}, {entry!r}]"
    elif first.kind == OTHERS:
        advice = f"add {entry!r}"
    else:
        advice = f"add {entry!r}, or give {ALL_LINEAR!r}"
    return (
        f"{start}, because no entry of optim_target_modules reaches them: most of all {first.kind}, such as {largest}. "
        f"To project these {advice}."
    )


def _trainable(model: nn.Module) -> list[Weight]:
    return unique(weight for weight in weights_of(model) if weight.param.requires_grad)


def _entry_for(first: Weight, missed: Sequence[Weight], matrices: Sequence[Weight]) -> str:
    """An entry for a list that reaches a weight, and as many as can be of its kind, but nothing that is not missed.

    Args:
        first: the weight.
        missed: what no entry reaches.
        matrices: all, those that are reached too.
    """
    parts = first.name.split(".")
    while len(parts) > 1 and parts[-1].isdigit():  # of a list: with its other elements
        parts.pop()
    ends = (".".join(parts[-count:]) for count in range(1, len(parts) + 1))
    own = next((end for end in ends if end != "weight"), first.name)
    missing = {id(weight.param) for weight in missed}
    others = [weight.name for weight in matrices if id(weight.param) not in missing]
    wider = [part for part in reversed(parts[:-1]) if not part.isdigit() and not any(part in name for name in others)]
    alike = [weight for weight in missed if weight.kind == first.kind]
    return max([own, *wider], key=lambda entry: elements([weight for weight in alike if entry in weight.name]))


def _matrices(shapes: Sequence[Sequence[int]]) -> str:
    """`32 matrices and 64 stacks of 128`."""
    sizes = [shape[0] for shape in shapes if len(shape) == 3 and shape[0] > 1]
    single = len(shapes) - len(sizes)
    matrices = "1 matrix" if single == 1 else f"{single} matrices"
    if not sizes:
        return matrices
    of = str(min(sizes)) if min(sizes) == max(sizes) else f"{min(sizes)} to {max(sizes)}"
    stacks = f"{len(sizes)} {'stack' if len(sizes) == 1 else 'stacks'} of {of}"
    return f"{matrices} and {stacks}" if single else f"{stacks} matrices"


def _share(count: int, total: int) -> str:
    percent = 100 * count / max(total, 1)
    if count < total and percent >= 99.95:
        return "over 99.9 %"
    if percent >= 0.095:
        return f"{percent:.1f} %"
    return f"{percent:.2f} %" if percent >= 0.005 else "under 0.01 %"


def _rounded(number: int) -> str:
    count = float(number)
    for unit in ("", "K", "M"):
        if count < 1000:
            return f"{count:.4g}{unit}"
        count /= 1000
    return f"{count:.4g}B"


def _pattern(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)|(?<=\.)\d+$", "*", name)


def grouped(names: Sequence[str]) -> str:
    """Names, those alike but for the numbers of layers as one: `model.layers.*.mlp.gate.weight (32)`."""
    alike: dict[str, list[str]] = {}
    for name in names:
        alike.setdefault(_pattern(name), []).append(name)
    return ", ".join(found[0] if len(found) == 1 else f"{pattern} ({len(found)})" for pattern, found in alike.items())
