"""Weights in 8 bits that train: no float copy of one exists at any time, only tiles.

`format` is the arithmetic, `weight` the tensor that a layer has, `products` what a layer computes with it, and `layer`
that as autograd sees it.
"""

from __future__ import annotations

from .format import BLOCK, NOT_FINITE, Int8Blocks, empty_blocks, read_blocks, to_blocks, write_blocks_
from .layer import input_gradient, product
from .products import int8_linear, times_weight
from .update import add_int8_
from .weight import DTYPES, Int8Weight, elements_of, is_int8

__all__ = [
    "BLOCK",
    "DTYPES",
    "NOT_FINITE",
    "Int8Blocks",
    "Int8Weight",
    "add_int8_",
    "elements_of",
    "empty_blocks",
    "input_gradient",
    "int8_linear",
    "is_int8",
    "product",
    "read_blocks",
    "times_weight",
    "to_blocks",
    "write_blocks_",
]
