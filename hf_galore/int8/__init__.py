"""Weights in 8 bits that train: no float copy of one exists at any time, only tiles.

`format` is the arithmetic, `weight` the tensor that a layer has, `products` what a layer computes with it.
"""

from __future__ import annotations

from .format import BLOCK, Int8Blocks, empty_blocks, read_blocks, to_blocks, write_blocks_
from .products import int8_linear, times_weight
from .update import add_int8_
from .weight import Int8Weight, is_int8

__all__ = [
    "BLOCK",
    "Int8Blocks",
    "Int8Weight",
    "add_int8_",
    "empty_blocks",
    "int8_linear",
    "is_int8",
    "read_blocks",
    "times_weight",
    "to_blocks",
    "write_blocks_",
]
