"""Which parameters GaLore can train, and as what: what is refused by name before the first step, and why."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from ..int8 import Int8Weight, is_int8
from ..integrations import fully_shard
from ..integrations.engines import check_no_accelerator as check_no_accelerator
from ..integrations.engines import check_whole as check_whole
from ..integrations.engines import holder_of, refusal, refusal_of_int8, will_shard
from ..log import and_others, logger
from ..lowrank.methods import METHODS
from ..lowrank.nonfinite import has_numbers
from ..lowrank.projection import is_projectable, norm_of
from ..lowrank.scales import element_size, scale_of
from ..option import OF_WHOLE_MATRICES
from ..rules import Rule, rule_of
from ..rules.adam_8bit import check_installed
from .groups import Group, is_target, shape_in
from .shard import check_sharding, is_sharded, local_of

if TYPE_CHECKING:
    from .trained import Trained


def check_parameters(
    named_parameters: Iterable[tuple[str, Tensor]], module: nn.Module | None = None, *, on_meta: bool = True
) -> None:
    """Check that GaLore can train these parameters. Reads no numbers, and takes a millisecond for some hundred.

    Args:
        named_parameters: with the names that messages use. Frozen ones are passed over.
        module: the model that they belong to, where it is known: its embeddings are looked at.
        on_meta: whether they may all be on the meta device, which shows what an optimizer takes.

    Raises:
        ValueError: one is complex; some have their numbers elsewhere (the meta device); two lie in the same memory;
            an embedding gives sparse gradients.
    """
    named = [(name, param) for name, param in named_parameters if param.requires_grad]
    for name, param in named:
        if param.is_complex():
            raise ValueError(
                f"GaLore trains real numbers, but {name} is {param.dtype}. Freeze it, keep its real and imaginary "
                "parts as two parameters (torch.view_as_real), or train it with optim='adamw_torch'."
            )
    _check_present(named, on_meta)
    _check_apart(named)
    if module is not None:
        _check_dense(module, {id(param) for _, param in named})


def check_group(group: Group, own: Rule, name_of: Callable[[Tensor], str]) -> None:
    """Check the options of a group, and that its parameters can be what it says; say which are too small to project.

    Args:
        own: the optimizer's rule.
        name_of: gives the names that messages use.

    Raises:
        ValueError: an option is out of range; a parameter is sharded, no matrix where the group has a rank, or of a
            dtype that the rule does not know.
    """
    rule = rule_of(own, group)
    rule.check(group)
    if group.get("residual_bits"):
        check_installed(f"residual_bits={group['residual_bits']} needs", "residual_bits=0 works without it.")
    check_refresh(group)
    too_small = []
    for param in group["params"]:
        engine = holder_of(param)
        if engine is not None:
            raise refusal(f"GaLore, with {name_of(param)} among its parameters,", engine)
        if is_int8(param) and will_shard():
            raise refusal_of_int8(f"The optimizer, with {name_of(param)} among its parameters,", "FSDP2, which shards")
        if is_sharded(param):
            check_sharded(name_of(param), param, group)
        rule.check_parameter(name_of(param), param)
        if "rank" not in group:
            continue
        try:
            shape = shape_in(param, group)
        except ValueError as error:
            raise ValueError(
                f"Only matrices, and stacks of them, can be projected, but {name_of(param)} has {param.ndim} "
                f"dimension(s): {error} Or move it to a group without a rank."
            ) from None
        if is_int8(param) and shape != tuple(param.shape):
            raise ValueError(
                f"{name_of(param)} is kept in 8 bits and projected as the matrix that it is, but view_as makes "
                f"{shape} of it. Leave view_as out, or keep the weight in floats."
            )
        if not is_projectable(shape, group["rank"]):
            too_small.append(name_of(param))
    if too_small:
        logger.info(
            "Trained full-rank, because rank %d is not below the smaller side: %s.",
            group["rank"],
            ", ".join(too_small),
        )


def check_refresh(group: Mapping[str, Any]) -> None:
    """Check that options of refreshes go together.

    Raises:
        ValueError: they do not.
    """
    if group.get("lazy_refresh") and not METHODS[group["refresh"]].by_gradient:
        others = ", ".join(name for name, method in METHODS.items() if method.by_gradient)
        raise ValueError(
            f"GaLore's lazy_refresh=true does nothing with refresh={group['refresh']}: random bases overlap by chance "
            f"alone, so no subspace ever counts as stable. Set lazy_refresh=false, or refresh to one of {others}."
        )


def check_sharded(name: str, param: Tensor, group: Group) -> None:
    """Check that a DTensor can be what its group says.

    Raises:
        ValueError: it is divided in a way that GaLore does not know, or its group asks for what needs it whole.
    """
    check_sharding(name, param)
    if "rank" in group and param.ndim != 2:
        raise ValueError(
            f"GaLore projects matrices that FSDP2 shards, but no stacks and convolutions yet, and {name} has shape "
            f"{tuple(param.shape)}. Move it to a group without a rank, or name other optim_target_modules."
        )
    if is_target(param, group) and group.get("residual") in OF_WHOLE_MATRICES:
        raise ValueError(
            f"GaLore's residual={group['residual']} orthogonalises whole matrices, but {name} is sharded over "
            "processes. Take residual=fira, or DistributedDataParallel, where each process has all of it."
        )
    if is_target(param, group) and not METHODS[group["refresh"]].from_factors:
        others = ", ".join(method for method, row in METHODS.items() if row.from_factors)
        raise ValueError(
            f"GaLore's refresh={group['refresh']} needs the whole gradient of a matrix, but {name} is sharded over "
            f"processes. Take one of {others}, which need products with it only."
        )


def check_not_sharded_since(model: nn.Module | None, parameters: Sequence[Trained]) -> None:
    """Check, where a parameter has no gradient, that it is not because FSDP2 has put others in the place of all.

    Args:
        model: that the parameters belong to, where it is known.
        parameters: the optimizer's.

    Raises:
        RuntimeError: it has.
    """
    if model is None or all(trained.local.grad is not None for trained in parameters):
        return
    fully_shard.check_not_sharded_since(model, ((trained.name, trained.param) for trained in parameters))


def check_stochastic_rounding(groups: Iterable[Group]) -> None:
    """Check that stochastic rounding is asked for where it can do something.

    Raises:
        ValueError: no weight of the groups that ask for it is bfloat16, or kept in 8 bits.
    """
    rounded = [param for group in groups if group.get("stochastic_rounding") for param in group["params"]]
    if rounded and not any(param.dtype == torch.bfloat16 or is_int8(param) for param in rounded):
        found = ", ".join(sorted({str(param.dtype) for param in rounded}))
        raise ValueError(
            f"stochastic_rounding is for bfloat16 weights, but these are {found}, which lose nothing that it could "
            "save. Leave it out, or load the model in bfloat16."
        )


def say_if_decay_is_lost(groups: Iterable[Group]) -> None:
    """Warn of weights that neither their decay nor an update moves by half a unit in the last place."""
    moves: list[float] = []  # of an element, relative to half a unit in the last place of 1
    sizes: list[Tensor] = []
    for group in groups:
        rate, decay = float(group["lr"]), float(group["lr"] * group["weight_decay"])
        if decay == 0 or group.get("stochastic_rounding"):
            continue
        for param in group["params"]:
            if is_int8(param):
                continue  # rounded at random
            half = torch.finfo(param.dtype).eps / 4  # of the larger numbers between two powers of 2
            weight = local_of(param.detach())
            if torch.finfo(param.dtype).bits >= 32 or decay >= half or not has_numbers(param) or not weight.numel():
                continue
            # Adam's direction has elements of about 1, of which a target gets a part.
            part = 1.0
            if is_target(param, group):
                shape = shape_in(param, group)
                part = scale_of(group, shape) * element_size(group, shape)
            moves.append(rate * part / half)
            sample = weight.view(-1)[:4096] if weight.is_contiguous() else weight
            sizes.append(norm_of(sample) / sample.numel() ** 0.5)
    measured = torch.stack([size.cpu() for size in sizes]).tolist() if sizes else []
    lost = sum(move < size for move, size in zip(moves, measured, strict=True))
    if lost:
        logger.warning(
            "Weight decay does nothing to %d weight(s) of less than float32: at these learning rates it is rounded "
            "away, as most of each update is. stochastic_rounding=true keeps both.",
            lost,
        )


def say_if_nothing_is_projected(cls_name: str, groups: Iterable[Group]) -> None:
    """Warn of an optimizer whose groups have no rank, such as a program makes that is told the class alone."""
    if not any("rank" in group for group in groups):
        logger.warning(
            "%s projects nothing, as none of its parameter groups has a rank: it trains, and takes memory, as without "
            "GaLore. Give a group a 'rank', or let hf_galore.make_optimizer(model, ...) find the matrices.",
            cls_name,
        )


def _check_present(named: list[tuple[str, Tensor]], on_meta: bool) -> None:
    absent = [name for name, param in named if param.device.type == "meta"]
    if absent and not (on_meta and len(absent) == len(named)):
        others = and_others(len(absent) - 1, "other parameter(s)")
        raise ValueError(
            f"On the meta device, so that there is nothing to train: {absent[0]}{others}. Their numbers are elsewhere "
            "(offloaded to the CPU or to disk, as device_map='auto' does where a model does not fit) or nowhere. Load "
            "the model without device_map and offloading, in bfloat16 if it does not fit, or freeze them."
        )


class _Extent(NamedTuple):
    start: int  # address of the first byte
    end: int
    name: str
    param: Tensor


def _check_apart(named: list[tuple[str, Tensor]]) -> None:
    """Refuse two parameters in the same memory: each would be moved by the other's update too."""
    extents = sorted((e for e in (_extent(*item) for item in named) if e is not None), key=lambda e: e[:2])
    open_extents: list[_Extent] = []  # those that reach behind the present start
    seen: set[int] = set()
    for extent in extents:
        if id(extent.param) in seen:
            continue  # given twice: not two parameters
        seen.add(id(extent.param))
        open_extents = [other for other in open_extents if other.end > extent.start]
        for other in open_extents:
            if _share_elements(other, extent):
                raise ValueError(
                    f"{other.name} and {extent.name} are two parameters in the same memory, so that each would be "
                    "updated twice. Make them one (b.weight = a.weight, not b.weight.data = a.weight.data), or give "
                    "one a copy (.clone())."
                )
        open_extents.append(extent)


