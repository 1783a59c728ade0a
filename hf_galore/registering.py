"""Registers the optimizers when `hf_galore` itself is imported, and not when only one of its submodules is.

Python runs `hf_galore/__init__.py` for both. What is being imported can be seen on the stack then. After the import of
a submodule, a later `import hf_galore` runs no code any more; but CPython (3.10 to 3.13) asks
`hf_galore.__spec__._initializing`, whether another thread is still importing the module, and asks the parents of a
submodule no such question. That is where the registration is made up for. (`importlib.import_module` asks since 3.11.)
"""

from __future__ import annotations

import dis
import importlib
import logging
import sys
from importlib.machinery import ModuleSpec

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import FrameType

# What `__name__` is in the functions of the import system, with those that `python -m package.module` goes through.
_IMPORT_SYSTEM = (
    "importlib._bootstrap",
    "importlib._bootstrap_external",
    "_frozen_importlib",
    "_frozen_importlib_external",
    "importlib.util",
    "runpy",
)


def register_on_import(spec: ModuleSpec | None) -> None:
    """Register now, or when the package itself is imported; to be called by the package's `__init__`.

    Args:
        spec: the package's `__spec__`.

    Raises:
        ImportError: as `hf_galore.integrations.trainer.register`.
    """
    if type(spec) is ModuleSpec and _is_for_submodule(sys._getframe(1).f_back, spec.name):
        spec.__class__ = _Waiting
    else:
        _register(__package__)


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
        loading = bool(self.__dict__.get("_initializing"))
        if not _imports_submodule(sys._getframe(1), self.name):
            if loading:  # by another thread, which whoever asks waits for: see the setter
                self.__dict__["wanted"] = True
            else:
                self._make_up()
        return loading

    @_initializing.setter
    def _initializing(self, value: bool) -> None:
        self.__dict__["_initializing"] = value
        if not value and self.__dict__.pop("wanted", False):
            self._make_up()

    def _make_up(self) -> None:
        try:
            if _register(self.name):
                self.__class__ = ModuleSpec  # type: ignore[assignment]
        except Exception as error:
            # Said, too: before 3.13 CPython suppresses what is raised here.
            logging.getLogger(self.name).error("%s is imported, but not registered: %s", self.name, error)  # noqa: TRY400
            raise


def _is_for_submodule(frame: FrameType | None, package: str) -> bool:
    """Whether a package is being imported as the parent of one of its submodules.

    The functions of the import system have what they import in a variable `name`, or `from_name` for what comes after
    `from ... import`, and runpy's in `mod_name`: first the package, and above it, where there is one, the submodule
    that it is imported for.

    Args:
        frame: the innermost of those functions' frames.
        package: its name.
    """
    while frame is not None and frame.f_globals.get("__name__") in _IMPORT_SYSTEM:
        found = (str(frame.f_locals.get(key, "")) for key in ("name", "from_name", "mod_name"))
        if any(name.startswith(f"{package}.") for name in found):
            return True
        frame = frame.f_back
    return False


def _imports_submodule(frame: FrameType, package: str) -> bool:
    """Whether a frame asks for a package on the way to one of its submodules only.

    At the end of `import hf_galore.optim` the package is looked up; and the import system imports `hf_galore.optim` so
    where it is the parent of another submodule.
    """
    if frame.f_globals.get("__name__") in _IMPORT_SYSTEM:
        return _is_for_submodule(frame, package)
    instruction = next(i for i in dis.get_instructions(frame.f_code) if i.offset == frame.f_lasti)
    return instruction.opname == "IMPORT_NAME" and str(instruction.argval).startswith(f"{package}.")
