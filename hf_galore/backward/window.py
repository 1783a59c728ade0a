"""What the backward passes of one optimizer step bring for one parameter, and what is done with it.

===============================  ===================================================
situation                        what happens to a target's low-rank gradient R
===============================  ===================================================
layerwise, one micro-batch,      the weight is updated at once; `.grad` says that the
nothing held on request          gradient has been used
accumulation window              R of the micro-batches adds up (projection is linear)
`hold_gradients` (clipping)      R is held
weight used by several           R of the segments adds up
reentrant checkpoints
not layerwise                    R is held (there is only a projected backward)
===============================  ===================================================

The basis is fixed within a window. A refresh that is due happens at its first micro-batch whose gradient is not zero,
from that micro-batch's whole gradient, which autograd builds for that one layer; the projected backward serves the
others. Of a backward pass whose gradients are dropped (`.grad = None`) before `step()`, nothing stays, nor does a
refresh.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from ..lowrank.products import FactoredGradient, Gradient, GroupedGradient
from ..lowrank.projection import Bases, norm_of
from .gradient import BasisVersion, LowRankGradient, UncommittedRefresh, UsedGradient
from .late_rows import LateRows
from .mode import Mode
from .passes import Passes
from .processes import world_size

if TYPE_CHECKING:
    from ..optim.bases import Before, NewBasis
    from ..optim.target import Target
    from ..optim.trained import Trained
    from .exchange import Exchange


class Window:
    """One parameter's part in the present step.

    Args:
        trained: the parameter.
        mode: of the hooks.
        handle: takes the hook off the parameter, by `remove()`.
    """

    def __init__(self, trained: Trained, mode: Mode, handle: Any) -> None:
        self.handle = handle
        self.trained = trained
        self.param: Tensor = trained.local
        self.passes = Passes()
        self.late_rows = LateRows()
        self._mode = mode
        self.is_shared = False  # whether several modules or functions have used the weight in one backward pass
        self._used: UsedGradient | None = None
        self.exchange: Exchange | None = None
        """What reduces its gradient over the processes that train copies of the model, if any do."""
        self._forget()

    def _forget(self) -> None:
        self._filled = False  # whether a low-rank gradient was left in `.grad`
        self._before: Before | None = None  # the basis before this window's refresh
        self._updated = False
        self._norm: Tensor | None = None  # of the gradient that the weight was updated with
        # What a gradient was projected with, for the update that follows at once: quantised bases take time to read.
        self._bases_at_hand: tuple[BasisVersion, Bases] | None = None

    @property
    def target(self) -> Target:
        """The parameter, which is a target."""
        return cast("Target", self.trained)

    # ---- what others ask

    @property
    def has_updated(self) -> bool:
        """Whether the backward pass has updated the weight."""
        return isinstance(self.param.grad, UsedGradient)

    @property
    def norm(self) -> Tensor | None:
        """The norm of the gradient that the weight was updated with, if it was."""
        return self.trained.over_ranks(self._norm) if self._updated and self._norm is not None else None

    @property
    def before(self) -> Before | None:
        """The basis before this window's refresh, where there was one and its gradient has not been dropped."""
        self.look()
        return self._before

    @property
    def was_dropped(self) -> bool:
        """Whether somebody has dropped or replaced the gradient that the weight was updated with."""
        return self._updated and (not isinstance(self.param.grad, UsedGradient) or self.param.grad.was_zeroed)

    # ---- its beginning and end

    def start(self) -> None:
        """Begin the next window."""
        if isinstance(self.param.grad, UsedGradient):
            self.param.grad = None
        self._forget()
        self.late_rows.clear()
        self.passes.clear()

    def drop(self) -> None:
        """Forget what the backward passes brought; a forward pass may have begun the next."""
        if isinstance(self.param.grad, (LowRankGradient, UsedGradient)):
            self.param.grad = None
        self.look()
        self._forget()
        self.passes.forget_gone()

    def look(self) -> None:
        """Look whether somebody has dropped what was left in `.grad`, and take back what came of it."""
        self._mode.touched.setdefault(id(self.trained.param), self)
        gradient = self.param.grad
        if self._updated:
            if self.was_dropped:
                self._mode.say_dropped(self.trained.name)
                self._forget()
        elif self._filled and (not isinstance(gradient, LowRankGradient) or gradient.is_zero):
            if self._before is not None:
                self.target.take_back(self._before)
            self._forget()

    # ---- what a linear layer's backward brings

    def gradient_of(self, factors: FactoredGradient | GroupedGradient) -> Tensor | None:
        """The low-rank gradient from δ and X of one use of a target; `None` where G is needed."""
        if not self.trained.projected or self._needs_whole():
            return None
        weight, target = self.param, self.target
        with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
            if not self._refresh_due():
                return LowRankGradient(weight, self._projected(factors).to(weight.dtype), target.version)
            # With several uses each would be a refresh, and none that of the sum; nor is one process's that of all.
            several = self.is_shared or self.passes.count() > 1 or self.exchange is not None
            if several or not target.takes_factors(factors):
                return None
            made = target.new_basis(factors, held=True)
            low_rank = made.low_rank.to(weight.dtype)
            if not made.usable:
                zero, lost = made.is_zero, made.is_lost
                return LowRankGradient(weight, low_rank, target.version, is_zero=zero, is_lost=lost)
            uncommitted = UncommittedRefresh(made, lambda: self.whole_of(factors))
            return LowRankGradient(weight, low_rank, target.new_version(), uncommitted=uncommitted)

    def _projected(self, gradient: Gradient) -> Tensor:
        """The low-rank gradient in the present basis, which is kept for an update that is to follow at once."""
        bases = self.target.bases_here()
        self._bases_at_hand = (self.target.version, bases) if self._is_at_once() else None
        return self.target.projected_by(gradient, self.target.with_probes_here(bases) if self._probes() else bases)

    def _probes(self) -> bool:
        """Whether norm probes are to tell the norm: else it is known, of all that there is of a gradient."""
        return not (self._mode.whole_norms and self._is_at_once())

    def whole_of(self, factors: FactoredGradient | GroupedGradient) -> Tensor:
        """G of one use of the weight, of several."""
        self.is_shared = True
        return factors.whole().to(self.param.dtype)

    def _needs_whole(self) -> bool:
        """Whether somebody else needs the gradient as it is: a hook on the weight, or one that is there already."""
        weight = self.param
        return bool(weight._backward_hooks) or not (
            weight.grad is None or isinstance(weight.grad, (LowRankGradient, UsedGradient))
        )

    def refresh_is_due(self) -> bool:
        """Whether the present micro-batch is to bring a new basis: not on top of R in the present one."""
        return not self._has_low_rank() and self._refresh_due()

    def bases_for_rows(self) -> Bases | None:
        """The bases that rows of a gradient can be projected with by themselves; `None` where autograd has to build it.

        Only a projection of the right side takes rows by themselves, and only between refreshes.
        """
        if not self._mode.projected_backward or not self.trained.projected or self.target.side != "right":
            return None
        if self._needs_whole() or self._refresh_due():
            return None
        return self.target.with_probes(self.target.bases())

    def of_rows(self, low_rank: Tensor) -> LowRankGradient:
        """The low-rank gradient whose rows were projected with `bases_for_rows`."""
        return LowRankGradient(self.param, low_rank, self.target.version)

    # ---- what autograd brings

    def receive(self) -> None:
        """Use the gradient that autograd has put into `.grad`."""
        param = self.param
        # With create_graph=True the gradient is part of a graph that is still needed, as it is.
        if param.grad is None or torch.is_grad_enabled():
            return
        # Backward may run inside somebody's autocast; the update's precision is its own business.
        with torch.no_grad(), torch.autocast(param.device.type, enabled=False):
            self.late_rows.add_to_(param.grad)
            self.look()
            if isinstance(param.grad, UsedGradient):
                param.grad = param.grad.addend
            if self.trained.projected:
                self._receive_target()
            elif not self._must_hold():
                assert param.grad is not None
                self._norm = norm_of(param.grad)
                self.trained.step(param.grad, self.trained.over_ranks(self._norm))
                self._leave_used()

    def _receive_target(self) -> None:
        if self.exchange is not None:
            self._receive_to_send(self.exchange)
            return
        param, target, gradient = self.param, self.target, self.param.grad
        assert gradient is not None
        if not isinstance(gradient, LowRankGradient) or gradient.addend is not None:
            if self.passes.count() > 1 and self._refresh_due():
                return  # it is that of one segment only: step() takes the basis from the sum
            whole = gradient.addend if isinstance(gradient, LowRankGradient) else gradient
            assert whole is not None
            param.grad = gradient = None
            gradient = self._project(whole)
            del whole
        elif gradient.uncommitted is not None:
            made, gradient.uncommitted = gradient.uncommitted.made, None
            self._before = target.use_basis(made, gradient.basis, keep=self._must_hold())
        self._use(gradient)

    def _use(self, gradient: LowRankGradient) -> None:
        """Hold a low-rank gradient, or update the weight with it."""
        param, target = self.param, self.target
        if self._must_hold():
            self._filled = True
            self.target.hold(gradient)
            if param.grad is not gradient:
                param.grad = gradient
            return
        param.grad = None
        low_rank_norm = norm_of(gradient.low_rank)
        self._norm = low_rank_norm if gradient.norm_of_whole is None else gradient.norm_of_whole
        version, bases = self._bases_at_hand or (None, None)
        bases = bases if version is target.version else None
        low_rank_norm = target.over_ranks(low_rank_norm)
        target.update(gradient.low_rank, low_rank_norm, before=self._before, bases=bases)
        self._before = self._bases_at_hand = None
        self._leave_used()

    def _project(self, whole: Tensor) -> LowRankGradient:
        """The low-rank gradient of G, with a new basis from it where that is due."""
        param, target = self.param, self.target
        norm = norm_of(whole) if self._mode.whole_norms else None
        if not self._refresh_due():
            return LowRankGradient(param, self._projected(whole), target.version, norm=norm)
        return self._refreshed(target.new_basis(whole, held=self._probes()), norm)

    def _refreshed(self, made: NewBasis, norm: Tensor | None) -> LowRankGradient:
        """The low-rank gradient of G that bases were made from, which are used from now on."""
        param, target, zero, lost = self.param, self.target, made.is_zero, made.is_lost
        if made.usable:
            self._before = target.use_basis(made, target.new_version(), keep=self._must_hold())
        return LowRankGradient(param, made.low_rank, target.version, norm=norm, is_zero=zero, is_lost=lost)

    # ---- what processes reduce together

    def _receive_to_send(self, exchange: Exchange) -> None:
        """Keep the gradient of this pass, as R if no more than that is needed, and send it."""
        kind = exchange.kind(self)
        if kind is None and self.refresh_is_due():
            return  # it stays as it is until a pass in the wrapper, which takes the basis from the sum
        if kind is None or kind == "low_rank":
            gradient = self.param.grad
            whole = gradient.addend if isinstance(gradient, LowRankGradient) else gradient
            if whole is not None:
                low_rank = self.target.projected_by(whole, self.target.with_probes(self.target.bases()))
                self.param.grad = gradient = LowRankGradient(self.param, low_rank, self.target.version)
            assert isinstance(gradient, LowRankGradient)
            self._filled = True
            if kind is None:
                self.target.hold(gradient)
        exchange.receive(self)

    def low_rank_to_send(self) -> Tensor:
        """R of this process, of all passes of the window; zeros where there is none."""
        gradient = self.param.grad
        if not isinstance(gradient, LowRankGradient):
            return self.param.new_zeros(self.target.held_shape)
        return gradient.low_rank

    def hold_sent(self, low_rank: Tensor) -> None:
        """Hold R where its mean is going to be."""
        gradient = self.param.grad
        if isinstance(gradient, LowRankGradient):
            gradient.kept = low_rank

    def whole_to_send(self) -> Tensor:
        """G of this process, which is taken out of `.grad`; zeros where there is none."""
        gradient, self.param.grad = self.param.grad, None
        if isinstance(gradient, LowRankGradient):
            gradient = gradient.addend  # R itself is zero: else no basis would be due
        return torch.zeros_like(self.param) if gradient is None else gradient.contiguous()

    def use_low_rank(self, low_rank: Tensor) -> None:
        """Use R that was reduced."""
        self._use(LowRankGradient(self.param, low_rank, self.target.version))

    def use_whole(self, whole: Tensor) -> None:
        """Use G that was reduced, between refreshes."""
        self._use(self._project(whole))

    def use_refresh(self, made: NewBasis) -> None:
        """Use the basis, and R, that come from a gradient that was reduced."""
        norm = torch.tensor(made.norm, device=self.param.device) if self._mode.whole_norms else None
        self._use(self._refreshed(made, norm))

    def _leave_used(self) -> None:
        param, used = self.param, self._used
        self._updated = True
        if used is None or used.device != param.device or used.dtype != param.dtype or used.shape != param.shape:
            used = self._used = UsedGradient(param, self.trained.name, self._mode.instead)
        used.start(self._norm)
        param.grad = used

    def _is_at_once(self) -> bool:
        """Whether an update is to follow in this backward pass."""
        return self.exchange is None and not self._must_hold()

    def _must_hold(self) -> bool:
        if self.exchange is not None and self.exchange.accumulates:
            self._mode.accumulating = True
        # Of several processes' gradients none is used before it has been reduced.
        alone = self.exchange is None and self.trained.ranks is None and world_size() > 1
        return self._mode.must_hold() or self.passes.count() > 1 or alone

    def _refresh_due(self) -> bool:
        if self.before is not None or not self.target.due():
            return False
        # Matrices of a stack that had no gradient when their turn was wait for one; the others' R may be there already.
        return self.target.stack is None or not self._has_low_rank()

    def _has_low_rank(self) -> bool:
        """Whether there is R, in the present basis."""
        gradient = self.param.grad
        return isinstance(gradient, LowRankGradient) and not gradient.is_zero
