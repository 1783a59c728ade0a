"""The part in a step of a target whose update needs the gradient itself, beside R: a residual, or scaling.

Autograd builds the gradient for that one layer, and the update that follows at once drops it: no two are alive at a
time. What waits until `step()` would keep the gradients of all, so that it is refused.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..lowrank.products import FactoredGradient, GroupedGradient
from ..lowrank.projection import Bases, norm_of
from .mode import Mode
from .processes import world_size
from .stand_in import HOLD, LowRankTensor
from .window import Window

if TYPE_CHECKING:
    from ..optim.bases import NewBasis
    from ..optim.residual import TargetOfGradient
    from ..optim.trained import Trained

PLAIN = "layerwise=False (with a Trainer: an optim without _layerwise)"
"""For messages: what has the gradients themselves until the step."""


def window_for(trained: Trained, mode: Mode, handle: Any, is_tied: bool) -> Window:
    """The part that a parameter has in a step.

    Args:
        trained: the parameter.
        mode: of the hooks.
        handle: takes the hook off the parameter, by `remove()`.
        is_tied: whether it is an embedding's and another module's. Of shards that is found out in the backward pass.
    """
    window = (Window if trained.needs_gradient is None else WholeWindow)(trained, mode, handle)
    window.is_shared = is_tied and trained.ranks is None
    return window


def check_may_hold(parameters: Iterable[Trained], why: str, otherwise: str) -> None:
    """Check that no update needs a gradient that is to be held until the step.

    Args:
        parameters: of a layerwise optimizer.
        why: gradients are to be held, in words that begin a sentence: `hold_gradients=True`.
        otherwise: what to do to let them be used at once, in words.

    Raises:
        ValueError: one does.
    """
    found = next((trained for trained in parameters if trained.needs_gradient), None)
    if found is not None:
        raise ValueError(
            f"{why} holds gradients until the step, and {found.needs_gradient} of {found.name} needs them whole: "
            f"layerwise would keep those of all layers, which it is there not to do. {otherwise}, or make the "
            f"optimizer with {PLAIN}; or leave out {found.needs_gradient}."
        )


def instead_of_using(parameters: Iterable[Trained]) -> str:
    """What keeps the gradients of a layerwise optimizer for its step, in words."""
    return PLAIN if any(trained.needs_gradient for trained in parameters) else HOLD


class WholeWindow(Window):
    """The part of a target whose update needs the gradient itself."""

    def gradient_of(self, factors: FactoredGradient | GroupedGradient) -> Tensor | None:
        """`None`: autograd builds G."""
        return None

    def bases_for_rows(self) -> Bases | None:
        """`None`, likewise."""
        return None

    def _receive_target(self) -> None:
        if self.exchange is None and self.trained.ranks is None and world_size() > 1:
            return  # of this process alone: the step says so
        self._check_alone()
        if self.exchange is not None:
            if self.exchange.kind(self) is not None:  # else it is of no pass in the wrapper, which the step says
                self.exchange.receive(self)
            return
        whole, self.param.grad = self.param.grad, None
        assert whole is not None
        assert not isinstance(whole, LowRankTensor)
        self.use_whole(whole)

    def _check_alone(self) -> None:
        """Check that what has come is all that the step is to be made with.

        Raises:
            RuntimeError: it is not.
        """
        if not self._must_hold():
            return
        if self._mode.hold_gradients:
            found = "hold_gradients is set"
        elif self.passes.count() > 1:
            found = (
                "several reentrant checkpoints use the weight, each of which brings a gradient of its own. Take "
                "gradient_checkpointing_kwargs={'use_reentrant': False}"
            )
        else:
            found = "this step has several micro-batches. Take larger ones, with gradient_accumulation_steps of 1"
        option, name = self.trained.needs_gradient, self.trained.name
        raise RuntimeError(
            f"{option} of {name} needs the whole gradient of a step, and layerwise would have to keep it until then, "
            f"as {found}, or make the optimizer with {PLAIN}; or leave out {option}."
        )

    def use_whole(self, whole: Tensor) -> None:
        """Update the weight with G, which may be overwritten."""
        with torch.no_grad():
            self._norm = norm_of(whole)
            self._target.use(whole, self.trained.over_ranks(self._norm), spare=True)
        self._leave_used()

    def use_refresh_of(self, made: NewBasis, whole: Tensor) -> None:
        """Update the weight with G, which may be overwritten, in the bases that a process has made from it."""
        self._norm = norm_of(whole)
        self._target.use_refreshed(made, whole, self._norm, spare=True)
        self._leave_used()

    @property
    def _target(self) -> TargetOfGradient:
        target: Any = self.target
        if self.trained.needs_gradient is None:
            raise RuntimeError(
                f"The hooks of {self.trained.name} were made for its whole gradient, which the options of its group "
                "need no more. Make the optimizer anew after a change of options."
            )
        return target  # type: ignore[no-any-return]
