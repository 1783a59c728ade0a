"""When a target's bases are refreshed: its turns among the optimizer's targets, and those of each matrix of a stack."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from ..lowrank.projection import BasisShapes
from ..lowrank.schedule import NEVER, next_gap_factor, phase_of, refreshes_by, step_of_next_refresh
from ..rules import Rule
from .bases import Before, NewBasis, counter, numbers_of
from .trained import Owner, Place, Trained


class Turns(Trained):
    """The turns of a target, which `hf_galore.optim.target` has the rest of."""

    stack: int | None
    """How many matrices a stack has; `None` for one matrix."""
    rank: int
    _shapes: BasisShapes

    def __init__(self, owner: Owner, param: Tensor, place: Place, index: int, rule: Rule) -> None:
        super().__init__(owner, param, place, index, rule)
        self._phase: int | None = None
        self.refresh_asked = False
        """Whether the next step is to refresh the basis whatever its turn."""

    @property
    def phase(self) -> int:
        """The step of the gap at which it refreshes, spread over the optimizer's targets that are staggered."""
        if self._phase is None:
            targets = self.owner.targets()
            staggered = [target for target in targets if target.group["stagger"]]
            turns = {id(target): turn for turn, target in enumerate(staggered)}
            for target in targets:  # all at once, as options may change before others are asked
                turn = turns.get(id(target))
                gap = target.group["update_proj_gap"]
                target._phase = 0 if turn is None else phase_of(turn, len(staggered), gap)
        assert self._phase is not None
        return self._phase

    def refresh_counts(self) -> tuple[int, int | None]:
        """How many refreshes there were, and with `lazy_refresh` how many it has saved."""
        state, group = self.present_state, self.group
        done = max(numbers_of(state["refreshes"]))  # of a stack those that all of its matrices could have had
        if not group["lazy_refresh"]:
            return done, None
        return done, refreshes_by(int(state["step"].item()), group["update_proj_gap"], self.phase) - done

    def due(self) -> bool:
        """Whether the next step is one with a new basis: the first, and every `update_proj_gap`-th."""
        if self.refresh_asked:
            return True
        return bool(self.matrices_due())

    def matrices_due(self) -> list[int]:
        """The matrices that refresh at the next step, if they have a gradient then: 0 for one that is no stack."""
        state, gap = self.state, self.group["update_proj_gap"]
        self._place_on_host(state)
        last = numbers_of(state["refreshed_at"])
        if self.refresh_asked:
            return list(range(len(last)))
        factors = numbers_of(state["gap_factor"]) if "gap_factor" in state else [1] * len(last)
        step = int(state["step"].item())
        # Of many experts most have had their refresh together.
        pairs = list(zip(last, factors, strict=True))
        next_of = {pair: step_of_next_refresh(pair[0], gap, self.phase, pair[1]) for pair in set(pairs)}
        return [index for index, pair in enumerate(pairs) if step >= next_of[pair]]

    def _lengthen_gaps(self, made: NewBasis, before: Before) -> None:
        """Set how many gaps those matrices wait that had a basis before their new one."""
        chance = max(self.rank / shape[-2] for shape in self._shapes if shape is not None)
        factors = numbers_of(self.state["gap_factor"])
        if made.of_stack is None:
            if before.had_basis:
                self.state["gap_factor"] = counter(next_gap_factor(factors[0], made.overlap, chance))
            return
        last = numbers_of(before.entries["refreshed_at"])
        for index, overlap in zip(*made.of_stack, strict=True):
            if last[index] != NEVER:
                factors[index] = next_gap_factor(factors[index], overlap, chance)
        self.state["gap_factor"] = counter(factors)


def forget_phases(parameters: Iterable[Trained]) -> None:
    """Let the phases of targets be worked out anew."""
    for target in parameters:
        if isinstance(target, Turns):
            target._phase = None
