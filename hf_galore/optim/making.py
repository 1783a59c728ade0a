"""What each parameter of an optimizer is: projected or full-rank, whole or sharded over processes."""

from __future__ import annotations

from torch import Tensor

from ..rules import Rule, rule_of
from .admission import check_sharded
from .groups import is_target
from .shard import is_sharded
from .sharded import ShardedFullRank, ShardedTarget
from .target import Target
from .trained import FullRank, Owner, Place, Trained


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
    kinds: tuple[type[Trained], type[Trained]] = (Target, FullRank)
    if is_sharded(param):
        check_sharded(owner.name_of(param), param, group)  # by now: accelerate replaces those that there were
        kinds = (ShardedTarget, ShardedFullRank)
    kind = kinds[0] if is_target(param, group) else kinds[1]
    return kind(owner, param, place, index, rule_of(rule, group))
