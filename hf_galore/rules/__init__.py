"""How a gradient, low-rank or whole, becomes the direction that a weight moves in: one file a rule."""

from __future__ import annotations

from .adafactor import Adafactor
from .adam import Adam
from .adam_8bit import Adam8bit
from .rule import Rule

__all__ = ["RULES", "Rule"]

RULES: dict[str, Rule] = {
    "adam": Adam(),
    "adam_8bit": Adam8bit(),
    "adafactor": Adafactor(),
}
