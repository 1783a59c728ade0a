"""The names of an optimizer's parameters: for messages, and for checkpoints, where torch keeps them in the groups.

Without them moments could be loaded into other matrices of the same shapes.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn


class Names:
    """The names that are known.

    Args:
        model: that the parameters belong to, if it is known; referred to weakly.
    """

    def __init__(self, model: nn.Module | None) -> None:
        self._model = None if model is None else weakref.ref(model)
        self._known: dict[int, str] = {}  # by the parameter's id
        self.refresh()

    def refresh(self) -> None:
        """Learn the names of parameters that the model has by now."""
        model = self.model()
        if model is not None:
            self._known.update((id(param), name) for name, param in model.named_parameters())

    def model(self) -> nn.Module | None:
        """The model that the parameters belong to, if it is known and still there."""
        return None if self._model is None else self._model()

    def learn(self, group: Mapping[str, Any]) -> None:
        """Learn the names that a group has for parameters whose names are unknown."""
        for param, name in zip(group["params"], group.get("param_names", ()), strict=False):
            self._known.setdefault(id(param), name)

    def of(self, param: Tensor) -> str:
        """The name of a parameter, or words for it where none is known."""
        if id(param) not in self._known:
            self.refresh()  # accelerate replaces parameters
        return self._known.get(id(param), f"a parameter of shape {tuple(param.shape)}")

    def of_entries(self, groups: Iterable[Mapping[str, Any]]) -> Iterator[tuple[str, Tensor]]:
        """The parameters of groups that hold them alone or in pairs with their names, with the names of all."""
        for group in groups:
            for entry in group["params"]:
                name, param = entry if isinstance(entry, tuple) else (None, entry)
                if isinstance(param, Tensor):
                    yield name or self.of(param), param

    def in_groups(self, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The first groups of an optimizer with (name, parameter) pairs, where all names are known."""
        params = [entry for group in groups for entry in group["params"]]
        if not all(isinstance(param, Tensor) and id(param) in self._known for param in params):
            return groups
        return [{**group, "params": [(self._known[id(param)], param) for param in group["params"]]} for group in groups]

    def in_group(self, group: dict[str, Any], others: list[dict[str, Any]]) -> dict[str, Any]:
        """A further group with names where the others have them: torch asks for all or none."""
        params = group["params"]
        params = [params] if isinstance(params, Tensor) else list(params)
        if not any("param_names" in other for other in others) or any(isinstance(param, tuple) for param in params):
            return {**group, "params": params}
        self.refresh()
        first = sum(len(other["params"]) for other in others)
        named = [(self._known.get(id(param), f"added.{first + i}"), param) for i, param in enumerate(params)]
        return {**group, "params": named}
