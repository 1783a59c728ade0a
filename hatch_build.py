"""Puts the recipes into wheels, and not into editable installs.

There the package is the checkout's, which finds its recipes beside itself. A copy in `site-packages/hf_galore` would
outlive the checkout, and `import hf_galore` would go on to succeed, with an empty package that registers nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class RecipesHook(BuildHookInterface):  # type: ignore[type-arg]
    """Put `recipes/` into wheels as `hf_galore/recipes/bundled/`: beside the modules that read it, not among them."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Before a build: of `standard` or `editable`."""
        if version == "standard":
            build_data["force_include"][str(Path(self.root, "recipes"))] = "hf_galore/recipes/bundled"
