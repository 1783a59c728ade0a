"""Registers the optimizers when `hf_galore` itself is imported, and not when only one of its submodules is.

Python runs `hf_galore/__init__.py` for both. The first time, what is being imported can be seen on the stack. Where it
is a submodule, a later `import hf_galore` runs no code any more. But CPython asks `hf_galore.__spec__._initializing`
then (whether another thread is still importing the module), and does not ask it of the parent of a submodule: that
question is where the registration is made up for. An interpreter that does not ask has it registered at once.

`__import__("hf_galore.optim")` called as a function returns the package, and counts as an import of it.
"""

from __future__ import annotations

import importlib
import sys
import threading
from importlib.machinery import ModuleSpec

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import FrameType
    from typing import Any

# What `__name__` is in the functions of the import system.
_IMPORT_SYSTEM = (
    "importlib._bootstrap",
    "importlib._bootstrap_external",
    "_frozen_importlib",
    "_frozen_importlib_external",
)


def register_on_import(spec: ModuleSpec | None) -> None:
    """Register now, or when the package itself is imported; to be called by the package's `__init__`.

    Args:
        spec: the package's `__spec__`.

    Raises:
        ImportError: as `hf_galore.integrations.trainer.register`; or else the import that registers later raises it.
    """
    if spec is not None and type(spec) is ModuleSpec and _is_for_submodule(sys._getframe(1).f_back, spec.name):
        spec.__class__ = _Waiting
        __import__(spec.name)
        if spec.__dict__.pop("asks", False):
            return
        spec.__class__ = ModuleSpec
    _register(__package__)


def _is_for_submodule(frame: FrameType | None, package: str) -> bool:
    """Whether a package is being imported as the parent of one of its submodules.

    The functions of the import system have what they import in a variable `name`, or `from_name` for what comes after
    `from ... import`: first the package, and above it, where there is one, the submodule that it is imported for.

    Args:
        frame: the innermost of those functions' frames.
        package: its name.
    """
    while frame is not None and frame.f_globals.get("__name__") in _IMPORT_SYSTEM:
        found = (str(frame.f_locals.get(key, "")) for key in ("name", "from_name"))
        if any(name.startswith(f"{package}.") for name in found):
            return True
        frame = frame.f_back
    return False


def _register(package: str) -> bool:
    """Register; `False` where this thread, or one that waits for it, is in the middle of importing what does it."""
    trainer = importlib.import_module(f"{package}.integrations.trainer")
    register = getattr(trainer, "register", None)  # the last thing in that file
    if register is None:
        return False
    register()
    return True


class _Waiting(ModuleSpec):
    """The spec of the package, after the import of a submodule and until the package itself is imported."""

    @property
    def _initializing(self) -> bool:
        frame, loading = sys._getframe(1), bool(self.__dict__.get("_initializing"))
        if frame.f_code is register_on_import.__code__:
            self.__dict__["asks"] = True
            return loading
        if _imports_submodule(frame, self.name):
            return loading
        if loading:  # whoever asks waits until it is not: see the setter
            self.__dict__["wanted"] = True
            return True
        try:
            self._make_up()
        except BaseException as error:  # noqa: BLE001, RUF100  (an interruption too would be suppressed)
            _raise_in_import_of(self.name, error)
            return True
        return False

    @_initializing.setter
    def _initializing(self, value: bool) -> None:
        self.__dict__["_initializing"] = value
        if not value and self.__dict__.pop("wanted", False):
            self._make_up()

    def _make_up(self) -> None:
        if _register(self.name):
            self.__class__ = ModuleSpec  # type: ignore[assignment]


def _imports_submodule(frame: FrameType, package: str) -> bool:
    """Whether a frame asks for a package on the way to one of its submodules only.

    At the end of `import hf_galore.optim` the package is looked up; and the import system imports `hf_galore.optim` so
    where it is the parent of another submodule.
    """
    if frame.f_globals.get("__name__") in _IMPORT_SYSTEM:
        return _is_for_submodule(frame, package)
    import dis

    for instruction in dis.get_instructions(frame.f_code):
        if instruction.offset == frame.f_lasti:
            return instruction.opname == "IMPORT_NAME" and str(instruction.argval).startswith(f"{package}.")
    return False


def _raise_in_import_of(package: str, error: BaseException) -> None:
    """Make the import that asks now raise an error. In `_initializing` CPython suppresses some, before 3.13 all.

    Given the answer that the module is being imported, it calls a function that waits for it, whose errors count.
    """
    bootstrap: Any = sys.modules["_frozen_importlib"]
    thread = threading.get_ident()
    original = bootstrap._lock_unlock_module

    def wait_for(name: str) -> Any:
        if name != package or threading.get_ident() != thread:
            return original(name)
        bootstrap._lock_unlock_module = original
        raise error

    bootstrap._lock_unlock_module = wait_for
