"""The optimizer that the three of `hf_galore.optim.classes` are thin over: groups, bases, projection, hooks, loading.

State is plain tensors, made at construction with a fixed set of keys and shapes, so that a checkpoint loads with
`weights_only=True`, into tensors that are already there. What follows from the group and the shape (side, rank)
is not in it.
"""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypedDict, cast, overload

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from ..backward.gradient import BasisVersion, LowRankGradient, UsedGradient
from ..config import GaLoreConfig
from ..log import logger
from ..lowrank.nonfinite import Skipped, SkippedUpdates, has_numbers, known_skip, skip_unless_finite
from ..lowrank.projection import (
    Bases,
    Gradient,
    add_projected_back_,
    basis_shapes,
    is_projectable,
    low_rank_shape,
    norm_of,
    project,
    projected_back,
    side_of,
)
from ..lowrank.refresh import bases_of_lower_rank, figures_of, new_bases, products
from ..lowrank.rotation import Rotation, rotation_between
from ..lowrank.rounding import add_rounded_, decay_unless, generator_for
from ..lowrank.schedule import NEVER, next_gap_factor, phase_of, refreshes_by
from .admission import check_parameters
from .bases import (
    ON_HOST,
    Before,
    NewBasis,
    State,
    as_before,
    before_refresh,
    count_refresh,
    kept_bases,
    new_basis_state,
    read_bases,
    refresh_due,
    refreshed_at,
    take_back,
)
from .groups import (
    Group,
    ParamOptions,
    check_group_keys,
    check_options,
    check_plain_state,
    check_same_names,
    check_same_options,
    check_unchanged,
    is_target,
    split_groups,
    with_names,
)
from .report import Memory, Refresh, RefreshLog, Stopwatch

if TYPE_CHECKING:
    from ..backward.hooks import BackwardHooks


class GaLoreOptions(TypedDict, total=False):
    """What every GaLore optimizer takes besides its hyperparameters, all by keyword."""

    param_options: ParamOptions | None
    """Group entries for single parameters (`{weight: {"rank": 128}}`): a group with such parameters is split. The way
    to project parameters of groups that somebody else has made."""
    module: nn.Module | None
    """The model that the parameters belong to: names them in messages; needed by the options below. (Not called
    `model`: a Trainer takes that from an optimizer's arguments.)"""
    layerwise: bool
    """Whether to update each weight during the backward pass, so that no two gradients are alive at a time."""
    projected_backward: bool | None
    """Whether linear layers compute their low-rank gradient without the gradient; by default as `layerwise`."""
    hold_gradients: bool
    """Whether layerwise holds low-rank gradients until `step()`, as clipping needs; an accumulation does so itself."""
    stochastic_rounding: bool
    """Whether updates of bfloat16 weights are rounded stochastically, from torch's initial seed."""


