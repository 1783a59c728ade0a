"""The optimizer: from groups to targets, and what is the same for all of them.

State is plain tensors, made at construction with a fixed set of keys and shapes, so that a checkpoint loads with
`weights_only=True`, into tensors that are already there. What follows from the group and the shape (side, rank)
is not in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, ClassVar, overload

import torch
from torch import Tensor, nn

from ..backward.gradient import LowRankGradient, UsedGradient
from ..backward.hooks import BackwardHooks
from ..backward.processes import Processes
from ..backward.whole_window import instead_of_using
from ..config import GaLoreConfig
from ..lowrank import nonfinite
from ..lowrank.orthonormal import warm_up
from ..rules import RULES, options_of, own_rule, without_own_name
from . import admission, checkpoint
from .exchanged import check_not_exchanged
from .gradients import clip_, norm_of_gradients, norms_for_step
from .groups import GaLoreOptions as GaLoreOptions
from .groups import check_group_keys, check_held_options, check_options, split_groups, with_seeds
from .hooking import check_new_needs, hooks_for, waits_for_shards
from .making import drop_others, make_all
from .names import Names
from .refreshes import SharedRefreshes
from .report import Journal, Memory, refresh_figures
from .skipped import Skipped, uncount
from .target import Target
from .trained import Trained


class GaLoreOptimizer(torch.optim.Optimizer):
    """Any update rule on low-rank gradients.

    Args:
        params: parameters, or groups. A group with a `rank` is projected; other options of `GaLoreConfig` may go with
            it. Groups may set the rule's options.
        rule: one of `hf_galore.rules.RULES` that is not for targets only.
        options: the rule's options, with the defaults that it has (its `defaults`), and those of `GaLoreOptions`.

    Raises:
        ValueError: an option is out of range, or a parameter of a group with a `rank` is no matrix.
        TypeError: an option is unknown.
    """

    rule_name: ClassVar[str] = "adam"
    _hooks: BackwardHooks | None
    _names: Names

    def __init__(self, params: Iterable[Any], rule: str = "adam", **options: Any) -> None:
        own = own_rule(rule).defaults
        check_options(type(self).__name__, options, [*GaLoreOptions.__annotations__, *own])
        admission.check_no_accelerator(type(self).__name__)
        model: nn.Module | None = options.get("module")
        self._init_unsaved(rule, model)
        groups = split_groups(params, options.get("param_options") or {})
        admission.check_parameters(self._names.of_entries(groups), model)
        defaults = {key: options.get(key, default) for key, default in own.items()}
        if options.get("stochastic_rounding", False):
            defaults["stochastic_rounding"] = True
        self._waits = waits_for_shards(groups)
        self._constructing = True
        super().__init__(self._names.in_groups(groups), defaults)
        self._constructing = False
        admission.check_stochastic_rounding(self.param_groups)
        admission.say_if_decay_is_lost(self.param_groups)
        admission.say_if_nothing_is_projected(type(self).__name__, self.param_groups)
        for device in {target.param.device for target in self.targets() if nonfinite.has_numbers(target.param)}:
            warm_up(device)
        self._hooks = hooks_for(self, model, options, waits=self._waits)

    def _init_unsaved(self, rule: str, model: nn.Module | None) -> None:
        """Set what is not in `state_dict()`."""
        self.rule = rule
        self.journal = Journal()
        self._hooks = None
        self._constructing = False
        self._waits = False  # for other parameters, which take the place of those that it has
        self._names = Names(model)
        self._trained: dict[int, Trained] = {}  # by the parameter's id
        self.processes: Processes | None = None  # that have the next step's gradients too

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "rule": self.rule}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_hooks" not in self.__dict__:  # a copy, to which torch's optimizers give groups and state only
            self._init_unsaved(state.get("rule", self.rule_name), None)

    # ---- groups

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group and make its state.

        Raises:
            ValueError: an option is out of range, or a parameter of a group with a `rank` is not a matrix.
        """
        check_group_keys(param_group)
        config = GaLoreConfig.from_group(param_group)
        if config is not None:
            own = RULES[self.rule]
            options = without_own_name(own, config.group_options())
            param_group = {**options_of(own, param_group), **param_group, **options}
        param_group = with_seeds({**self.defaults, **param_group})
        super().add_param_group(self._names.in_group(param_group, self.param_groups))
        group = self.param_groups[-1]
        self._names.learn(group)
        try:
            admission.check_group(group, RULES[self.rule], self.name_of)
            if not self._constructing:
                admission.check_parameters(self._names.of_entries(self.param_groups))
                check_held_options([group], hooked=self._hooks is not None)
                check_new_needs(self, self._hooks)
        except ValueError:
            del self.param_groups[-1]
            raise
        for param in group["params"]:
            if param.requires_grad and not self._waits:
                _ = self.trained(param).state  # made now, not in the first step
        if self._hooks is not None and self._hooks.attached:
            self._hooks.attach_new()

    def name_of(self, param: Tensor) -> str:
        """The name of a parameter in the model, or words for it where none is known."""
        return self._names.of(param)

    # ---- what each parameter is

    def trained_parameters(self) -> list[Trained]:
        """What each parameter is to this optimizer, in the order of the groups."""
        found = make_all(self, self._trained, RULES[self.rule])
        if len(found) < len(self._trained):  # some have left the groups
            self._trained = {id(trained.param): trained for trained in found}
            drop_others(self.state, self._trained)
        if self._waits:
            self._waits = not any(trained.ranks for trained in found)
            if self._waits:
                self._trained = {}  # what is to be replaced must not be kept alive
        return found

    def trained(self, param: Tensor) -> Trained:
        """What a parameter is to this optimizer.

        Raises:
            ValueError: it is in none of its groups.
        """
        trained = self._trained.get(id(param))
        if trained is None or not trained.is_current():
            trained = next((other for other in self.trained_parameters() if other.param is param), None)
        if trained is None:
            raise ValueError(f"{self.name_of(param)} is in no group of this optimizer.")
        return trained

    def targets(self) -> list[Target]:
        """The parameters that are projected, in the order of the groups."""
        return [trained for trained in self.trained_parameters() if isinstance(trained, Target)]

    def refresh_next(self, params: Iterable[Tensor]) -> None:
        """Let the next step refresh the bases of these targets, whatever their turn; turns stay as they are."""
        for param in params:
            trained = self.trained(param)
            if isinstance(trained, Target):
                trained.refresh_asked = True

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
            RuntimeError: gradients were dropped that a layerwise optimizer had used already, or kept over a refresh;
                or the model has other parameters by now.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        parameters = self.trained_parameters()
        admission.check_whole(type(self).__name__, parameters)
        admission.check_not_sharded_since(self._names.model(), parameters)
        check_not_exchanged(type(self).__name__, self._names.model(), parameters)
        if self._hooks is not None:
            self._hooks.check_before_step(parameters)
        norms = norms_for_step(parameters)
        processes, self.processes = self.processes, None
        refreshes = None if processes is None else SharedRefreshes(processes, parameters)
        for trained in parameters:
            gradient, norm = trained.local.grad, norms.get(id(trained.param))
            if isinstance(gradient, LowRankGradient) and gradient.addend is None:
                self._update_held(trained, gradient, norm)
            elif gradient is not None and not isinstance(gradient, UsedGradient):
                whole = gradient.addend if isinstance(gradient, LowRankGradient) else gradient
                assert whole is not None
                if refreshes is None or not refreshes.step(trained):
                    trained.step(whole, norm)
                del whole
            if isinstance(trained, Target):
                trained.refresh_asked = False
        self.journal.skipped.count()
        if self._hooks is not None:
            self._hooks.start_window(parameters)
        if all(nonfinite.host_knows(group["params"][0]) for group in self.param_groups if group["params"]):
            self.warn_of_skipped()
        return loss

    def _update_held(self, target: Trained, gradient: LowRankGradient, norm: Tensor | None) -> None:
        """One optimizer step of a target from the low-rank gradient that its hook has left in `.grad`.

        Raises:
            RuntimeError: the gradient is in another basis than the present one.
        """
        before = None if self._hooks is None else self._hooks.before(target.param)
        if not isinstance(target, Target) or not (gradient.is_zero or gradient.basis is target.version):
            raise RuntimeError(
                f"The low-rank gradient in {target.name}.grad is in an earlier basis than the present one: it "
                "was kept over a refresh, or over a backward pass that was dropped. Call optimizer.zero_grad() after "
                "each step; to keep gradients make the optimizer with layerwise=False and projected_backward=False."
            )
        target.update(gradient.low_rank, norm, before=before)

    # ---- hooks into the backward pass, and gradients

    @property
    def hooks(self) -> BackwardHooks | None:
        """What acts during the backward pass; `None` for a plain optimizer without projected backward."""
        return self._hooks

    def close(self) -> None:
        """Take the hooks off the model, if any: it is as it was, and `step()` alone updates it."""
        if self._hooks is not None:
            self._hooks.detach()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget all gradients, those that the hooks hold too."""
        if self._hooks is not None and set_to_none:
            self._hooks.drop_gradients()
        super().zero_grad(set_to_none)
        if self._hooks is not None:
            self._hooks.look()

    @torch.no_grad()
    def grad_norm(self) -> Tensor | None:
        """The norm of all that the next step would use, or this step's backward pass has used; 0-dimensional.

        That of the gradient where there is one; for a target that has only a low-rank gradient the estimate of it by
        norm probes, or with `norm_probes=0` that of the low-rank gradient. `None` where there is nothing.
        """
        norms = [] if self._hooks is None else self._hooks.norms()
        return norm_of_gradients(self.trained_parameters(), norms)

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
                f"optimizer with {instead_of_using(self.trained_parameters())}."
            )
        norm = self.grad_norm()
        if norm is not None:
            clip_(self._gradients(), norm, max_norm)
        return norm

    def _gradients(self) -> list[Tensor]:
        """What `step()` is going to use."""
        gradients = (trained.local.grad for trained in self.trained_parameters())
        return [gradient for gradient in gradients if gradient is not None and not isinstance(gradient, UsedGradient)]

    # ---- what it did

    def refresh_figures(self) -> dict[str, float]:
        """Figures of the refreshes since the last call, and their counts so far. Waits for the device.

        `captured_energy_min`, `captured_energy_median`, `overlap_median` and `refresh_seconds` where there were any;
        always `refreshes`, all of the run, and `refreshes_saved` where `lazy_refresh` is on.
        """
        return refresh_figures(self.journal, self.targets())

    def memory(self) -> Memory:
        """The bytes of moments and bases, and how many parameters are targets and how many full-rank."""
        memory = Memory()
        for trained in self.trained_parameters():
            if trained.param.requires_grad:
                memory.count(
                    trained.present_state,
                    projected=trained.projected,
                    moments=(*trained.moment_keys, *trained.whole_keys),
                    bases=trained.basis_keys,
                )
        return memory

    def skipped_updates(self) -> dict[str, Skipped]:
        """The updates skipped so far because a gradient was not finite, by parameter. Waits for the device."""
        skipped = self.journal.skipped
        for param, times in skipped.read().items():
            uncount(self.state.get(param, {}), times)
        return {self.name_of(param): found for param, found in skipped.known().items()}

    def warn_of_skipped(self) -> None:
        """Warn, once, if updates were skipped. Waits for the device."""
        self.journal.warn_of(self.skipped_updates())

    # ---- saving and loading

    def state_dict(self) -> dict[str, Any]:
        """The groups and state, as of torch's optimizers; of backward passes before their step it has nothing."""
        with checkpoint.saving(self):
            return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict()` gave, bit for bit, into the tensors that are there.

        `torch.optim.Optimizer` would cast every floating-point tensor to the dtype of its parameter: float32
        moments of bfloat16 weights would lose their lower half.

        Raises:
            ValueError: the groups, GaLore's hyperparameters, or keys and shapes of the state are not this
                optimizer's. Nothing is loaded then.
        """
        with checkpoint.loading(self):
            super().load_state_dict(state_dict)
