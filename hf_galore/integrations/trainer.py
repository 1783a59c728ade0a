"""The names of GaLore's optimizers in transformers: which methods of `Trainer` are replaced, and with what.

`register()` replaces some methods of `transformers.Trainer`; `unregister()` puts them back. Each replacement
concerns itself with the `galore_*` optimizers only and hands everything else on.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import pickle
import threading
from collections.abc import Iterator
from typing import Any, cast

import transformers
from torch import nn
from transformers import TrainingArguments
from transformers.trainer import Trainer

from ..backward.attached import detach_all
from ..config import GaLoreConfig
from ..optim.build import KINDS, needs_hooks, optimizer_cls_and_kwargs
from ..optim.classes import GaLoreAdamW
from .callback import GaLoreCallback, galore_callback, galore_optimizer
from .checks import (
    check_asked_for,
    check_can_hook,
    check_int8_engine,
    check_no_adam_arguments,
    check_no_engine,
    check_optimizer,
    optim_name,
    why_not_loadable,
)
from .holding import check_arguments, hold_for_others
from .int8_quantizer import register_int8, unregister_int8
from .int8_saving import check_taken
from .llamafactory import OWN_OPTIMIZERS, is_llamafactorys
from .signatures import moved
from .trl_head import restore_fused_head, use_fused_head

__all__ = [
    "KINDS",
    "PATCHED",
    "GaLoreCallback",
    "galore_optimizer",
    "is_registered",
    "moved_internals",
    "optim_name",
    "register",
    "registered",
    "unregister",
]

# The methods of Trainer that are replaced, with the signatures that the replacements were written for.
PATCHED: dict[str, str] = {
    "get_optimizer_cls_and_kwargs": "(args, model=None)",
    "create_optimizer": "(self, model=None)",
    "_inner_training_loop": (
        "(self, batch_size=None, args=None, resume_from_checkpoint=None, trial=None, ignore_keys_for_eval=None)"
    ),
    "_prepare_for_training": "(self, max_steps, train_dataloader, resume_from_checkpoint)",
    "_load_optimizer_and_scheduler": "(self, checkpoint)",
    "_clip_grad_norm": "(self, model)",
    "_get_grad_norm": "(self, model, grad_norm=None)",
    "log": "(self, logs, start_time=None)",
}

_originals: dict[str, Any] = {}
_registering = threading.Lock()


def unregister() -> None:
    """Give transformers its own methods back. Does nothing where they are."""
    restore_fused_head()
    unregister_int8()
    with _registering:
        while _originals:
            name, original = _originals.popitem()
            setattr(Trainer, name, original)


def moved_internals() -> list[str]:
    """What this transformers no longer has as `register()` needs it, in words; empty where all is well."""
    return moved(Trainer, "Trainer", PATCHED)


def _get_optimizer_cls_and_kwargs(args: TrainingArguments, model: nn.Module | None = None) -> tuple[Any, Any]:
    """Replaces `Trainer.get_optimizer_cls_and_kwargs`.

    The Trainer calls the class with its own parameter groups, so its split into decayed and undecayed parameters, or
    a subclass's, stands; `param_options` divides those groups further.
    """
    if optim_name(args) not in KINDS:
        return cast("tuple[Any, Any]", _originals["get_optimizer_cls_and_kwargs"](args, model))
    return galore_cls_and_kwargs(args, model, say=args.process_index == 0)


def galore_cls_and_kwargs(args: TrainingArguments, model: nn.Module | None, *, say: bool) -> tuple[Any, Any]:
    """What `Trainer.get_optimizer_cls_and_kwargs` gives for a `galore_*` optim; the model may be on the meta device.

    Args:
        args: the training arguments.
        model: the model.
        say: whether to say what is projected.

    Raises:
        ValueError: something in the arguments is wrong, or does not go with the model.
        TypeError: `optim_target_modules` is neither a string nor a list of strings.
    """
    name = optim_name(args)
    config = GaLoreConfig.from_optim_args(args.optim_args)
    if args.optim_target_modules is None:
        raise ValueError(
            f"optim={name!r} needs optim_target_modules: which weights to project, such as ['attn', 'mlp'] or "
            "'all-linear'."
        )
    if model is None:
        raise ValueError(f"optim={name!r} needs the model, to find optim_target_modules in it. {_who_asks(args)}")
    check_no_engine(f"optim={name!r}", args)
    if needs_hooks(name, config):
        asked = f"optim={name!r}" + (" with projected_backward=true" if config.projected_backward else "")
        check_can_hook(asked, f"optim={name.removesuffix('_layerwise')!r} without projected_backward", args)
    check_arguments(name, config, args)
    cls, kwargs = optimizer_cls_and_kwargs(
        model,
        args.optim_target_modules,
        optim=name,
        config=config,
        hold_gradients=args.max_grad_norm > 0,
        say=say,
    )
    kwargs["lr"] = args.learning_rate
    if issubclass(cls, GaLoreAdamW):
        kwargs.update(betas=(args.adam_beta1, args.adam_beta2), eps=args.adam_epsilon)
    else:
        check_no_adam_arguments(name, args)
    return cls, kwargs


def _who_asks(args: TrainingArguments) -> str:
    """What to do where somebody asks for a class without giving the model."""
    if is_llamafactorys(args):
        names = ", ".join(OWN_OPTIMIZERS)
        return (
            "LLaMA-Factory asks without it for an optimizer of its own, which optim has no say in. Leave out what sets "
            f"that ({names}); or, to train with it, optim, optim_target_modules and optim_args."
        )
    return "Call Trainer.get_optimizer_cls_and_kwargs(args, model)."


def _create_optimizer(self: Trainer, model: nn.Module | None = None) -> Any:
    """Replaces `Trainer.create_optimizer`."""
    opt_model = self.model if model is None else model
    if opt_model is not None:
        # Hooks that an interrupted run left, of whatever optimizer: this trainer's own are put back below.
        detach_all(opt_model)
    if _uses_galore(self):
        check_no_engine(f"optim={optim_name(self.args)!r}", self.args, self)
    wrapper = _originals["create_optimizer"](self, model)
    _look_after(self)
    return wrapper


def _inner_training_loop(
    self: Trainer,
    batch_size: int | None = None,
    args: TrainingArguments | None = None,
    resume_from_checkpoint: str | None = None,
    trial: Any = None,
    ignore_keys_for_eval: list[str] | None = None,
) -> Any:
    """Replaces `Trainer._inner_training_loop`: however it is left, no hooks stay on the model.

    `auto_find_batch_size` calls it again after an exception, with the optimizer that is there.
    """
    if self.model is not None:
        detach_all(self.model)  # a subclass's `create_optimizer` need not come by here
    try:
        return _originals["_inner_training_loop"](
            self,
            batch_size=batch_size,
            args=args,
            resume_from_checkpoint=resume_from_checkpoint,
            trial=trial,
            ignore_keys_for_eval=ignore_keys_for_eval,
        )
    finally:
        optimizer = galore_optimizer(self.optimizer)
        if optimizer is not None:
            optimizer.close()


def _prepare_for_training(self: Trainer, max_steps: Any, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
    """Replaces `Trainer._prepare_for_training`, after which there is an optimizer, wherever it comes from."""
    check_int8_engine(self)
    _look_after(self)  # one that is there already: before its state is loaded
    given = self.optimizer is not None or self.optimizer_cls_and_kwargs is not None
    prepared = _originals["_prepare_for_training"](self, max_steps, train_dataloader, resume_from_checkpoint)
    _look_after(self)
    check_asked_for(self, given)
    return prepared


def _look_after(trainer: Trainer) -> None:
    """Where a trainer has a GaLore optimizer: check that it can do what is asked, and put its hooks on the model.

    Raises:
        ValueError: it cannot; the message says what to change.
    """
    optimizer = galore_optimizer(trainer.optimizer)
    if optimizer is None:
        return
    try:
        check_optimizer(trainer, optimizer)
    except ValueError:
        optimizer.close()  # making it has put the hooks on
        raise
    if optimizer.hooks is not None:
        optimizer.hooks.attach()
        use_fused_head()
        hold_for_others(trainer, optimizer)
    if galore_callback(trainer) is None:
        trainer.add_callback(GaLoreCallback)


def _load_optimizer_and_scheduler(self: Trainer, checkpoint: str | None) -> None:
    """Replaces `Trainer._load_optimizer_and_scheduler`, which advises to load what cannot be used unsafely.

    Raises:
        ValueError: the checkpoint cannot be used; or the model, loaded before, had no place for its weights.
    """
    if checkpoint is not None and galore_optimizer(self.optimizer) is not None and self.model is not None:
        check_taken(self.model, checkpoint)
    try:
        _originals["_load_optimizer_and_scheduler"](self, checkpoint)
    except pickle.UnpicklingError:
        reason = None
        if checkpoint is not None and galore_optimizer(self.optimizer) is not None:
            reason = why_not_loadable(os.path.join(checkpoint, "optimizer.pt"))
        if reason is None:
            raise
        raise ValueError(f"{checkpoint} cannot be resumed. {reason}") from None


def _clip_grad_norm(self: Trainer, model: nn.Module) -> Any:
    """Replaces `Trainer._clip_grad_norm`: by the optimizer's own rule, which skips all of a step that is not finite."""
    optimizer = galore_optimizer(self.optimizer)
    if optimizer is not None:
        self.accelerator.unscale_gradients()  # of no effect but with fp16
        return optimizer.clip_grad_norm_(self.args.max_grad_norm)
    return _originals["_clip_grad_norm"](self, model)


