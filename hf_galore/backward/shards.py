"""The projected backward under FSDP2: low-rank gradients are reduced, and no gradient of a target is ever built.

FSDP2 gathers a layer's weight for its passes, and reduces the gradient that autograd leaves on the gathered weight; one
that is not there it passes over. So the layer leaves a low-rank gradient R there, which has been reduced over the
processes already, each of which has its rows; and the hook on the gathered weight takes it to the sharded one.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from ..integrations.fully_shard import Unit, units
from ..lowrank.products import FactoredGradient
from .gradient import LowRankGradient, UncommittedRefresh, UsedGradient
from .hooks import BackwardHooks
from .linear import ProjectedLinear
from .window import Window


class ShardHooks(BackwardHooks):
    """Hooks for parameters that FSDP2 shards.

    Args:
        args: as of `BackwardHooks`.
        may_fall_back: whether gradients are built where the projected backward does not work.
        options: as of `BackwardHooks`.
    """

    def __init__(self, *args: Any, may_fall_back: bool, **options: Any) -> None:
        self._may_fall_back = may_fall_back
        self._shards: dict[int, weakref.ref[Tensor]] = {}  # of projected layers, by the modules' ids
        self._gathered: dict[int, weakref.ref[Tensor]] = {}  # the gathered weight that has a hook, by its shard's id
        self._units: dict[int, Unit] = {}  # what is reduced together, by the shards' ids
        self._built_in: dict[int, int] = {}  # the last backward pass that has built a gradient, by its shard's id
        super().__init__(*args, **options)

    def attach_new(self) -> None:
        """Put hooks on parameters that have none yet; the model's have to be sharded, as they are between passes.

        Raises:
            ValueError: a projected backward is asked for, and others reduce their gradients too.
        """
        self._check()
        super().attach_new()
        self._units = {id(shard): unit for unit in units(self._model) for shard, _ in unit.parameters()}
        for module in self._model.modules():
            weight = module.weight if isinstance(module, ProjectedLinear) else None
            if isinstance(weight, Tensor) and id(weight) in self._windows:
                self._shards[id(module)] = weakref.ref(weight)

    def _check(self) -> None:
        optimizer = self._optimizer()
        if optimizer is None or not self.projected_backward:
            return
        meshes: list[Any] = [getattr(trained.param, "device_mesh", None) for trained in optimizer.trained_parameters()]
        if any(mesh is not None and mesh.ndim > 1 for mesh in meshes):
            if self._may_fall_back:
                self._mode.projected_backward, self._mode.whole_norms = False, True
                return
            raise ValueError(
                "projected_backward=True does not work with parameters that FSDP2 shards and replicates, on a mesh of "
                "two dimensions: low-rank gradients are reduced over one. Leave it out, or shard over all processes."
            )

    def detach(self) -> None:
        """Take the hooks off the model."""
        super().detach()
        self._shards.clear()
        self._gathered.clear()
        self._units.clear()
        self._built_in.clear()

    def shard_of(self, module: nn.Module, weight: Tensor) -> Tensor | None:
        """The sharded parameter that a layer's weight is of, while that is gathered; `None` where it is not served.

        Raises:
            RuntimeError: a projected backward is asked for, and a program has FSDP2 reduce gradients in its own way.
        """
        ref = self._shards.get(id(module))
        shard = None if ref is None else ref()
        if ref is None or shard is None or weight is shard or not self.serves(shard):
            return None
        unit = self._units.get(id(shard))
        own = None if unit is None else unit.own_reduction()
        if own is not None:
            if not self._may_fall_back:
                raise RuntimeError(
                    f"projected_backward=True does not work here: {own}, and of a target's gradient there is only a "
                    "low-rank one, which GaLore reduces. Leave out one or the other."
                )
            self.notices.own_reduction(own)
            return None
        known = self._gathered.get(id(shard))
        if known is None or known() is not weight:
            self._gathered[id(shard)] = weakref.ref(weight)
            self._handles.append(weight.register_post_accumulate_grad_hook(_GatheredHook(weakref.ref(self), ref)))
        return shard

    def gradient_of_gathered(
        self, shard: Tensor, gathered: Tensor, output_gradient: Tensor, inputs: Tensor
    ) -> Tensor | None:
        """The low-rank gradient of all processes from δ and X that each has; `None` where G is needed.

        Args:
            shard: the sharded parameter.
            gathered: the weight that δ and X come from.
            output_gradient: δ, T × m.
            inputs: X, T × n.
        """
        window, unit = self._window_of(shard), self._units.get(id(shard))
        # FSDP2 may have reduced what one use of a weight brought in this pass, and with it R has a basis: but where G
        # was built, of this process, R of all cannot be added to it.
        task = torch._C._current_graph_task_id()
        if window is None or self._built_in.get(id(shard)) == task:
            return None
        ranks = window.target.ranks
        assert ranks is not None
        count = ranks.size
        share = 1.0 if unit is None else count / unit.divisor(count)
        reduced = _reduced(window, gathered, FactoredGradient(output_gradient, inputs), share)
        if reduced is None:
            self._built_in[id(shard)] = task
        return reduced

    def receive_reduced(self, shard: Tensor, gradient: LowRankGradient) -> None:
        """Use a low-rank gradient that was reduced."""
        window = self._window_of(shard)
        if window is None:
            return
        with torch.no_grad():
            own = LowRankGradient(
                window.param,
                gradient.low_rank,
                gradient.basis,
                is_zero=gradient.is_zero,
                is_lost=gradient.is_lost,
                uncommitted=gradient.uncommitted,
            )
            held = window.param.grad
            if held is None:
                window.param.grad = own
            else:
                held.add_(own)
            # As FSDP2 does for what it reduces: GaLore's hook, and those of others.
            for hook in list((getattr(shard, "_post_accumulate_grad_hooks", None) or {}).values()):
                hook(shard)


def _reduced(window: Window, gathered: Tensor, own: FactoredGradient, share: float) -> LowRankGradient | None:
    """This process's rows of the low-rank gradient of all; the basis is renewed from products with the factors.

    Args:
        window: of the sharded parameter.
        gathered: the weight that is gathered.
        own: the factors of this process's gradient.
        share: of the gradients' mean.
    """
    held, target = window.param.grad, window.target
    if held is not None and not isinstance(held, (LowRankGradient, UsedGradient)):
        return None
    with torch.no_grad(), torch.autocast(gathered.device.type, enabled=False):
        factors = own if share == 1.0 else own._replace(output_gradient=own.output_gradient * share)
        if not window.refresh_is_due():
            bases = target.with_probes(target.bases())
            return LowRankGradient(gathered, target.projected_by(factors, bases), target.version)
        if window.is_shared:
            return None
        made = target.new_basis(factors, held=True)
        if not made.usable:
            zero = made.is_zero
            return LowRankGradient(gathered, made.low_rank, target.version, is_zero=zero, is_lost=made.is_lost)
        # Of several uses of a weight none may bring a basis: autograd adds them up, and asks for G of each, then.
        uncommitted = UncommittedRefresh(made, lambda: window.whole_of(own).to(gathered.dtype))
        return LowRankGradient(gathered, made.low_rank, target.new_version(), uncommitted=uncommitted)


class _GatheredHook:
    """A gathered weight's post-accumulate-grad hook."""

    def __init__(self, hooks: weakref.ref[ShardHooks], shard: weakref.ref[Tensor]) -> None:
        self._hooks = hooks
        self._shard = shard

    def __call__(self, gathered: Tensor) -> None:
        hooks, shard, gradient = self._hooks(), self._shard(), gathered.grad
        if hooks is None or shard is None or not isinstance(gradient, LowRankGradient) or gradient.addend is not None:
            return  # FSDP2 reduces what there is
        gathered.grad = None
        hooks.receive_reduced(shard, gradient)
