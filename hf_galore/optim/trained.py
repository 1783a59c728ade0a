"""One parameter of an optimizer, and what it is where it trains full-rank.

What follows from options and shape is worked out here, once, and is never in the state.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor

from ..int8 import Int8Weight, add_int8_, is_int8
from ..lowrank.nonfinite import Skip
from ..lowrank.projection import norm_of
from ..lowrank.ranks import Ranks
from ..lowrank.rounding import add_rounded_, generator_for
from ..rules import Rule
from .bases import ON_HOST, State
from .groups import Group, check_fits
from .report import Journal

if TYPE_CHECKING:
    from .target import Target


class Place(NamedTuple):
    """Where a parameter is in an optimizer's groups."""

    group: int
    position: int


class Owner(Protocol):
    """What a parameter needs of its optimizer, whose groups are replaced by loading, and whose state anybody may."""

    param_groups: list[dict[str, Any]]
    state: Any
    journal: Journal

    def name_of(self, param: Tensor) -> str:
        """The name of a parameter."""

    def targets(self) -> Sequence[Target]:
        """All parameters that are projected."""


class Trained:
    """What a target and a full-rank parameter have in common.

    Args:
        owner: the optimizer; referred to weakly.
        param: the parameter.
        place: where it is in the optimizer's groups.
        index: of the parameter in the optimizer.
        rule: turns its gradients into directions.
    """

    projected = False
    """Whether it is a target."""
    moment_keys: tuple[str, ...]
    """The keys of the state that hold its moments."""
    basis_keys: tuple[str, ...] = ()
    """The keys of the state that hold its bases."""
    needs_gradient: str | None = None
    """What of its options needs the gradient itself, besides R, as a message says it; `None` where nothing does."""
    whole_keys: tuple[str, ...] = ()
    """The keys of the state that hold what goes with the gradient itself: its limit, or a momentum of its residual."""

    def __init__(self, owner: Owner, param: Tensor, place: Place, index: int, rule: Rule) -> None:
        self.param = param
        self.index = index
        self._owner = weakref.ref(owner)
        self._place_in_groups = place
        self._rule = rule
        self._options = _options_of(self.group)
        self._fits = False  # whether the state is known to be of these options and this shape
        self._derive()

    def is_current(self) -> bool:
        """Whether the parameter is still in its place, with the options that all this follows from."""
        groups, (group_index, position) = self.owner.param_groups, self._place_in_groups
        if group_index >= len(groups):
            return False
        group = groups[group_index]
        params = group["params"]
        return position < len(params) and params[position] is self.param and _options_of(group) == self._options

    def _derive(self) -> None:
        """Work out what follows from the options and the shape."""
        self._shape = self.param.shape
        shape, group = self._shape_of_gradient(), self.group
        self.rule = self._rule_for(shape, group)
        self._moments = self.rule.moments(shape, self.param.dtype, group)
        self.moment_keys = tuple(self._moments)

    def _rule_for(self, shape: tuple[int, ...], group: Group) -> Rule:
        """The rule for moments of a gradient of a shape."""
        return self._rule.for_shape(shape, group)

    def _shape_of_gradient(self) -> tuple[int, ...]:
        """The shape of the gradient that its moments are of."""
        return tuple(self._shape)

    @property
    def owner(self) -> Owner:
        """The optimizer.

        Raises:
            RuntimeError: it is gone.
        """
        owner = self._owner()
        if owner is None:
            raise RuntimeError("The optimizer of this parameter is gone. Set what is left in .grad to None.")
        return owner

    @property
    def is_orphan(self) -> bool:
        """Whether the optimizer is gone."""
        return self._owner() is None

    @property
    def name(self) -> str:
        """Its name in the model, or words for it where none is known."""
        return self.owner.name_of(self.param)

    # ---- where several processes have a part of it each (`hf_galore.optim.sharded`), these differ

    @property
    def weight(self) -> Tensor:
        """What updates move: the parameter, or this process's part of it."""
        return self.param

    @property
    def local(self) -> Any:
        """What has the gradient of `weight` in its `.grad`."""
        return self.param

    @property
    def ranks(self) -> Ranks | None:
        """The processes that have a part of it each."""
        return None

    def over_ranks(self, norm: Tensor) -> Tensor:
        """The norm of all parts together, from that of this process's."""
        return norm if self.ranks is None else self.ranks.norms([norm])[0]

    def to_saved(self, state: State) -> State:
        """A state as a checkpoint has it."""
        return state

    def of_saved(self, saved: State) -> State:
        """The state that a checkpoint has."""
        return saved

    def saved_shapes(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """What a checkpoint has to have of it."""
        return {key: (tuple(value.shape), value.dtype) for key, value in self.new_state_on_meta().items()}

    # ---- what it is

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the parameter that moments and bases were made for."""
        return self._shape

    @property
    def group(self) -> Group:
        """Its parameter group, which schedulers move and loading replaces."""
        return self.owner.param_groups[self._place_in_groups.group]

    @property
    def present_state(self) -> State:
        """What the optimizer keeps of it; empty where that is yet to be made."""
        return cast("State", self.owner.state.get(self.param, {}))

    @property
    def state(self) -> State:
        """What the optimizer keeps of it; made where there is none.

        Raises:
            ValueError: it is of another shape or other options than the parameter has now.
        """
        states = self.owner.state
        state = cast("State", states[self.param])
        # Frozen when the optimizer was made, or forgotten on purpose; or of a model that had no numbers yet.
        if not state or (not self.weight.is_meta and any(value.is_meta for value in state.values())):
            self._derive()
            state = states[self.param] = self.new_state(self.weight)
            self._fits = True
        elif not self._fits or self.param.shape != self._shape:
            check_fits(self.name, self.param.shape, state, self.new_state_on_meta())
            self._fits = True
        return state

    def new_state_on_meta(self) -> State:
        """The state that would be made now, of the parameter's present shape and options: its shapes and dtypes."""
        now = type(self)(self.owner, self.param, self._place_in_groups, self.index, self._rule)
        with torch.device("meta"):
            return now.new_state(self.weight.detach().to("meta"))

    def new_state(self, like: Tensor) -> State:
        """A state before the first step, on the device of `like`."""
        moments = {key: like.new_zeros(moment.shape, dtype=moment.dtype) for key, moment in self._moments.items()}
        return {"step": torch.tensor(0.0), **moments}

    def moments(self) -> State:
        """Its moments, on its device: the model may have been moved since."""
        state = self.state
        self._place(state, self.moment_keys)
        return {key: state[key] for key in self.moment_keys}

    def _place(self, state: State, keys: tuple[str, ...], dtype: torch.dtype | None = None) -> None:
        """Move what the state has under these keys to the parameter, and cast it."""
        device = self.param.device
        for key in keys:
            value = state[key]
            if value.device != device or (dtype is not None and value.dtype != dtype):
                state[key] = value.to(device, dtype)

    def _place_on_host(self, state: State) -> None:
        """Take counters back that somebody has moved along with all other state: reading one would wait each time.

        Lightning does so, and functions of many loops (`optimizer_to(optimizer, device)`).
        """
        for key in ON_HOST:
            if key in state and state[key].device.type != "cpu":
                state[key] = state[key].to("cpu")

    # ---- the update

    def step(self, gradient: Tensor, norm: Tensor | None = None) -> None:
        """One optimizer step from the gradient, which is left as it is.

        Args:
            gradient: G.
            norm: ‖G‖, where it is known already.

        Raises:
            RuntimeError: the gradient is sparse.
        """
        if gradient.is_sparse:
            raise RuntimeError(
                f"GaLore cannot use sparse gradients, but that of {self.name} is. Build the embedding with "
                "sparse=False."
            )
        self._step(gradient, norm)

    def _step(self, gradient: Tensor, norm: Tensor | None) -> None:
        raise NotImplementedError

    def _begin(self, state: State, skip: Skip) -> int | None:
        """Count an update, unless it is known to be skipped.

        On a GPU only the device knows, and what was counted is taken back when the host reads it.

        Returns:
            The number of the update, from 1; `None` where the host knows that it is skipped.
        """
        self._place_on_host(state)
        step = int(state["step"].item()) + 1
        if skip.known is None:
            self.owner.journal.skipped.note(self.param, skip.norm, step)
        elif skip.known:
            self.owner.journal.skipped.note_known(self.param, step)
            return None
        # Out of place: under fake tensors the value of a CPU scalar survives that, and not `+=`.
        state["step"] = state["step"] + 1
        return step

    def _rounds_stochastically(self, group: Group) -> bool:
        """Whether updates are rounded at random: those of weights in 8 bits always, as most are below half a step."""
        if is_int8(self.param):
            return True
        return bool(group.get("stochastic_rounding")) and self.param.dtype == torch.bfloat16

    @property
    def _is_precise(self) -> bool:
        """Whether the weight is one of numbers that sums with it need not be rounded to."""
        return self.weight.dtype in (torch.float32, torch.float64) and not is_int8(self.weight)

    def _rounding_seed(self, group: Group) -> int:
        return int(group["rounding_seed"])

    def _add_rounded(
        self, weight: Tensor, group: Group, update: Callable[[slice], Tensor], alpha: float, step: int, skip: Skip
    ) -> None:
        """Add an update to the weight, in one rounding with the decay: stochastically if the group says so."""
        generator = None
        if self._rounds_stochastically(group):
            generator = generator_for(self.param.device, self._rounding_seed(group), self.index, step)
        how: Any = {"alpha": alpha, "decay": decay_of(group), "skip": skip.flag, "generator": generator}
        if isinstance(weight, Int8Weight):
            add_int8_(weight, update, **how)
        else:
            add_rounded_(weight, update, **how)


class FullRank(Trained):
    """A parameter that trains as it would without GaLore."""

    def _step(self, gradient: Tensor, norm: Tensor | None) -> None:
        state, group, weight = self.state, self.group, self.weight
        skip = Skip(self.over_ranks(norm_of(gradient)) if norm is None else norm)
        step = self._begin(state, skip)
        if step is None:
            return
        moments = self.moments()
        to_nearest = weight.is_contiguous() and not self._rounds_stochastically(group)
        if to_nearest and self.rule.update_(weight, gradient, moments, group, step, skip):
            return
        direction, factor = self.rule.direction(gradient, moments, group, step, skip)
        rows = direction.reshape(-1) if direction.ndim == 0 else direction
        self._add_rounded(weight, group, rows.__getitem__, -factor, step, skip)


_SHAPING = (
    *("rank", "proj_type", "proj_bits", "rule", "lazy_refresh", "view_as", "residual", "residual_bits", "scaling"),
)


def _options_of(group: Group) -> tuple[Any, ...]:
    """The options of a group that shapes follow from."""
    return tuple(map(group.get, _SHAPING))


def decay_of(group: Group) -> float:
    """The factor of weight decay, 1 − ηλ."""
    return 1 - float(group["lr"] * group["weight_decay"])