def _get_grad_norm(self: Trainer, model: nn.Module, grad_norm: Any = None) -> Any:
    """Replaces `Trainer._get_grad_norm`: layerwise gradients are gone when the Trainer looks for them."""
    optimizer = galore_optimizer(self.optimizer)
    if optimizer is not None:
        if grad_norm is not None:
            return grad_norm
        self.accelerator.unscale_gradients()
        return optimizer.grad_norm()
    return _originals["_get_grad_norm"](self, model, grad_norm)


def _log(self: Trainer, logs: dict[str, float], start_time: float | None = None) -> None:
    """Replaces `Trainer.log`, the way to all that reports: the callback's own `on_log` comes after some of them."""
    callback, optimizer = galore_callback(self), galore_optimizer(self.optimizer)
    if callback is not None and optimizer is not None and "loss" in logs:  # not the logs of evaluation and of the end
        logs.update(callback.figures(optimizer))
    _originals["log"](self, logs, start_time)


def _uses_galore(trainer: Trainer) -> bool:
    made_elsewhere = trainer.optimizer is not None or trainer.optimizer_cls_and_kwargs is not None
    return not made_elsewhere and optim_name(trainer.args) in KINDS


def is_registered() -> bool:
    """Whether the `galore_*` names mean these optimizers at present."""
    return bool(_originals)


