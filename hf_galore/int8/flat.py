"""The values of a weight in one row: a copy of them, which looks like a view to who sends tensors of several sizes.

DistributedDataParallel lays the weights of a model side by side, sends them, and sets each by `copy_`. It does so below
Python, where a copy serves as well as a view does. Who changed one in Python would believe the weight changed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only


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
        in_place = name in _IN_PLACE or (name.endswith("_") and not name.endswith("__"))
        changed = tree_leaves((args[:1] if in_place else (), kwargs.get("out")))
        if any(isinstance(one, cls) for one in changed):
            raise RuntimeError(  # Python would take a TypeError of `+=` for "by other means"
                f"{name} would change a copy of an int8 weight's values, and the weight stay as it is: an int8 weight "
                "has no views. `weight.copy_(values)` sets one."
            )
        with torch._C.DisableTorchFunctionSubclass():
            found = func(*args, **kwargs)
            if isinstance(found, np.ndarray):
                found.flags.writeable = False
            places = {_place(one) for one in tree_leaves((args, kwargs)) if isinstance(one, cls)}
            # Of the same memory, whatever made it: a slice, a part, a shape.
            return tree_map_only(Tensor, lambda one: one.as_subclass(cls) if _place(one) in places else one, found)


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


_IN_PLACE = {
    "__setitem__",
    *(f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "div", "floordiv", "mod", "pow")),
    *(f"__i{name}__" for name in ("and", "or", "xor", "lshift", "rshift")),
}
