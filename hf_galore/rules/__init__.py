"""How a gradient, low-rank or whole, becomes the direction that a weight moves in: one file a rule."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .adafactor import Adafactor
from .adam import Adam
from .adam_8bit import Adam8bit
from .lion import Lion
from .muon import Muon
from .rule import Rule

__all__ = ["RULES", "Rule", "options_of", "own_rule", "rule_of", "rule_of_full_rank", "without_own_name"]

# By the names that optimizers have for them. The option `rule` of a group of targets names them by `Rule.option`.
RULES: dict[str, Rule] = {
    "adam": Adam(),
    "adam_8bit": Adam8bit(),
    "adafactor": Adafactor(),
    "lion": Lion(),
    "muon": Muon(),
}


def own_rule(name: str) -> Rule:
    """The rule of an optimizer, by its name.

    Raises:
        ValueError: there is none of this name that trains more than targets.
    """
    names = [known for known, rule in RULES.items() if not rule.only_targets]
    if name not in names:
        advice = (
            f" {name} is for projected matrices only: set it by {{'rank': ..., 'rule': {name!r}}} in their group."
            if name in RULES
            else ""
        )
        raise ValueError(f"rule has to be one of {', '.join(names)}, but is {name!r}.{advice}")
    return RULES[name]


def rule_of(own: Rule, group: Mapping[str, Any]) -> Rule:
    """The rule of a parameter group.

    Args:
        own: the optimizer's.
        group: whose option `rule` may name another.
    """
    name = group.get("rule")
    return own if name is None or name == own.option else RULES[name]


def rule_of_full_rank(own: Rule, group: Mapping[str, Any]) -> Rule:
    """The rule of a parameter that trains full-rank, in a group of targets too, where it was too small to project."""
    rule = rule_of(own, group)
    return own if rule.only_targets else rule


def without_own_name(own: Rule, options: Mapping[str, Any]) -> dict[str, Any]:
    """A group's options with no `rule` where they name the optimizer's own: groups that mean the same are the same."""
    return {key: None if key == "rule" and value == own.option else value for key, value in options.items()}


def options_of(own: Rule, group: Mapping[str, Any]) -> dict[str, Any]:
    """The options that the rule of a group has and the optimizer's own has not, or understands otherwise.

    Learning rate, decay and, if it has them, β are the optimizer's, whatever the rule.
    """
    rule = rule_of(own, group)
    shared = {"lr", "weight_decay", "betas"} & own.defaults.keys()
    return {} if rule is own else {key: value for key, value in rule.defaults.items() if key not in shared}
