"""Modules whose class is replaced by one derived from it, for their `forward` to be another.

The class, and not an attribute `forward`: a copy of the module would run the original's weights.
"""

from __future__ import annotations

import copyreg
import types
import weakref
from typing import Any

from torch import nn

from ..integrations.accelerate import forward_attribute
from ..integrations.fully_shard import as_unit, was


class Patched:
    """What a patched module's class has before the module's own. Copies and pickles are of the module's own."""

    original: type[nn.Module]
    """The module's own class."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        # As the original would be, whose own ways of it those are.
        plain = self.original.__new__(self.original)
        plain.__dict__.update((key, value) for key, value in self.__dict__.items() if key != "_galore_sink")
        reduced: Any = plain.__reduce_ex__(protocol)
        made_by, arguments, *rest = reduced
        # pickle has a rule of its own for this one: an object of another class than the present is refused.
        return (_new if made_by is copyreg.__newobj__ else made_by, arguments, *rest)  # type: ignore[attr-defined]


def _new(cls: type, *arguments: Any) -> Any:
    return cls.__new__(cls, *arguments)


# A class that has one of these may copy its modules otherwise than by what they hold, or know its subclasses.
_OF_ITS_OWN = ("__deepcopy__", "__copy__", "__init_subclass__", "__slots__")


def why_not_derivable(cls: type[nn.Module], patch: type[Patched], base: type[nn.Module] = nn.Module) -> str | None:
    """Why modules of a class cannot have a patched one, in words; `None` where they can.

    Args:
        cls: the modules' own.
        patch: what would come before it.
        base: a class that it is derived from, of which it is known.
    """
    own = [entries.__dict__ for entries in cls.__mro__ if entries not in base.__mro__]
    name = next((name for name in _OF_ITS_OWN for entries in own if entries.get(name)), None)
    if name is not None:
        return f"its class {cls.__name__} has {name} of its own"
    try:
        cls.__new__(cls).__class__ = patched_class(cls, patch)
    except TypeError as error:
        return f"its class {cls.__name__} cannot be derived from: {error}"
    return None


def patched_class(cls: type[nn.Module], patch: type[Patched]) -> type[nn.Module]:
    """The class of patched modules of a class; always the same one while there is one.

    Args:
        cls: the modules' own.
        patch: what comes before it.

    Raises:
        TypeError: it cannot be derived from.
    """
    # The class knows those derived from it, by weak references: there is no table to keep.
    found = next((sub for sub in cls.__subclasses__() if sub.__dict__.get("original") is cls), None)
    if found is None:
        name = f"Projected{cls.__name__}"
        found = types.new_class(name, (patch, cls), exec_body=lambda body: body.update(original=cls))
    return found


def why_forward_is_not_of(cls: type[nn.Module], module: nn.Module) -> str | None:
    """Why a module does not run the `forward` of its class, in words; `None` where it does.

    Args:
        cls: the module's own class.
        module: the module, of that class or of a patched one.
    """
    attribute = forward_attribute(module)
    if attribute is not None and not _is_own(module.__dict__[attribute], module, cls):
        return "its forward has been replaced"
    return None


def _is_own(forward: Any, module: nn.Module, cls: type) -> bool:
    """Whether this is the `forward` of a class, of that module."""
    function = getattr(forward, "__func__", None)
    return getattr(forward, "__self__", None) is module and function is cls.forward  # type: ignore[attr-defined]


def _rebind(module: nn.Module, old: type, new: type) -> None:
    """Let a module of which somebody has bound `forward`, as accelerate's wrapper does, run that of its new class."""
    for attribute in ("forward", "_old_forward"):
        if _is_own(module.__dict__.get(attribute), module, old):
            setattr(module, attribute, types.MethodType(new.forward, module))  # type: ignore[attr-defined]


class ModulePatch:
    """A patched module, to be put back with `remove()`; see `patch_module`."""

    def __init__(self, module: nn.Module, cls: type[nn.Module]) -> None:
        self._module = weakref.ref(module)
        self._cls = cls  # that it had
        self._patched = was(type(module))

    def remove(self) -> None:
        """Give the module its own class again."""
        module = self._module()
        if module is not None and was(type(module)) is self._patched:
            del module.__dict__["_galore_sink"]
            module.__class__ = self._cls
            _rebind(module, self._patched, was(self._cls))


def patch_module(module: nn.Module, patch: type[Patched], sink: weakref.ref[Any], why_not: str | None) -> ModulePatch:
    """Give a module the class that sends its gradients to `sink`, which is referred to weakly.

    Args:
        module: not yet patched.
        patch: what comes before the module's own class.
        sink: where the gradients go.
        why_not: why the module cannot be patched, if it cannot, in words.

    Raises:
        ValueError: it cannot.
    """
    if why_not is not None:
        raise ValueError(f"The projected backward cannot serve this module: {why_not}.")
    cls = type(module)
    patched = patched_class(was(cls), patch)
    module.__class__ = as_unit(patched, cls)
    module.__dict__["_galore_sink"] = sink
    _rebind(module, was(cls), patched)
    return ModulePatch(module, cls)
