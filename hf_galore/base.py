"""The optimizer that the three of `hf_galore.optimizers` are thin over: groups, bases, projection, hooks, loading.

State is plain tensors, made at construction with a fixed set of keys and shapes, so that a checkpoint loads with
`weights_only=True`, into tensors that are already there. What follows from the group and the shape (side, rank)
is not in it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypedDict, cast, overload

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from .bases import ON_HOST, State, count_refresh, kept_bases, new_basis_state, read_bases, refresh_due, refreshed_at
from .config import GaLoreConfig
from .diagnostics import Memory, Refresh, RefreshLog, Stopwatch
from .groups import (
    Group,
    ParamOptions,
    check_same_names,
    check_same_options,
    is_target,
    split_groups,
    with_names,
)
from .log import logger
from .moments import Rotation, rotation_between
from .nonfinite import Skipped, SkippedUpdates
from .projection import (
    Bases,
    Gradient,
    add_projected_back_,
    is_projectable,
    low_rank_shape,
    norm_of,
    project,
    projected_back,
    side_of,
)
from .refresh import figures_of, new_bases, products
from .rounding import add_rounded_, generator_for
from .schedule import NEVER, next_gap_factor, phase_of, refreshes_by
from .update import skip_unless_finite

if TYPE_CHECKING:
    from .layerwise import BackwardHooks


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

    def __init__(
        self,
        params: Iterable[Any],
        defaults: dict[str, Any],
        **options: Unpack[GaLoreOptions],
    ) -> None:
        model = options.get("module")
        layerwise = options.get("layerwise", False)
        projected_backward = options.get("projected_backward")
        self._init_unsaved()
        if model is not None:
            self._names.update((id(param), name) for name, param in model.named_parameters())
        groups = split_groups(params, options.get("param_options") or {})
        if options.get("stochastic_rounding", False):
            # In the groups, so that a resumed run goes on with the numbers of the first.
            defaults = {**defaults, "stochastic_rounding": True, "rounding_seed": torch.initial_seed()}
        super().__init__(with_names(groups, self._names), defaults)
        self._check_stochastic_rounding()
        if projected_backward is None:
            projected_backward = layerwise
        if layerwise or projected_backward:
            if model is None:
                raise ValueError(
                    f"{type(self).__name__} hooks into the backward pass of the model for layerwise=True and "
                    "projected_backward=True: pass it, module=model."
                )
            from .layerwise import BackwardHooks

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
        self._names: dict[int, str] = {}
        self._refresh_log = RefreshLog()
        self._refresh_next: set[int] = set()  # targets, by their id
        self._indices: dict[int, int] = {}  # of the parameters, by their id
        self._phases: dict[int, int] = {}  # of the targets, likewise

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
        config = GaLoreConfig.from_group(param_group)
        if config is not None:
            param_group = {**param_group, **config.group_options()}
        super().add_param_group(param_group)
        self._indices, self._phases = {}, {}
        group = self.param_groups[-1]
        try:
            self._check_group(group)
        except ValueError:
            del self.param_groups[-1]
            raise
        for param in group["params"]:
            if param.requires_grad:
                self.state[param] = self._new_state(param, group)

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

    def _state_of(self, param: Tensor, group: Group) -> State:
        state = cast("State", self.state[param])
        if not state:  # frozen when the optimizer was made
            state.update(self._new_state(param, group))
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
            self._phases = {id(param): 0 for param, _ in self.targets()}
            for index, (target, group) in enumerate(staggered):
                self._phases[id(target)] = phase_of(index, len(staggered), group["update_proj_gap"])
        return self._phases[id(param)]

    # ---- the update

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient; with hooks, those that they left.

        A parameter whose gradient, or low-rank gradient, is not finite is skipped: it and its moments stay as they
        are, and a warning says so, at once on a CPU and with the Trainer's next log on a GPU. (bitsandbytes' 8-bit
        moments decay as if the gradient were zero; so does a full-rank weight that its kernels update.)
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for param in group["params"]:
                held = None if self._hooks is None else self._hooks.take_held(param)
                if held is not None:
                    if param.grad is not None:  # somebody has set it by hand
                        held.add_(project(param.grad, self.bases_of(param, group)))
                    self.update_low_rank(param, group, held)
                elif param.grad is not None:
                    self.update_parameter(param, group)
        self._refresh_next.clear()
        if self._hooks is not None:
            self._hooks.start_window()
        if all(param.device.type == "cpu" for group in self.param_groups for param in group["params"][:1]):
            self.warn_of_skipped()
        return loss

    @torch.no_grad()
    def update_parameter(self, param: Tensor, group: Group) -> None:
        """One optimizer step of one parameter from its `.grad`, which is left as it is.

        Raises:
            RuntimeError: the gradient is sparse.
        """
        gradient = param.grad
        assert gradient is not None
        if gradient.is_sparse:
            raise RuntimeError(
                f"{type(self).__name__} cannot use sparse gradients. Build the embedding with sparse=False."
            )
        if is_target(param, group):
            low_rank = self.project_gradient(param, group, gradient, refresh=self.refresh_due(param, group))
            if low_rank is not None:
                self.update_low_rank(param, group, low_rank)
            return
        state = self._state_of(param, group)
        step = _count_step(state)
        skip = skip_unless_finite(norm_of(gradient))
        self._skipped.note(param, skip, step)
        self._update_full_rank(param, gradient, state, group, step, skip)

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
    def project_gradient(self, param: Tensor, group: Group, gradient: Gradient, *, refresh: bool) -> Tensor | None:
        """The low-rank gradient R of a target, with new bases from this gradient where `refresh` says so.

        `None` where the gradient of a refresh is not finite: the refresh is put off to the next step, and this step
        is over for the parameter.
        """
        if refresh:
            return self._refresh(param, group, gradient)
        return project(gradient, self.bases_of(param, group))

    def _refresh(self, param: Tensor, group: Group, gradient: Gradient) -> Tensor | None:
        watch = Stopwatch(param.device)
        state = self._state_of(param, group)
        step = int(state["step"].item())
        old = None if refreshed_at(state) == NEVER else read_bases(param, group, state)
        side = side_of(param.shape, group["proj_type"])
        computed = new_bases(gradient, side, group["rank"], group["refresh"], old)
        kept = kept_bases(computed, param, group)
        new = read_bases(param, group, kept)
        low_rank = project(gradient, new)
        # The one time that a refresh waits for the device.
        norm, energy, shared = (value.item() for value in figures_of(gradient, low_rank, new, old).cpu().unbind())
        if not math.isfinite(norm):
            self._skipped.note(param, torch.ones((), device=param.device), step + 1)
            return None
        if norm == 0 and old is not None:
            kept = {}  # nothing to learn from it: the basis stays
        if old is not None and step > 0 and (kept or group["moments"] == "reset"):
            self._carry_moments(state, group, new, old, step)
        if norm > 0 or old is not None:  # or else the next step looks again
            count_refresh(state, step)
        for key, value in kept.items():
            state[key].copy_(value)
        if "gap_factor" in state and old is not None and kept:
            chance = max(group["rank"] / p.shape[0] for p in new if p is not None)
            factor = next_gap_factor(int(state["gap_factor"].item()), shared, chance)
            state["gap_factor"] = torch.tensor(float(factor))
        watch.stop()
        self._refresh_log.add(Refresh(energy, None if old is None else shared, watch))
        return low_rank

    def _carry_moments(self, state: State, group: Group, new: Bases, old: Bases, step: int) -> None:
        """What happens to the moments when the basis changes after `step` steps."""
        if group["moments"] == "reset":
            for key, value in state.items():
                if key.startswith("exp_avg"):
                    value.zero_()
        elif group["moments"] == "rotate":
            self._rotate_moments(state, group, rotation_between(new, old), step)

    def _rotate_moments(self, state: State, group: Group, rotation: Rotation, step: int) -> None:
        """Carry the moments of a target, which have had `step` updates, into its new basis."""
        raise NotImplementedError

    @torch.no_grad()
    def update_low_rank(self, param: Tensor, group: Group, low_rank: Tensor, norm: Tensor | None = None) -> None:
        """One optimizer step of a target from its low-rank gradient R.

        Args:
            norm: ‖R‖, where it is known already.
        """
        state = self._state_of(param, group)
        step = _count_step(state)
        skip = skip_unless_finite(norm_of(low_rank) if norm is None else norm)
        self._skipped.note(param, skip, step)
        # Moments that began anew at the last refresh have a bias to correct that is no older.
        moments_step = step - refreshed_at(state) if group["moments"] == "reset" else step
        direction, step_size = self._direction(low_rank, state, group, moments_step, skip)
        bases = read_bases(param, group, state)
        alpha = -step_size * group["scale"]
        if self._rounds_stochastically(param, group):
            update = functools.partial(projected_back, direction, bases)
            self._add_rounded(param, group, update, alpha, step, skip)
            return
        if group["weight_decay"] != 0:
            param.mul_(_decay(param, group, skip))
        add_projected_back_(param, direction, bases, alpha)

    def _direction(self, gradient: Tensor, state: State, group: Group, step: int, skip: Tensor) -> tuple[Tensor, float]:
        """N for a gradient of the moments' shape, and the factor that it is subtracted with; updates the moments.

        Where `skip` is 1, N is zero and the moments stay.
        """
        raise NotImplementedError

    def _update_full_rank(
        self, param: Tensor, gradient: Tensor, state: State, group: Group, step: int, skip: Tensor
    ) -> None:
        direction, step_size = self._direction(gradient, state, group, step, skip)
        if self._rounds_stochastically(param, group):
            rows = direction.reshape(-1) if direction.ndim == 0 else direction
            self._add_rounded(param, group, rows.__getitem__, -step_size, step, skip)
            return
        if group["weight_decay"] != 0:
            param.mul_(_decay(param, group, skip))
        param.add_(direction, alpha=-step_size)

    def _rounds_stochastically(self, param: Tensor, group: Group) -> bool:
        return bool(group.get("stochastic_rounding")) and param.dtype == torch.bfloat16

    def _add_rounded(
        self, param: Tensor, group: Group, update: Callable[[slice], Tensor], alpha: float, step: int, skip: Tensor
    ) -> None:
        generator = generator_for(param.device, group["rounding_seed"], self._index_of(param), step)
        decay = _decay(param, group, skip) if group["weight_decay"] != 0 else 1.0
        add_rounded_(param, update, alpha=alpha, decay=decay, generator=generator)

    # ---- hooks into the backward pass

    @property
    def hooks(self) -> BackwardHooks | None:
        """What acts during the backward pass; `None` for a plain optimizer without projected backward."""
        return self._hooks

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget all gradients, those that the hooks hold too."""
        super().zero_grad(set_to_none)
        if self._hooks is not None:
            self._hooks.forget_gradients()

    @torch.no_grad()
    def grad_norm(self) -> Tensor | None:
        """Norm of all that the next step would use, or this step's backward pass has used; 0-dimensional.

        That of the gradient where there is one; of the low-rank gradient for a target that has only that. `None`
        where there is nothing.
        """
        norms = [] if self._hooks is None else self._hooks.norms()
        norms += [norm_of(param.grad) for param in self._params() if param.grad is not None]
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
            # As torch.nn.utils.clip_grad_norm_, which sees no held gradients.
            factor = (max_norm / (norm + 1e-6)).clamp_(max=1.0)
            gradients = [param.grad for param in self._params() if param.grad is not None]
            gradients += [] if self._hooks is None else self._hooks.held()
            for gradient in gradients:
                gradient.mul_(factor.to(gradient.device))
        return norm

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
        return {self.name_of(param): skipped for param, skipped in self._skipped.read().items()}

    def warn_of_skipped(self) -> None:
        """Warn, once, if updates were skipped. Waits for the device."""
        if self._warned_of_skipped:
            return
        skipped = self.skipped_updates()
        if skipped:
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

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict()` gave, bit for bit, into the tensors that are there.

        `torch.optim.Optimizer` would cast every floating-point tensor to the dtype of its parameter: float32
        moments of bfloat16 weights would lose their lower half.

        Raises:
            ValueError: the groups, GaLore's hyperparameters, or keys and shapes of the state are not this
                optimizer's. Nothing is loaded then.
        """
        groups, saved_groups = self.param_groups, state_dict["param_groups"]
        if [len(group["params"]) for group in groups] != [len(group["params"]) for group in saved_groups]:
            raise ValueError(
                "The checkpoint's optimizer state was made for other parameter groups: it has "
                f"{[len(g['params']) for g in saved_groups]} parameters in its groups, this optimizer has "
                f"{[len(g['params']) for g in groups]}. Resume with the optim, optim_target_modules and model of "
                "the run that wrote it, or start from its weights only."
            )
        copies: list[tuple[Tensor, str, Tensor]] = []
        for group, saved_group in zip(groups, saved_groups, strict=True):
            check_same_options(group, saved_group)
            check_same_names(group, saved_group)
            for param, index in zip(group["params"], saved_group["params"], strict=True):
                saved = state_dict["state"].get(index, {})
                self._check_same_state(param, index, group, saved)
                copies.extend((param, key, value) for key, value in saved.items())

        # The parent restores groups and runs its hooks; it gets no state, which it would cast.
        state = self.state
        super().load_state_dict({**state_dict, "state": {}})
        self.state = state
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
            expected = {
                key: (tuple(value.shape), value.dtype)
                for key, value in self._new_state(param.detach().to("meta"), group).items()
            }
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


def _count_step(state: State) -> int:
    # Out of place: under fake tensors the value of a CPU scalar survives that, and not `+=`.
    state["step"] = state["step"] + 1
    return int(state["step"].item())


def _is_dtensor(param: Tensor) -> bool:
    return hasattr(param, "device_mesh")  # without importing torch.distributed.tensor, which takes a second


def _decay(param: Tensor, group: Group, skip: Tensor) -> Tensor:
    """1 − ηλ, or 1 for a skipped update; 0-dimensional, precise enough for the weight's dtype."""
    keep = 1 - skip.to(torch.promote_types(param.dtype, torch.float32))
    return 1 - float(group["lr"] * group["weight_decay"]) * keep
