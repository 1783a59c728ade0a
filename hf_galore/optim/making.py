"""What each parameter of an optimizer is: projected or full-rank, whole or sharded over processes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..config import GaLoreConfig
from ..option import OF_WHOLE_MATRICES
from ..rules import Rule, rule_of, rule_of_full_rank
from .admission import check_sharded
from .groups import Group, is_target
from .residual import ResidualTarget
from .scaled import ScaledTarget
from .shard import is_sharded
from .sharded import ShardedFullRank, ShardedTarget
from .sharded_gradient import ShardedResidualTarget, ShardedScaledTarget
from .target import Target
from .trained import FullRank, Owner, Place, Trained
from .turns import forget_phases
from .whole_muon import WholeMuonTarget


def make_all(owner: Owner, known: dict[int, Trained], rule: Rule) -> list[Trained]:
    """What each parameter of an optimizer's groups is, in their order.

    Args:
        owner: the optimizer.
        known: what parameters are, by their ids; what is not there, or not up to date, is made and put there.
        rule: the optimizer's own.
    """
    found: list[Trained] = []
    for group_index, group in enumerate(owner.param_groups):
        for position, param in enumerate(group["params"]):
            trained = known.get(id(param))
            if trained is None or not trained.is_current():
                trained = known[id(param)] = make(owner, param, Place(group_index, position), len(found), rule)
                forget_phases(known.values())  # among other targets each has another turn
            found.append(trained)
    return found


def drop_others(state: Any, kept: Mapping[int, Trained]) -> None:
    """Take what has left the groups out of an optimizer's state."""
    for param in [param for param in state if id(param) not in kept]:
        del state[param]


def make(owner: Owner, param: Tensor, place: Place, index: int, rule: Rule) -> Trained:
    """The target or the full-rank parameter that a parameter of a group is.

    Args:
        owner: the optimizer.
        param: the parameter; a DTensor where it is sharded.
        place: where it is in the optimizer's groups.
        index: of the parameter in the optimizer.
        rule: the optimizer's own.

    Raises:
        ValueError: it is sharded in a way that GaLore does not know, or for a refresh that needs whole gradients.
    """
    group = owner.param_groups[place.group]
    projected = is_target(param, group)
    if is_sharded(param):
        check_sharded(owner.name_of(param), param, group)  # by now: accelerate replaces those that there were
    sharded, whole = _kinds_of_target(group) if projected else (ShardedFullRank, FullRank)
    kind = sharded if is_sharded(param) else whole
    return kind(owner, param, place, index, (rule_of if projected else rule_of_full_rank)(rule, group))


def _kinds_of_target(group: Group) -> tuple[type[Target], type[Target]]:
    """What a target of a group is, sharded and whole.

    Raises:
        ValueError: an option of the group has been changed to what it cannot be.
    """
    config = GaLoreConfig(
        **{key: group[key] for key in ("residual", "residual_bits", "scaling", "rule") if key in group}
    )
    if config.scaling != "none":
        return ShardedScaledTarget, ScaledTarget
    if config.residual in OF_WHOLE_MATRICES:
        return ShardedTarget, WholeMuonTarget  # `check_sharded` refuses the first
    if config.residual != "none":
        return ShardedResidualTarget, ResidualTarget
    return ShardedTarget, Target