def _extent(name: str, param: Tensor) -> _Extent | None:
    """Where a parameter lies; `None` where nobody can know: fakes, the meta device, sharded and wrapped tensors."""
    held = param.codes if isinstance(param, Int8Weight) else param
    if type(held) not in (nn.Parameter, Tensor) or hasattr(held, "fake_mode") or held.device.type == "meta":
        return None
    if held.layout != torch.strided or held.numel() == 0:
        return None
    start = held.data_ptr()
    last = sum((size - 1) * stride for size, stride in zip(held.shape, held.stride(), strict=True))
    return _Extent(start, start + (last + 1) * held.element_size(), name, param) if start else None


def _share_elements(first: _Extent, second: _Extent) -> bool:
    """Whether two that overlap from end to end have an element in common: columns of one matrix do not."""
    if first.param.device != second.param.device:
        return False  # an address means something on its own device only
    if first.param.is_contiguous() and second.param.is_contiguous():
        return True
    low, high = min(first.start, second.start), max(first.end, second.end)
    taken = torch.zeros(high - low, dtype=torch.bool)
    views = []
    for extent in (first, second):
        size = extent.param.element_size()
        strides = [stride * size for stride in extent.param.stride()]
        # Each element by its first byte; and by all its bytes, where the two have elements of other sizes.
        views.append(taken.as_strided((*extent.param.shape, size), (*strides, 1), extent.start - low))
    views[0].fill_(True)
    return bool(views[1].any())


def _check_dense(module: nn.Module, trained: set[int]) -> None:
    for name, embedding in module.named_modules():
        if not isinstance(embedding, (nn.Embedding, nn.EmbeddingBag)) or not embedding.sparse:
            continue
        if id(embedding.weight) in trained:
            raise ValueError(
                f"{name or type(embedding).__name__} is an embedding with sparse=True, and GaLore cannot use sparse "
                "gradients. Build it with sparse=False, or freeze it."
            )
