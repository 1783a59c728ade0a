"""Registers hf_galore's optimizers in every Python process that has this folder in front of its PYTHONPATH.

`python -m hf_galore` puts it there. Python imports a module of this name when it starts, before it runs anything. The
optimizers are registered once `transformers.trainer` has been imported: a process that never imports it pays nothing,
and what a script sets before it imports transformers (HF_HOME, CUDA_VISIBLE_DEVICES, …) counts.
"""

from __future__ import annotations

import os
import sys
from importlib.machinery import PathFinder

TYPE_CHECKING = False  # typing's own takes longer to import than all of this
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

FOLDER = os.path.dirname(__file__)
PACKAGE_PARENT = os.path.dirname(os.path.dirname(FOLDER))
TRAINER = "transformers.trainer"
OURS = "hf_galore.integrations.trainer"  # which may itself be what imports the first, and is not ready then


class _Registrar:
    """On `sys.meta_path`, finds those modules as the others find them, and registers when one of them has been run."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in (TRAINER, OURS):
            return None
        others = [finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec")]
        found = (finder.find_spec(name, path, target) for finder in others)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None:
            self._register_after(spec)
        return spec

    def _register_after(self, spec: ModuleSpec) -> None:
        loader = spec.loader
        assert loader is not None
        execute = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            _import_hf_galore()
            ours = sys.modules.get(OURS)
            # Still needed if that failed, or waits for ours: whoever tries again must not go unregistered.
            done = ours is None or (hasattr(ours, "register") and ours.is_registered())
            if done and self in sys.meta_path:
                sys.meta_path.remove(self)

        # On the loader that was found, rather than with one of our own: others ask it for source and data.
        loader.exec_module = exec_module  # type: ignore[method-assign]


def _import_hf_galore() -> None:
    """Importing it registers. One that this interpreter has comes before the one that this file is part of."""
    elsewhere = PACKAGE_PARENT not in sys.path
    if elsewhere:
        sys.path.append(PACKAGE_PARENT)
    try:
        # Not importlib.import_module: before 3.11 it takes a package that is there, and does not ask for its state.
        __import__("hf_galore")
    finally:
        if elsewhere:
            sys.path.remove(PACKAGE_PARENT)


def _run_hidden() -> None:
    """Run the sitecustomize that this one hides, if there is one, and leave `sys.path` as without this folder."""
    behind = sys.path[sys.path.index(FOLDER) + 1 :]
    sys.path.remove(FOLDER)
    spec = PathFinder.find_spec(__name__, behind)
    if spec is None or spec.loader is None:
        return
    from importlib.util import module_from_spec  # which most processes do without

    hidden = module_from_spec(spec)
    sys.modules[__name__] = hidden
    spec.loader.exec_module(hidden)


sys.meta_path.insert(0, _Registrar())
_run_hidden()
