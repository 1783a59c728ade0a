"""Parameters as matrices: one of m × n, or a stack of k of them, whichever a parameter's elements make.

=====================  ============  ==============================  ==============================================
`view_as`              parameter     as                              of
=====================  ============  ==============================  ==============================================
(2 dimensions)         m × n         m × n                           linear layers, LSTM, `in_proj_weight`, routers
"stack" (3 dimensions  k × m × n     k matrices of m × n             experts, `nn.Bilinear`
by default)
"flat" (4 or more by   m × a × b..   m × (a·b..)                     convolutions, of which 1-D ones have 3 dimensions
default)
an integer k           (k·m) × n     k matrices of m × n             experts, or q, k and v, one below the other
=====================  ============  ==============================  ==============================================

Each matrix of a stack is projected by itself, with bases of its own, and all of them in one operation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from torch import Tensor

ViewAs = Literal["stack", "flat"] | int
"""How a parameter's elements make matrices."""


def matrix_shape(shape: Sequence[int], view_as: ViewAs | None = None) -> tuple[int, ...]:
    """The shape that a parameter is projected in: m × n, or k × m × n for a stack of k matrices.

    Args:
        shape: of the parameter.
        view_as: how its elements make matrices; `None` for what is usual for its dimensions.

    Raises:
        ValueError: a parameter of this shape cannot be viewed so; the message says what `view_as` may be.
    """
    given = tuple(shape)
    if isinstance(view_as, int) and not isinstance(view_as, bool):
        if len(given) != 2 or view_as < 1 or given[0] % view_as:
            raise ValueError(
                f"view_as={view_as} divides the rows of a matrix into so many equal parts, and a parameter of shape "
                f"{given} has no rows that can be. Give a number that divides them, or leave view_as out."
            )
        return given if view_as == 1 else (view_as, given[0] // view_as, given[1])
    if view_as not in (None, "stack", "flat"):
        raise ValueError(f"view_as has to be 'stack', 'flat' or a number of equal parts, but is {view_as!r}.")
    if len(given) == 2:
        return given
    if len(given) == 3 and view_as != "flat":
        return given
    if len(given) >= 3 and view_as != "stack":
        return given[0], math.prod(given[1:])
    raise ValueError(
        f"A parameter of shape {given} is no matrix and no stack of matrices"
        + (", which has 3 dimensions." if view_as == "stack" else ": it has fewer than 2 dimensions.")
    )


def as_matrices(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """A parameter, or its gradient, in the shape of `matrix_shape`: a view where its layout allows one, else a copy."""
    return tensor if tensor.shape == tuple(shape) else tensor.reshape(tuple(shape))


def viewed(tensor: Tensor, shape: Sequence[int]) -> tuple[Tensor, bool]:
    """A parameter in the shape of `matrix_shape`, and whether that is a view of it: that of `channels_last` is none."""
    if tensor.shape == tuple(shape):
        return tensor, True
    try:
        return tensor.view(tuple(shape)), True
    except RuntimeError:
        return tensor.reshape(tuple(shape)), False