@contextlib.contextmanager
def registered() -> Iterator[None]:
    """Within, the `galore_*` names mean these optimizers; afterwards what they meant before.

    For functions that make a Trainer by such a name, which do not need `import hf_galore` then.
    """
    before = is_registered()
    register()
    try:
        yield
    finally:
        if not before:
            unregister()


def _let_through(replacement: Any, original: Any) -> None:
    """Let who looks at a method of the Trainer see the one that is replaced: its name, signature and source.

    unsloth makes a training loop of its own of the source of `Trainer._inner_training_loop`, and knows it by its name.
    """
    seen, behind = (getattr(method, "__func__", method) for method in (replacement, original))
    seen.__name__, seen.__wrapped__ = behind.__name__, behind


# The last thing in this file: where it is there, all that it needs is (`hf_galore.registering`).
def register() -> None:
    """Make the `galore_*` names of `TrainingArguments.optim` mean these optimizers. Once or many times alike.

    Raises:
        ImportError: this transformers has changed what is replaced; the message names it.
    """
    replacements = {
        "get_optimizer_cls_and_kwargs": staticmethod(_get_optimizer_cls_and_kwargs),
        "create_optimizer": _create_optimizer,
        "_inner_training_loop": _inner_training_loop,
        "_prepare_for_training": _prepare_for_training,
        "_load_optimizer_and_scheduler": _load_optimizer_and_scheduler,
        "_clip_grad_norm": _clip_grad_norm,
        "_get_grad_norm": _get_grad_norm,
        "log": _log,
    }
    with _registering:
        if _originals:
            return
        missing = moved_internals()
        if missing:
            raise ImportError(
                f"hf_galore cannot register with transformers {transformers.__version__}: {'; '.join(missing)}. "
                "Install a transformers that hf_galore's requirements name, or a newer hf_galore."
            )
        for name, replacement in replacements.items():
            _originals[name] = inspect.getattr_static(Trainer, name)
            _let_through(replacement, _originals[name])
            setattr(Trainer, name, replacement)
        register_int8()
