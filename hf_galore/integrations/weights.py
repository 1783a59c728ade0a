"""The weights of a model by kind: what each is used as, by what name it is a target, and how it makes matrices."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple, cast

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList
from transformers.pytorch_utils import Conv1D

from ..lowrank.matrices import ViewAs, matrix_shape
from ..lowrank.projection import is_projectable
from ..optim.shard import is_sharded

LINEAR, EXPERTS, ROUTERS = "linear layers", "experts", "routers"
CONVOLUTIONS, DEPTHWISE = "convolutions", "convolutions (depthwise)"
RECURRENT, ATTENTION, COMPUTED = "recurrent", "attention", "computed weights"
EMBEDDINGS, HEAD, VECTORS, OTHERS = "embeddings", "output head", "norms and biases", "other matrices"

Role = Literal["linear map", "by name", "none"]
"""When a weight is a target: where an entry matches it, and with "all-linear"; where an entry matches it that matches
no linear map; never."""


@dataclasses.dataclass(frozen=True, eq=False)
class Weight:
    """A parameter of a model, where one of its modules has it."""

    name: str
    """What entries of `optim_target_modules` are compared with: the module's name, for the weight of a layer that is
    a matrix by itself; else the parameter's own."""
    param: Tensor
    kind: str
    role: Role
    view_as: ViewAs | None = None
    """How it makes matrices, where that is not what is usual for its dimensions."""
    in_head: bool = False
    """Whether it belongs to the model's output head, which "all-linear" leaves out."""

    def is_projectable(self, rank: int) -> bool:
        """Whether it makes matrices, both sides of which are above the rank."""
        return self.role != "none" and is_projectable(matrix_shape(self.param.shape, self.view_as), rank)

    @property
    def is_left_sharded(self) -> bool:
        """Whether it would be projected, if FSDP2 had not sharded it: of what it shards, only matrices are."""
        stacked = self.param.ndim != 2 or self.view_as is not None
        return self.role != "none" and stacked and is_sharded(self.param)


def weights_of(model: nn.Module) -> list[Weight]:
    """All parameters of a model, in the order of its modules. One that several modules share comes once for each."""
    heads = head_modules(model)
    found = []
    for path, module in model.named_modules():
        for own, param in module._parameters.items():
            if param is not None:
                use = _use(path, own, module, param)
                name = path if use.by_module else f"{path}.{own}" if path else own
                in_head = id(module) in heads
                kind = HEAD if in_head and use.kind != VECTORS else use.kind
                found.append(Weight(name, param, kind, use.role, use.view_as, in_head))
    return found


def computed_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers whose weight is computed from other parameters, which can be trained."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _LAYERS)
        and not isinstance(module._parameters.get("weight"), Tensor)
        and any(param.requires_grad for param in module.parameters())
    }


def embedding_weights(model: nn.Module) -> list[Tensor]:
    """The weights of the embedding layers of `model`."""
    weights = (
        module._parameters.get("weight") for _, module in model.named_modules() if isinstance(module, nn.Embedding)
    )
    return [weight for weight in weights if isinstance(weight, Tensor)]


def head_modules(model: nn.Module) -> set[int]:
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


# ---- what a parameter is used as


class _Use(NamedTuple):
    kind: str
    role: Role = "none"
    view_as: ViewAs | None = None
    by_module: bool = False
    """Whether it goes by its module's name."""


_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_LAYERS = (nn.Linear, Conv1D, nn.Bilinear, *_CONVOLUTIONS)
_RECURRENT = (nn.RNNBase, nn.RNNCellBase)
_RECURRENT_WEIGHT = re.compile(r"weight_(ih|hh|hr)(_l\d+(_reverse)?)?")
_ATTENTION_WEIGHT = re.compile(r"(in|q|k|v)_proj_weight")
# `MixtralTopKRouter`, DeepSeek's `MoEGate`, `JetMoeTopKGating`; not `AggregateLayer`, `GatedMLP`.
_ROUTER = re.compile(r"Router|Gat(e(?!d)|ing)|[Tt]op_?[Kk]")
_EXPERT_COUNTS = ("num_experts", "num_local_experts", "moe_num_experts", "n_experts", "n_routed_experts")
_TABLE = re.compile(r"embed|pos(ition)?_|_pos|^pos$|token")


