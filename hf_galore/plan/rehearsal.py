"""A few training steps of a Trainer with every storage tracked: the same for a plan's fakes and for a real run.

The steps are full ones: the first, which makes all bases and moments; one that refreshes bases of every shape; a plain
one; after the second, an evaluation where the Trainer has one, and a checkpoint. Before the first, the
log-probabilities of a reference where they are computed beforehand.
"""

from __future__ import annotations

import contextlib
import functools
import tempfile
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader
from transformers import DefaultFlowCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import SaveStrategy

from ..integrations.accelerate import unwrapped
from ..integrations.callback import GaLoreCallback, callbacks_of, galore_optimizer
from ..integrations.trainer_parts import micro_batches, wrapped_methods
from ..optim.bases import count_refresh
from ..optim.optimizer import GaLoreOptimizer
from .fakes import Fakes
from .tracking import ACTIVATIONS, FORWARD, StorageTracker

STEPS = 3
_REFRESH_AFTER = 1  # steps
_EVALUATE_AND_SAVE_AFTER = 2

UPDATE, EVALUATION, SAVING = "update", "evaluation", "saving a checkpoint"
REFERENCE = "reference log-probabilities"  # of preferences, before the first step

PARAMETERS, GRADIENTS, LOW_RANK = "parameters", "gradients", "low-rank gradients"
REFERENCE_MODEL = "reference model"
MOMENTS, BASES, BATCH = "moments", "bases", "batches"

Progress = Callable[[str, int], None]
"""Called with what is going on and the number of the step, from 1."""


class Record(NamedTuple):
    """What a rehearsal has seen."""

    tracker: StorageTracker
    resident_bytes: int
    """What stays between steps."""


def rehearse(trainer: Trainer, fakes: Fakes | None = None, progress: Progress | None = None) -> Record:
    """Train for three steps, and track what is in memory.

    Args:
        trainer: of which arguments and callbacks are changed: it is of no use afterwards.
        fakes: where this happens under `fake_training()`. What is between two that are alike is left out then: of a
            long accumulation all micro-batches but the first and the last; the refreshes of matrices of one shape but
            those of the first and the last of them, for memory changes evenly from layer to layer.
        progress: told what goes on.
    """
    _prepare(trainer)
    tracker = StorageTracker(trainer.args.device, None if fakes is None else fakes.call)
    model: nn.Module = trainer.model
    tracker.label((*model.parameters(), *model.buffers()), PARAMETERS)
    reference = getattr(trainer, "ref_model", None)  # of TRL's trainers, which hold the model that it was
    if isinstance(reference, nn.Module):
        tracker.label((*reference.parameters(), *reference.buffers()), REFERENCE_MODEL)
    rehearsal = _Rehearsal(trainer, tracker, fakes is not None, progress or (lambda phase, step: None))
    trainer.add_callback(rehearsal)
    handles = [
        param.register_post_accumulate_grad_hook(rehearsal.label_gradient)
        for param in model.parameters()
        if param.requires_grad
    ]
    iterate = _iterator(fakes, lambda batch: tracker.label(_tensors(batch), BATCH))
    try:
        with (
            tempfile.TemporaryDirectory() as folder,
            mock.patch.object(trainer.args, "output_dir", folder),
            mock.patch.object(DataLoader, "__iter__", iterate),
            # What the host counts with, the turns of a stack's matrices, is neither fake nor of interest here.
            mock.patch.object(torch, "from_numpy", _unseen(torch.from_numpy)),
            mock.patch.object(Tensor, "numpy", _unseen(Tensor.numpy)),
            rehearsal.watching(),
            tracker,
        ):
            rehearsal.compute_reference()
            trainer.train()
            tracker.label(_of_state(trainer, bases=False), MOMENTS)
            tracker.label(_of_state(trainer, bases=True), BASES)
    finally:
        for handle in handles:
            handle.remove()
    return Record(tracker, rehearsal.resident_bytes)


def _prepare(trainer: Trainer) -> None:
    args = trainer.args
    args.max_steps = STEPS
    args.logging_steps = 1
    args.logging_nan_inf_filter = False  # reads the loss, of which fakes know nothing
    args.disable_tqdm = True
    args.resume_from_checkpoint = None
    args.load_best_model_at_end = False
    args.push_to_hub = False
    args.save_strategy = SaveStrategy.NO  # the rehearsal says when
    args.eval_on_start = False
    args.dataloader_num_workers = 0
    args.dataloader_prefetch_factor = None  # only for workers
    args.dataloader_pin_memory = False
    args.dataloader_persistent_workers = False
    # No bars, no reports to trackers; a user's own callbacks may do anything.
    for callback in callbacks_of(trainer):
        if not isinstance(callback, (DefaultFlowCallback, GaLoreCallback)):
            trainer.remove_callback(callback)