class GaLoreOptimizer(torch.optim.Optimizer):
    """What the three optimizers share: groups, bases, projection, hooks into the backward pass, loading.

    A subclass says what its moments are (`_new_moments`) and how they turn a gradient into a direction.
    """

    _hooks: BackwardHooks | None
    _owner: weakref.ref[nn.Module] | None  # of the parameters

    def __init__(
        self,
        params: Iterable[Any],
        defaults: dict[str, Any],
        **options: Unpack[GaLoreOptions],
    ) -> None:
        check_options(type(self).__name__, options, [*GaLoreOptions.__annotations__, *defaults])
        model = options.get("module")
        layerwise = options.get("layerwise", False)
        projected_backward = options.get("projected_backward")
        self._init_unsaved()
        if model is not None:
            self._owner = weakref.ref(model)
            self._learn_names(model)
        groups = split_groups(params, options.get("param_options") or {})
        if options.get("stochastic_rounding", False):
            # In the groups, so that a resumed run goes on with the numbers of the first.
            defaults = {**defaults, "stochastic_rounding": True, "rounding_seed": torch.initial_seed()}
        super().__init__(with_names(groups, self._names), defaults)
        check_parameters(((self.name_of(param), param) for param in self._params()), model)
        self._check_stochastic_rounding()
        self._say_if_decay_is_lost()
        if projected_backward is None:
            projected_backward = layerwise
        if layerwise or projected_backward:
            if model is None:
                raise ValueError(
                    f"{type(self).__name__} hooks into the backward pass of the model for layerwise=True and "
                    "projected_backward=True: pass it, module=model."
                )
            from ..backward.hooks import BackwardHooks

            self._hooks = BackwardHooks(
                self,
                model,
                layerwise=layerwise,
                projected_backward=projected_backward,
                hold_gradients=options.get("hold_gradients", False),
            )

    def _init_unsaved(self) -> None:
        """What is not in `state_dict()` and not copied."""
        self._hooks = None
        self._skipped = SkippedUpdates()
        self._warned_of_skipped = False
        self._owner = None
        self._names: dict[int, str] = {}
        self._refresh_log = RefreshLog()
        self._refresh_next: set[int] = set()  # targets, by their id
        self._indices: dict[int, int] = {}  # of the parameters, by their id
        self._phases: dict[int, int] = {}  # of the targets, likewise
        self._versions: dict[int, BasisVersion] = {}  # likewise
        self._shapes: dict[int, torch.Size] = {}  # that states were made for, by the parameter's id

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_hooks" not in self.__dict__:  # a copy: torch's optimizers copy groups and state only
            self._init_unsaved()

    # ---- groups and state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group and make its state.

        Raises:
            ValueError: GaLore's options are out of range, or a parameter of a group with a `rank` is not a matrix.
        """
        check_group_keys(param_group)
        config = GaLoreConfig.from_group(param_group)
        if config is not None:
            param_group = {**param_group, **config.group_options()}
        if param_group.get("stochastic_rounding", self.defaults.get("stochastic_rounding")):
            param_group = {"rounding_seed": torch.initial_seed(), **param_group}
        super().add_param_group(self._with_names(param_group))
        self._indices, self._phases = {}, {}
        group = self.param_groups[-1]
        try:
            self._check_group(group)
            check_parameters((self.name_of(param), param) for param in self._params())
        except ValueError:
            del self.param_groups[-1]
            raise
        for param in group["params"]:
            if param.requires_grad:
                self._make_state(param, group)
        if self._hooks is not None and self._hooks.attached:
            self._hooks.attach_new()

    def _learn_names(self, model: nn.Module) -> None:
        self._names.update((id(param), name) for name, param in model.named_parameters())

    def _with_names(self, param_group: dict[str, Any]) -> dict[str, Any]:
        """A group with names where the others have them: torch asks for all or none."""
        params = param_group["params"]
        params = [params] if isinstance(params, Tensor) else list(params)
        if not any("param_names" in group for group in self.param_groups) or any(isinstance(p, tuple) for p in params):
            return {**param_group, "params": params}
        model = None if self._owner is None else self._owner()
        if model is not None:
            self._learn_names(model)
        first = sum(len(group["params"]) for group in self.param_groups)
        named = [(self._names.get(id(param), f"added.{first + i}"), param) for i, param in enumerate(params)]
        return {**param_group, "params": named}

    def _check_group(self, group: Group) -> None:
        for param, name in zip(group["params"], group.get("param_names", ()), strict=False):
            self._names.setdefault(id(param), name)
        full_rank = []
        for param in group["params"]:
            if _is_dtensor(param):
                raise ValueError(
                    "GaLore cannot train a parameter that is sharded over processes (a DTensor, as FSDP2 makes "
                    "them). Run it on one GPU, or under DDP without a layerwise optimizer."
                )
            if "rank" not in group:
                continue
            if param.ndim != 2:
                raise ValueError(
                    f"Only matrices can be projected, but {self.name_of(param)} has {param.ndim} dimension(s): "
                    f"{tuple(param.shape)}. Move it to a group without a rank."
                )
            if not is_projectable(param.shape, group["rank"]):
                full_rank.append(self.name_of(param))
        if full_rank:
            logger.info(
                "Trained full-rank, because rank %d is not below the smaller side: %s.",
                group["rank"],
                ", ".join(full_rank),
            )

    def _check_stochastic_rounding(self) -> None:
        rounded = [p for group in self.param_groups if group.get("stochastic_rounding") for p in group["params"]]
        if rounded and not any(param.dtype == torch.bfloat16 for param in rounded):
            found = ", ".join(sorted({str(param.dtype) for param in rounded}))
            raise ValueError(
                f"stochastic_rounding is for bfloat16 weights, but these are {found}, which lose nothing that it could "
                "save. Leave it out, or load the model in bfloat16."
            )

    def _say_if_decay_is_lost(self) -> None:
        """Say which weights neither their decay nor an update moves by half a unit in the last place."""
        moves: list[float] = []  # of an element, relative to half a unit in the last place of 1
        sizes: list[Tensor] = []
        for group in self.param_groups:
            rate, decay = float(group["lr"]), float(group["lr"] * group["weight_decay"])
            if decay == 0 or group.get("stochastic_rounding"):
                continue
            for param in group["params"]:
                half = torch.finfo(param.dtype).eps / 4  # of the larger numbers between two powers of 2
                if torch.finfo(param.dtype).bits >= 32 or decay >= half or not has_numbers(param) or not param.numel():
                    continue
                # Adam's direction has elements of about 1, of which a target gets a part.
                part = group["scale"] * (group["rank"] / min(param.shape)) ** 0.5 if is_target(param, group) else 1.0
                moves.append(rate * part / half)
                sample = param.detach().view(-1)[:4096] if param.is_contiguous() else param.detach()
                sizes.append(norm_of(sample) / sample.numel() ** 0.5)
        if not sizes:
            return
        measured = torch.stack([size.cpu() for size in sizes]).tolist()
        lost = sum(move < size for move, size in zip(moves, measured, strict=True))
        if lost:
            logger.warning(
                "Weight decay does nothing to %d weight(s) of less than float32: at these learning rates it is rounded "
                "away, as most of each update is. stochastic_rounding=true keeps both.",
                lost,
            )

    def name_of(self, param: Tensor) -> str:
        """The name of a parameter in the model, or words for it where none is known."""
        return self._names.get(id(param), f"a parameter of shape {tuple(param.shape)}")

    def _new_state(self, param: Tensor, group: Group) -> State:
        shape: tuple[int, ...] = tuple(param.shape)
        bases: State = {}
        if is_target(param, group):
            bases = new_basis_state(param, group)
            shape = low_rank_shape(shape, side_of(shape, group["proj_type"]), group["rank"])
        return {"step": torch.tensor(0.0), **bases, **self._new_moments(param, shape, group)}

    def _new_moments(self, param: Tensor, shape: tuple[int, ...], group: Group) -> State:
        """Moments for a gradient of `shape`: that of the parameter, or low-rank for a target."""
        raise NotImplementedError

    def _make_state(self, param: Tensor, group: Group) -> State:
        state = self._new_state(param, group)
        self.state[param] = state
        self._shapes[id(param)] = param.shape
        return state

    def _state_of(self, param: Tensor, group: Group) -> State:
        state = cast("State", self.state[param])
        if not state:  # frozen when the optimizer was made
            state = self._make_state(param, group)
        if self._shapes.get(id(param), param.shape) != param.shape:
            check_unchanged(self.name_of(param), param.shape, state, self._new_state(param, group))
        # The model may have been moved or cast since: a basis goes with its weight, all else keeps its precision.
        for key, value in state.items():
            if key in ON_HOST:
                continue
            dtype = param.dtype if key.startswith("basis") and group["proj_bits"] == 16 else value.dtype
            if value.device != param.device or value.dtype != dtype:
                state[key] = value.to(param.device, dtype)
        return state

    def _index_of(self, param: Tensor) -> int:
        if not self._indices:
            self._indices = {id(param): index for index, param in enumerate(self._params())}
        return self._indices[id(param)]

    def _phase_of(self, param: Tensor) -> int:
        """The step of the gap at which a target refreshes, spread over the targets that are staggered."""
        if not self._phases:
            staggered = [(param, group) for param, group in self.targets() if group["stagger"]]
            phases = {id(param): 0 for param, _ in self.targets()}
            for index, (target, group) in enumerate(staggered):
                phases[id(target)] = phase_of(index, len(staggered), group["update_proj_gap"])
            self._phases = phases  # whole: another autograd thread may read it
        return self._phases[id(param)]

    # ---- the update

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient; with hooks, those that they left.

        A parameter whose gradient, or low-rank gradient, is not finite is skipped: it, its moments and its count of
        updates stay as they are, and a warning says so, at once on a CPU and with the Trainer's next log on a GPU.
        Gradients stay in `.grad`, as in torch's optimizers, but for those that the backward pass has used.

        Raises:
            RuntimeError: gradients were dropped that a layerwise optimizer had used already, or kept over a refresh.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._hooks is not None:
            self._hooks.check_processes()
            self._hooks.check_not_dropped()
            self._hooks.look()
        for group in self.param_groups:
            for param in group["params"]:
                if isinstance(param.grad, LowRankGradient) and param.grad.addend is None:
                    self._update_held(param, group, param.grad)
                elif param.grad is not None and not isinstance(param.grad, UsedGradient):
                    self.update_parameter(param, group)
        self._refresh_next.clear()
        if self._hooks is not None:
            self._hooks.start_window()
            if any(self._hooks.lacks_hooks(param, group) for group in self.param_groups for param in group["params"]):
                self._hooks.attach_new()
        if all(param.device.type == "cpu" for group in self.param_groups for param in group["params"][:1]):
            self.warn_of_skipped()
        return loss

    def _update_held(self, param: Tensor, group: Group, gradient: LowRankGradient) -> None:
        """One optimizer step of a target from the low-rank gradient that its hook has left in `.grad`.

        Raises:
            RuntimeError: the gradient is in another basis than the present one.
        """
        before = None if self._hooks is None else self._hooks.before(param)
        if not gradient.is_zero and gradient.basis is not self.basis_version(param, group):
            raise RuntimeError(
                f"The low-rank gradient in {self.name_of(param)}.grad is in an earlier basis than the present one: it "
                "was kept over a refresh, or over a backward pass that was dropped. Call optimizer.zero_grad() after "
                "each step; to keep gradients make the optimizer with layerwise=False and projected_backward=False."
            )
        self.update_low_rank(param, group, gradient.low_rank, before=before)

    @torch.no_grad()
    def update_parameter(self, param: Tensor, group: Group) -> None:
        """One optimizer step of one parameter from its `.grad`, which is left as it is.

        Raises:
            RuntimeError: the gradient is sparse.
        """
        gradient = param.grad
        assert gradient is not None
        if isinstance(gradient, LowRankGradient):
            assert gradient.addend is not None
            gradient = gradient.addend
        if gradient.is_sparse:
            raise RuntimeError(
                f"{type(self).__name__} cannot use sparse gradients. Build the embedding with sparse=False."
            )
        if is_target(param, group):
            low_rank = self.project_gradient(param, group, gradient, refresh=self.refresh_due(param, group))
            self.update_low_rank(param, group, low_rank)
            return
        state = self._state_of(param, group)
        step, skip = self._begin_update(param, state, norm_of(gradient))
        if step is not None:
            self._update_full_rank(param, gradient, state, group, step, skip)

    def _begin_update(self, param: Tensor, state: State, norm: Tensor) -> tuple[int | None, Tensor]:
        """Count an update, unless it is skipped because the gradient is not finite.

        Args:
            norm: of the gradient, 0-dimensional.

        Returns:
            The number of the update, from 1, and 1 where it has to be skipped, as `skip_unless_finite` gives it. `None`
            for a number where the host knows that it is skipped; on a GPU only the device does, and `warn_of_skipped`
            takes back what was counted.
        """
        skip = skip_unless_finite(norm)
        step = int(state["step"].item()) + 1
        known = known_skip(skip)
        if known is None:
            self._skipped.note(param, skip, step)
        elif known:
            self._skipped.note_known(param, step)
            return None, skip
        # Out of place: under fake tensors the value of a CPU scalar survives that, and not `+=`.
        state["step"] = state["step"] + 1
        return step, skip

    def refresh_next(self, params: Iterable[Tensor]) -> None:
        """Let the next step refresh the bases of these targets, whatever their turn; turns stay as they are."""
        self._refresh_next.update(id(param) for param in params)

    def refresh_due(self, param: Tensor, group: Group) -> bool:
        """Whether the next step of a target is one with a new basis: the first, and every `update_proj_gap`-th."""
        return id(param) in self._refresh_next or refresh_due(
            group, self._state_of(param, group), self._phase_of(param)
        )

    def refreshes_from_factors(self, param: Tensor, group: Group, tokens: int) -> bool:
        """Whether a refresh of a target takes fewer multiply-adds from δ and X of `tokens` rows than from G = δᵀX."""
        if group["refresh"] == "svd":
            return False
        m, n = param.shape
        rank, side = group["rank"], side_of(param.shape, group["proj_type"])
        narrow = products((m, n), rank, side, group["refresh"]) + 1  # and R
        return bool(narrow * tokens * rank * (m + n) < tokens * m * n + narrow * rank * m * n)

    def bases_of(self, param: Tensor, group: Group) -> Bases:
        """The present bases of a target, in its dtype."""
        return read_bases(param, group, self._state_of(param, group))

    @torch.no_grad()
    def project_gradient(self, param: Tensor, group: Group, gradient: Gradient, *, refresh: bool) -> Tensor:
        """The low-rank gradient R of a target, with new bases from this gradient where `refresh` says so.

        A gradient that is zero or not finite makes no basis: the refresh stays due. R is NaN of one that is not finite.
        """
        if not refresh:
            return project(gradient, self.bases_of(param, group))
        made = self.new_basis(param, group, gradient)
        if made.usable:
            before = self.use_basis(param, group, made, self.new_version(param, group), keep=False)
            self._carry_moments(param, group, self._state_of(param, group), before)
        return made.low_rank

    def basis_version(self, param: Tensor, group: Group) -> BasisVersion:
        """What low-rank gradients in the present basis of a target have in common."""
        return self._versions.get(id(param)) or self._present(param, self.new_version(param, group))

    def new_version(self, param: Tensor, group: Group) -> BasisVersion:
        """What low-rank gradients in a basis that is to come will have in common."""
        me, index = weakref.ref(self), next(i for i, other in enumerate(self.param_groups) if other is group)
        weight = weakref.ref(param)
        name = self.name_of(param)

        def low_rank(gradient: Tensor) -> Tensor:
            optimizer, target = me(), weight()
            if optimizer is None or target is None:
                raise RuntimeError(f"The optimizer of the low-rank gradient in {name}.grad is gone: set it to None.")
            return project(gradient, optimizer.bases_of(target, optimizer.param_groups[index]))

        return BasisVersion(name, low_rank)

    def _present(self, param: Tensor, version: BasisVersion) -> BasisVersion:
        self._versions[id(param)] = version
        return version

    @torch.no_grad()
    def new_basis(self, param: Tensor, group: Group, gradient: Gradient) -> NewBasis:
        """The bases of a target from a gradient, and its low-rank gradient in them. Changes nothing; waits once."""
        watch = Stopwatch(param.device)
        state = self._state_of(param, group)
        old = None if refreshed_at(state) == NEVER else read_bases(param, group, state)
        side = side_of(param.shape, group["proj_type"])
        computed = new_bases(gradient, side, group["rank"], group["refresh"], old)
        kept, low_rank, figures = self._figures(param, group, gradient, computed, old)
        norm, energy, shared, full = figures
        if not full and 0 < norm < math.inf:
            # Rare, so that it may wait once more; and it takes no more memory than the first time.
            del kept, low_rank
            computed = bases_of_lower_rank(gradient, side, group["rank"], group["refresh"], computed)
            kept, low_rank, (norm, energy, shared, _) = self._figures(param, group, gradient, computed, old)
        if norm == 0:
            low_rank.zero_()
        elif not math.isfinite(norm):
            low_rank.fill_(math.nan)  # an infinite element may meet a zero of the basis
        watch.stop()
        return NewBasis(kept, low_rank, norm, energy, shared, watch)

    def _figures(
        self, param: Tensor, group: Group, gradient: Gradient, computed: Bases, old: Bases | None
    ) -> tuple[State, Tensor, list[float]]:
        """New bases as they are kept, the gradient in them, and what there is to know of the refresh."""
        kept = kept_bases(computed, param, group)
        new = read_bases(param, group, kept)
        low_rank = project(gradient, new)
        figures = figures_of(gradient, low_rank, new, old, computed)
        # The one time that a refresh waits for the device.
        return kept, low_rank, [value.item() for value in figures.cpu().unbind()]

    def use_basis(self, param: Tensor, group: Group, made: NewBasis, version: BasisVersion, *, keep: bool) -> Before:
        """Let a target have new bases from now on.

        Args:
            made: usable.
            version: of the new bases.
            keep: whether the refresh may be taken back.

        Returns:
            What `update_low_rank` needs for the first update in the new bases, and `take_back_refresh`.
        """
        state = self._state_of(param, group)
        step = int(state["step"].item())
        before = before_refresh(state, keep=keep or group["moments"] == "rotate")
        count_refresh(state, step)
        for key, value in made.kept.items():
            state[key].copy_(value)
        if "gap_factor" in state and before.had_basis:
            shapes = basis_shapes(param.shape, side_of(param.shape, group["proj_type"]), group["rank"])
            chance = max(group["rank"] / shape[0] for shape in shapes if shape is not None)
            factor = next_gap_factor(int(state["gap_factor"].item()), made.overlap, chance)
            state["gap_factor"] = torch.tensor(float(factor))
        self._present(param, version)
        self._refresh_log.add(Refresh(made.captured_energy, made.overlap if before.had_basis else None, made.watch))
        return before

    def take_back_refresh(self, param: Tensor, group: Group, before: Before) -> None:
        """Let a target have the bases that it had: the gradient of its refresh was dropped."""
        take_back(self._state_of(param, group), before)
        self._versions.pop(id(param), None)

    def _carry_moments(self, param: Tensor, group: Group, state: State, before: Before) -> None:
        """What happens to the moments when the basis has changed."""
        step = int(state["step"].item())
        if not before.had_basis or step == 0:
            return
        if group["moments"] == "reset":
            for key, value in state.items():
                if key.startswith("exp_avg"):
                    value.zero_()
        elif group["moments"] == "rotate":
            old = read_bases(param, group, before.entries)
            self._rotate_moments(state, group, rotation_between(read_bases(param, group, state), old), step)

    def _rotate_moments(self, state: State, group: Group, rotation: Rotation, step: int) -> None:
        """Carry the moments of a target, which have had `step` updates, into its new basis."""
        raise NotImplementedError

    @torch.no_grad()
    def update_low_rank(
        self,
        param: Tensor,
        group: Group,
        low_rank: Tensor,
        norm: Tensor | None = None,
        *,
        before: Before | None = None,
    ) -> None:
        """One optimizer step of a target from its low-rank gradient R, which is left as it is.

        Args:
            norm: ‖R‖, where it is known already.
            before: from `use_basis`, where this is the first update after a refresh.
        """
        state = self._state_of(param, group)
        norm = norm_of(low_rank) if norm is None else norm
        if before is not None and before.complete and known_skip(skip_unless_finite(norm)):
            self.take_back_refresh(param, group, before)
            before = None
        if before is not None:
            self._carry_moments(param, group, state, before)
        step, skip = self._begin_update(param, state, norm)
        if step is None:
            return
        # Moments that began anew at the last refresh have a bias to correct that is no older.
        moments_step = step - refreshed_at(state) if group["moments"] == "reset" else step
        direction, step_size = self._direction(low_rank, state, group, moments_step, skip)
        bases = read_bases(param, group, state)
        alpha, decay = -step_size * group["scale"], _decay(group)
        if self._rounds_stochastically(param, group):
            update = functools.partial(projected_back, direction, bases)
            self._add_rounded(param, group, update, alpha, step, skip)
        elif decay == 1 or known_skip(skip) is False:
            add_projected_back_(param, direction, bases, alpha, decay=decay)
        elif param.dtype in (torch.float32, torch.float64):
            param.mul_(decay_unless(skip, param.dtype, decay))
            add_projected_back_(param, direction, bases, alpha)
        else:
            update = functools.partial(projected_back, direction, bases)
            add_rounded_(param, update, alpha=alpha, decay=decay, skip=skip)

    def _direction(self, gradient: Tensor, state: State, group: Group, step: int, skip: Tensor) -> tuple[Tensor, float]:
        """N for a gradient of the moments' shape, and the factor that it is subtracted with; updates the moments.

        Where `skip` is 1, N is zero and the moments stay. The gradient is left as it is.
        """
        raise NotImplementedError

    def _update_full_rank(
        self, param: Tensor, gradient: Tensor, state: State, group: Group, step: int, skip: Tensor
    ) -> None:
        direction, step_size = self._direction(gradient, state, group, step, skip)
        rows = direction.reshape(-1) if direction.ndim == 0 else direction
        if self._rounds_stochastically(param, group):
            self._add_rounded(param, group, rows.__getitem__, -step_size, step, skip)
        else:
            add_rounded_(param, rows.__getitem__, alpha=-step_size, decay=_decay(group), skip=skip)

    def _rounds_stochastically(self, param: Tensor, group: Group) -> bool:
        return bool(group.get("stochastic_rounding")) and param.dtype == torch.bfloat16

    def _add_rounded(
        self, param: Tensor, group: Group, update: Callable[[slice], Tensor], alpha: float, step: int, skip: Tensor
    ) -> None:
        generator = generator_for(param.device, group["rounding_seed"], self._index_of(param), step)
        add_rounded_(param, update, alpha=alpha, decay=_decay(group), skip=skip, generator=generator)

    # ---- hooks into the backward pass

    @property
    def hooks(self) -> BackwardHooks | None:
        """What acts during the backward pass; `None` for a plain optimizer without projected backward."""
        return self._hooks

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget all gradients, those that the hooks hold too."""
        if self._hooks is not None and set_to_none:
            self._hooks.drop_gradients()
        super().zero_grad(set_to_none)
        if self._hooks is not None:
            self._hooks.look()

    @torch.no_grad()
    def grad_norm(self) -> Tensor | None:
        """Norm of all that the next step would use, or this step's backward pass has used; 0-dimensional.

        That of the gradient where there is one; of the low-rank gradient for a target that has only that. `None`
        where there is nothing.
        """
        norms = [] if self._hooks is None else self._hooks.norms()
        for gradient in self._gradients():
            norms.append(gradient.frobenius_norm() if isinstance(gradient, LowRankGradient) else norm_of(gradient))
        if not norms:
            return None
        return norm_of(torch.stack([norm.to(norms[0].device) for norm in norms]))

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float) -> Tensor | None:
        """Scale all gradients, held low-rank ones too, to a global norm of at most `max_norm`.

        Returns:
            `grad_norm()` before clipping.

        Raises:
            RuntimeError: layerwise hooks have already updated weights in this step: `hold_gradients` was not set.
        """
        if self._hooks is not None and self._hooks.has_updated:
            raise RuntimeError(
                "The gradients cannot be clipped: weights were already updated during the backward pass. Make the "
                "optimizer with hold_gradients=True."
            )
        norm = self.grad_norm()
        if norm is not None:
            # As torch.nn.utils.clip_grad_norm_, but that a norm that is not finite skips all updates, not only those
            # that it came from: the others would be made with a gradient of zero.
            factor = (max_norm / (norm + 1e-6)).clamp_(max=1.0) + norm * 0
            for gradient in self._gradients():
                gradient.mul_(factor.to(gradient.device))
        return norm

    def _gradients(self) -> list[Tensor]:
        """What `step()` is going to use."""
        gradients = (param.grad for param in self._params())
        return [gradient for gradient in gradients if gradient is not None and not isinstance(gradient, UsedGradient)]

    def targets(self) -> Iterator[tuple[Tensor, Group]]:
        """The parameters that are projected, each with its group, in the order of the groups."""
        return ((p, group) for group in self.param_groups for p in group["params"] if is_target(p, group))

    def _params(self) -> list[Tensor]:
        return [param for group in self.param_groups for param in group["params"]]

    def close(self) -> None:
        """Take the hooks off the model, if any: it is as it was, and `step()` alone updates it."""
        if self._hooks is not None:
            self._hooks.detach()

    # ---- what it did

    def refresh_figures(self) -> dict[str, float]:
        """Figures of the refreshes since the last call, and their counts so far. Waits for the device.

        `captured_energy_min`, `captured_energy_median`, `overlap_median` and `refresh_seconds` where there were any;
        always `refreshes`, all of the run, and `refreshes_saved` where `lazy_refresh` is on.
        """
        figures = self._refresh_log.take()
        done = saved = 0
        lazy = False
        for param, group in self.targets():
            state = self.state.get(param)
            if not state:
                continue
            refreshes = int(state["refreshes"].item())
            done += refreshes
            if group["lazy_refresh"]:
                lazy = True
                step = int(state["step"].item())
                saved += refreshes_by(step, group["update_proj_gap"], self._phase_of(param)) - refreshes
        figures["refreshes"] = done
        if lazy:
            figures["refreshes_saved"] = max(saved, 0)
        return figures

    def memory(self) -> Memory:
        """The bytes of moments and bases, and how many parameters are targets and how many full-rank."""
        memory = Memory()
        for param in self._params():
            if param.requires_grad:
                memory.count(self.state[param])
        return memory

    # ---- gradients that are not finite

    def skipped_updates(self) -> dict[str, Skipped]:
        """The updates skipped so far because a gradient was not finite, by parameter. Waits for the device."""
        for param, times in self._skipped.read().items():
            # Counted as made, because only the device knew better.
            self.state[param]["step"] = self.state[param]["step"] - times
        return {self.name_of(param): skipped for param, skipped in self._skipped.known().items()}

    def warn_of_skipped(self) -> None:
        """Warn, once, if updates were skipped. Waits for the device."""
        skipped = self.skipped_updates()
        if self._warned_of_skipped or not skipped:
            return
        self._warned_of_skipped = True
        name, (_, step) = min(skipped.items(), key=lambda item: item[1].first_step)
        others = f" and {len(skipped) - 1} other(s)" if len(skipped) > 1 else ""
        logger.warning(
            "A gradient was NaN or infinite: the update of %s%s was skipped at step %d. This is said once; "
            "optimizer.skipped_updates() counts.",
            name,
            others,
            step,
        )

    # ---- loading

    def state_dict(self) -> dict[str, Any]:
        """The groups and state, as of torch's optimizers; of backward passes before their step it has nothing."""
        hooks = self._hooks
        if hooks is None:
            return super().state_dict()

        def leave_out_the_window(_: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
            # The gradients of a window are not saved, and so its refreshes are to come.
            for param in self._params():
                before = hooks.before(param)
                if before is not None and before.complete:
                    saved["state"][self._index_of(param)] = as_before(self.state[param], before)

        # The first of the hooks on it: others see what is saved.
        handle = self.register_state_dict_post_hook(leave_out_the_window, prepend=True)
        try:
            return super().state_dict()
        finally:
            handle.remove()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict()` gave, bit for bit, into the tensors that are there.

        `torch.optim.Optimizer` would cast every floating-point tensor to the dtype of its parameter: float32
        moments of bfloat16 weights would lose their lower half.

        Raises:
            ValueError: the groups, GaLore's hyperparameters, or keys and shapes of the state are not this
                optimizer's. Nothing is loaded then.
        """
        copies: list[tuple[Tensor, str, Tensor]] = []
        state = self.state

        def check(_: torch.optim.Optimizer, loaded: dict[str, Any]) -> dict[str, Any]:
            copies.extend(self._checked(loaded))
            return {**loaded, "state": {}}  # torch would cast it

        def fill(_: torch.optim.Optimizer) -> None:
            self.state = state
            self._fill(copies)

        # Among the hooks of others: theirs before loading change what is checked, and theirs after see it loaded.
        handles = [
            self.register_load_state_dict_pre_hook(check),
            self.register_load_state_dict_post_hook(fill, prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for handle in handles:
                handle.remove()

    def _checked(self, state_dict: dict[str, Any]) -> Iterator[tuple[Tensor, str, Tensor]]:
        """What a state dict has for each parameter, if all of it is this optimizer's.

        Raises:
            ValueError: it is not.
        """
        check_plain_state(state_dict)
        groups, saved_groups = self.param_groups, state_dict["param_groups"]
        if [len(group["params"]) for group in groups] != [len(group["params"]) for group in saved_groups]:
            raise ValueError(
                "The checkpoint's optimizer state was made for other parameter groups: it has "
                f"{[len(g['params']) for g in saved_groups]} parameters in its groups, this optimizer has "
                f"{[len(g['params']) for g in groups]}. Resume with the optim, optim_target_modules and model of "
                "the run that wrote it, or start from its weights only."
            )
        for group, saved_group in zip(groups, saved_groups, strict=True):
            check_same_options(group, saved_group)
            check_same_names(group, saved_group)
            for param, index in zip(group["params"], saved_group["params"], strict=True):
                saved = state_dict["state"].get(index, {})
                self._check_same_state(param, index, group, saved)
                yield from ((param, key, value) for key, value in saved.items())

    def _fill(self, copies: list[tuple[Tensor, str, Tensor]]) -> None:
        self._versions.clear()
        for param, key, value in copies:
            current = self.state[param]
            device = torch.device("cpu") if key in ON_HOST else param.device
            if key in current and current[key].device == device:
                if current[key] is not value:
                    current[key].copy_(value)
            else:  # the model has moved since the state was made, or the parameter was frozen then
                current[key] = value.to(device, copy=True)

    def _check_same_state(self, param: Tensor, index: int, group: Group, saved: Mapping[str, Tensor]) -> None:
        if not saved and not self.state.get(param):
            return
        with torch.device("meta"):
            needed = self._new_state(param.detach().to("meta"), group)
        check_unchanged(self.name_of(param), param.shape, self.state.get(param, {}), needed)
        expected = {key: (tuple(value.shape), value.dtype) for key, value in needed.items()}
        found = {key: (tuple(value.shape), value.dtype) for key, value in saved.items()}
        if found == expected:
            return
        differing = sorted(key for key in {**found, **expected} if found.get(key) != expected.get(key))
        details = "; ".join(f"{key}: saved {found.get(key)}, needed {expected.get(key)}" for key in differing)
        raise ValueError(
            f"The checkpoint's optimizer state does not fit {type(self).__name__} at parameter {index} of shape "
            f"{tuple(param.shape)} ({details}). Resume with the optim and optim_args of the run that wrote it, or "
            "start from its weights only."
        )


def _is_dtensor(param: Tensor) -> bool:
    return hasattr(param, "device_mesh")  # without importing torch.distributed.tensor, which takes a second


def _decay(group: Group) -> float:
    """1 − ηλ."""
    return 1 - float(group["lr"] * group["weight_decay"])