def _use(path: str, own: str, module: nn.Module, param: Tensor) -> _Use:
    if is_lazy(param) or not param.is_floating_point():
        return _Use(OTHERS)  # no shape yet; or quantised, which no optimizer can train
    if own == "weight" and isinstance(module, _LAYERS):
        return _of_layer(module, param)
    if own == "weight" and isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return _Use(EMBEDDINGS, "by name", by_module=True)
    if sum(size > 1 for size in param.shape) < 2 or own.endswith("bias") or "norm" in type(module).__name__.lower():
        return _Use(VECTORS)
    if isinstance(module, _RECURRENT) and _RECURRENT_WEIGHT.fullmatch(own):
        return _Use(RECURRENT, "linear map")
    if isinstance(module, nn.MultiheadAttention) and _ATTENTION_WEIGHT.fullmatch(own):
        return _Use(ATTENTION, "linear map")
    if isinstance(module, (ParametrizationList, nn.Embedding, *_LAYERS, *_RECURRENT)):
        return _Use(COMPUTED)  # what the weight of such a layer is computed from
    return _of_own(path, own, module, param)


def _of_layer(module: nn.Module, param: Tensor) -> _Use:
    """The weight of a layer of torch or transformers that is used as one matrix, or one for each output."""
    if not isinstance(module, _CONVOLUTIONS):
        return _Use(LINEAR, "linear map", by_module=True)
    if module.groups == module.in_channels > 1:
        return _Use(DEPTHWISE, by_module=True)
    return _Use(CONVOLUTIONS, "linear map", "flat" if param.ndim == 3 else None, by_module=True)


def _of_own(path: str, own: str, module: nn.Module, param: Tensor) -> _Use:
    """A parameter that a model has made itself: experts, routers, and what nobody but the model knows the use of."""
    kind = type(module).__name__
    experts = "expert" in kind.lower() or "expert" in path.lower()
    counts = {count for count in (getattr(module, name, None) for name in _EXPERT_COUNTS) if isinstance(count, int)}
    if param.ndim == 3:
        if experts or len(param) in counts:
            return _Use(EXPERTS, "linear map")
        if own == "weight" and "Linear" in kind:  # `GroupedLinearLayer`, `MoshiFlexibleLinear`
            return _Use(LINEAR, "linear map")
        if tuple(param.shape[1:]) == (getattr(module, "n_head", None), getattr(module, "d_head", None)):
            table = _TABLE.search(own) is not None
            return _Use(
                EMBEDDINGS if table else ATTENTION, "by name" if table else "linear map", "flat"
            )  # XLNet, Funnel
    elif param.ndim == 2:
        below = [count for count in counts if count > 1 and len(param) % count == 0 and len(param) > count]
        if experts and len(below) == 1:  # DBRX's, one below the other
            return _Use(EXPERTS, "linear map", below[0])
        if own == "weight" and (_ROUTER.search(kind) or len(param) in counts):
            return _Use(ROUTERS, "linear map")
    return _Use(EMBEDDINGS if _TABLE.search(own) else OTHERS, "by name")


def unique(weights: Iterable[Weight]) -> list[Weight]:
    """Each parameter once, where it comes first."""
    found: dict[int, Weight] = {}
    for weight in weights:
        found.setdefault(id(weight.param), weight)
    return list(found.values())


def is_lora(name: str) -> bool:
    """Whether this is the name of an adapter of LoRA."""
    return any(part.startswith("lora_") for part in name.split("."))


def elements(weights: Iterable[Weight]) -> int:
    """How many numbers these have."""
    return cast("int", sum(0 if is_lazy(weight.param) else weight.param.numel() for weight in weights))