class _Rehearsal(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Knows the phase, asks for what has to happen in the three steps, and says what storages are."""

    def __init__(self, trainer: Trainer, tracker: StorageTracker, shorten: bool, progress: Progress) -> None:
        self.resident_bytes = 0
        self._trainer = trainer
        self._tracker = tracker
        self._shorten = shorten
        self._progress = progress
        self._phase = UPDATE
        self._micro_batch = 0
        tracker.use_phases(lambda: self._phase, self._after_backward)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Within, the Trainer's methods tell what they are about."""

        def training_step(method: Callable[..., Any]) -> Callable[..., Any]:
            step = self._in_phase(FORWARD, method)
            return lambda *args, **kwargs: self._train(step, *args, **kwargs)

        with wrapped_methods(
            self._trainer,
            training_step=training_step,
            evaluate=functools.partial(self._in_phase, EVALUATION),
            save_checkpoint=functools.partial(self._in_phase, SAVING),
        ):
            yield

    def compute_reference(self) -> None:
        """Let TRL's DPOTrainer do once more what it has done: compute the log-probabilities of its reference."""
        trainer = self._trainer
        if not getattr(trainer, "precompute_ref_logps", False):
            return
        size = trainer.args.precompute_ref_batch_size or trainer.args.per_device_train_batch_size
        rows = trainer.train_dataset.select(range(min(size, len(trainer.train_dataset))))
        batches = DataLoader(rows, batch_size=size, collate_fn=trainer.data_collator)
        compute = self._in_phase(REFERENCE, trainer.compute_ref_log_probs)
        for batch in trainer.accelerator.prepare(batches):
            compute(trainer.ref_model or trainer.model, batch)

    def _after_backward(self) -> None:
        self._phase = UPDATE  # what is left of a training step is no forward pass

    def _in_phase(self, phase: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            before, self._phase = self._phase, phase
            self._progress(phase, self._trainer.state.global_step + 1)
            try:
                return method(*args, **kwargs)
            finally:
                self._phase = before

        return call

    def _train(self, step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._micro_batch += 1
        last = self._micro_batch == micro_batches(self._trainer)
        if self._shorten and self._micro_batch > 1 and not last:
            loss = torch.zeros((), device=self._trainer.args.device)
            self._tracker.label([loss], ACTIVATIONS)  # as that of a micro-batch that is run
            return loss
        loss = step(*args, **kwargs)
        optimizer = galore_optimizer(self._trainer.optimizer)
        if optimizer is not None and optimizer.hooks is not None:
            self._tracker.label(optimizer.hooks.held(), LOW_RANK)
        if last:
            self._progress(UPDATE, self._trainer.state.global_step + 1)
        return loss

    def label_gradient(self, param: Tensor) -> None:
        """A parameter's hook: its gradient is there."""
        if param.grad is not None:
            self._tracker.label([param.grad], GRADIENTS)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        optimizer = galore_optimizer(self._trainer.optimizer)
        if optimizer is not None and self._shorten:
            # Half of a plan's time would go into first refreshes.
            spared = {id(param) for param in _first_and_last(optimizer)}
            for target in optimizer.targets():
                if id(target.param) not in spared:
                    count_refresh(target.state, 0, None if target.stack is None else range(target.stack))

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._micro_batch = 0
        optimizer = galore_optimizer(self._trainer.optimizer)
        if optimizer is not None and state.global_step == _REFRESH_AFTER:
            # Until the step, a window keeps the bases before its refreshes: those that come together are kept together.
            together = (target.param for target in optimizer.targets() if not target.group["stagger"])
            optimizer.refresh_next((*_first_and_last(optimizer), *together))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.resident_bytes = max(self.resident_bytes, self._tracker.live_bytes)
        if state.global_step == _EVALUATE_AND_SAVE_AFTER:
            control.should_evaluate = self._trainer.eval_dataset is not None
            control.should_save = True
        else:
            control.should_evaluate = control.should_save = False


def _iterator(fakes: Fakes | None, on_batch: Callable[[Any], None]) -> Callable[[DataLoader[Any]], Iterator[Any]]:
    """Instead of `DataLoader.__iter__`: batches are put together on the host, which is not of interest here."""
    original = DataLoader.__iter__

    def iterate(self: DataLoader[Any]) -> Iterator[Any]:
        with _disable_current_modes():
            batches = original(self)
        while True:
            with _disable_current_modes():
                try:
                    batch = next(batches)
                except StopIteration:
                    return
            batch = batch if fakes is None else fakes.batch(batch)
            on_batch(batch)
            yield batch

    return iterate


def _unseen(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, with real numbers, and unseen by what tracks storages."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with _disable_current_modes():
            return function(*args, **kwargs)

    return call


def _first_and_last(optimizer: GaLoreOptimizer) -> Iterable[Tensor]:
    """Of the targets of each shape the first and the last: in between, memory lies between theirs."""
    found: dict[tuple[int, ...], list[Tensor]] = {}
    for target in optimizer.targets():
        found.setdefault((*target.param.shape, target.rank), []).append(target.param)
    return (param for params in found.values() for param in (params[0], params[-1]))


def _of_state(trainer: Trainer, *, bases: bool) -> Iterable[Tensor]:
    """The tensors of any optimizer's state: those of bases, or the others."""
    optimizer = unwrapped(trainer.optimizer)
    of_bases = {"projector"}  # galore_torch's
    if isinstance(optimizer, GaLoreOptimizer):
        of_bases = {key for target in optimizer.targets() for key in target.basis_keys}
    for state in optimizer.state.values():
        for key, value in state.items():
            if (key in of_bases) == bases:
                yield from _tensors(value)


def _tensors(value: Any) -> Iterable[Tensor]:
    # An optimizer may keep an object of its own, as galore_torch keeps its projector.
    leaves = (
        tree_leaves(vars(value)) if hasattr(value, "__dict__") and not isinstance(value, Tensor) else tree_leaves(value)
    )
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]
