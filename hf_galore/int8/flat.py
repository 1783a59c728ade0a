"""The values of a weight in one row: a copy of them, which looks like a view to who sends tensors of several sizes.

DistributedDataParallel lays the weights of a model side by side, sends them, and sets each by `copy_`. It does so below
Python, where a copy serves as well as a view does. Who changed one in Python would believe the weight changed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class FlatValues(Tensor):
    """The values of an int8 weight in one row. What would change them, in Python, is refused."""

    @classmethod
    def of(cls, values: Tensor) -> FlatValues:
        """Those of a matrix, which shares their memory."""
        return values.view(-1).as_subclass(cls)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        in_place = name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))
        if in_place and args and isinstance(args[0], cls):
            raise RuntimeError(  # Python would take a TypeError of `+=` for "by other means"
                f"{name} would change a copy of an int8 weight's values, and the weight stay as it is: an int8 weight "
                "has no views. `weight.copy_(values)` sets one."
            )
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)
