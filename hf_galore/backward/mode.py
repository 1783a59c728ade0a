"""What hooks into the backward passes of one model have in common for all its parameters."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from ..integrations.accelerate import closes_window
from ..log import logger
from .stand_in import HOLD

if TYPE_CHECKING:
    from .window import Window


@dataclasses.dataclass
class Mode:
    """What holds for all windows of a model."""

    layerwise: bool
    """Whether weights are updated during the backward pass."""
    projected_backward: bool
    """Whether linear targets compute R without building their gradient."""
    hold_gradients: bool
    """Whether layerwise keeps R until `step()`."""
    accumulating: bool = False
    """Whether the present window has more than one micro-batch."""
    whole_norms: bool = True
    """Whether the norm of a gradient that was built is G's, and not R's."""
    said_dropped: bool = False
    instead: str = HOLD
    """What keeps gradients until `step()`, in words."""
    touched: dict[int, Window] = dataclasses.field(default_factory=dict)
    """The windows that the present step's backward passes have come to, in that order, by their parameters' ids."""

    def must_hold(self) -> bool:
        """Whether gradients are kept until `step()`."""
        # The last micro-batch of several holds as the others did.
        self.accumulating = self.accumulating or not closes_window()
        return not self.layerwise or self.hold_gradients or self.accumulating

    def start_window(self) -> None:
        """Forget what the backward passes have come to, and whether there were several."""
        self.touched.clear()
        self.accumulating = False

    def say_dropped(self, name: str) -> None:
        """Warn, once, that gradients were dropped after weights had been updated with them.

        Args:
            name: of one of the weights.
        """
        if not self.said_dropped:
            self.said_dropped = True
            logger.warning(
                "The gradients of a backward pass were dropped, but a layerwise optimizer had updated weights with "
                "them already (%s for one), and these stay. To be able to drop them make the optimizer with %s. This "
                "is said once.",
                name,
                self.instead,
            )
