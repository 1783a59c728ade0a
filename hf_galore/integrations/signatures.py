"""Whether functions of other libraries still have the signatures that we were written for."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any


def signature_of(function: Callable[..., Any]) -> str:
    """The signature of a function without annotations, such as ``(self, model=None)``."""
    signature = inspect.signature(function)
    empty = inspect.Parameter.empty
    parameters = [parameter.replace(annotation=empty) for parameter in signature.parameters.values()]
    return str(signature.replace(parameters=parameters, return_annotation=inspect.Signature.empty))


def moved(owner: Any, name_of_owner: str, expected: Mapping[str, str]) -> list[str]:
    """What a class or module no longer has as it is expected, in words; empty where all is well.

    Args:
        owner: where the functions are.
        name_of_owner: what messages call it.
        expected: signatures without annotations, by the functions' names.
    """
    found = []
    for name, signature in expected.items():
        function = getattr(owner, name, None)
        if function is None:
            found.append(f"{name_of_owner}.{name}{signature} is gone")
        elif signature_of(function) != signature:
            found.append(f"{name_of_owner}.{name}{signature} is now {name}{signature_of(function)}")
    return found
