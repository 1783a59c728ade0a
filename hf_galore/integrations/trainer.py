"""All contact with the internals of transformers: the optimizer names, and what a Trainer has to do differently.

`register()` replaces some methods of `transformers.Trainer`; `unregister()` puts them back. Each replacement
concerns itself with the `galore_*` optimizers only and hands everything else on.
"""

from __future__ import annotations

import dataclasses
import inspect
import os
import pickle
from typing import Any, cast

import torch
import transformers
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import Trainer
from transformers.training_args import ParallelMode

from ..backward.hooks import detach_all
from ..config import GaLoreConfig
from ..log import logger
from ..optim.admission import check_parameters
from ..optim.classes import GaLoreAdafactor, GaLoreAdamW, GaLoreAdamW8bit
from ..optim.groups import FROM_WEIGHTS, written_by_galore_torch
from ..optim.optimizer import GaLoreOptimizer
from .target_modules import embedding_weights, find_targets, summarize
from .trl_head import restore_fused_head, use_fused_head


@dataclasses.dataclass(frozen=True)
class _Kind:
    cls: type[GaLoreOptimizer]
    layerwise: bool


KINDS: dict[str, _Kind] = {
    "galore_adamw": _Kind(GaLoreAdamW, layerwise=False),
    "galore_adamw_8bit": _Kind(GaLoreAdamW8bit, layerwise=False),
    "galore_adafactor": _Kind(GaLoreAdafactor, layerwise=False),
    "galore_adamw_layerwise": _Kind(GaLoreAdamW, layerwise=True),
    "galore_adamw_8bit_layerwise": _Kind(GaLoreAdamW8bit, layerwise=True),
    "galore_adafactor_layerwise": _Kind(GaLoreAdafactor, layerwise=True),
}

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


def register() -> None:
    """Make the `galore_*` names of `TrainingArguments.optim` mean these optimizers. Once or many times alike.

    Raises:
        ImportError: this transformers has changed what is replaced; the message names it.
    """
    if _originals:
        return
    moved = moved_internals()
    if moved:
        raise ImportError(
            f"hf_galore cannot register with transformers {transformers.__version__}: {'; '.join(moved)}. Install a "
            "transformers that hf_galore's requirements name, or a newer hf_galore."
        )
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
    for name, replacement in replacements.items():
        _originals[name] = inspect.getattr_static(Trainer, name)
        setattr(Trainer, name, replacement)


def unregister() -> None:
    """Give transformers its own methods back. Does nothing where they are."""
    restore_fused_head()
    while _originals:
        name, original = _originals.popitem()
        setattr(Trainer, name, original)


def moved_internals() -> list[str]:
    """What this transformers no longer has as `register()` needs it, in words; empty where all is well."""
    moved = []
    for name, expected in PATCHED.items():
        method = getattr(Trainer, name, None)
        if method is None:
            moved.append(f"Trainer.{name}{expected} is gone")
            continue
        signature = inspect.signature(method)
        found = str(
            signature.replace(
                parameters=[p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()],
                return_annotation=inspect.Signature.empty,
            )
        )
        if found != expected:
            moved.append(f"Trainer.{name}{expected} is now {name}{found}")
    return moved


class GaLoreCallback(TrainerCallback):
    """Looks after a GaLore optimizer, and adds what it can tell to the Trainer's log.

    A Trainer that trains with a GaLore optimizer, by its name or otherwise, gets one. On each logging step it logs,
    under `galore/`:

    - `refreshes`, all of the run so far, and with `lazy_refresh` how many it saved: `refreshes_saved`;
    - of the refreshes since the last logging step, where there were any: `captured_energy_min` and `_median` (the part
      of the gradient's squared norm that the new basis captures), `overlap_median` (of new and old subspace, 0 to 1)
      and `refresh_seconds`, their sum;
    - on the first logging step of a run, what stays the same: `moment_mib` and `basis_mib`, the sizes in MiB, and the
      counts of parameters, `targets` and `full_rank`.

    It takes the optimizer's hooks off the model when training ends, and warns of skipped updates.
    """

    def __init__(self) -> None:
        self._logged_sizes = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The sizes are logged once a run."""
        self._logged_sizes = False

    def figures(self, optimizer: GaLoreOptimizer) -> dict[str, float]:
        """What a logging step adds to the log. Waits for the device, as the Trainer has just done for the loss."""
        figures = optimizer.refresh_figures()
        if not self._logged_sizes:
            self._logged_sizes = True
            memory = optimizer.memory()
            figures["moment_mib"] = memory.moment_bytes / 2**20
            figures["basis_mib"] = memory.basis_bytes / 2**20
            figures["targets"] = memory.targets
            figures["full_rank"] = memory.full_rank
        return {f"galore/{key}": value for key, value in figures.items()}

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """The Trainer has just waited for the device: what the optimizer counted there costs nothing more to read."""
        optimizer = galore_optimizer(kwargs.get("optimizer"))
        if optimizer is not None:
            optimizer.warn_of_skipped()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A later backward pass on the model trains nothing."""
        optimizer = galore_optimizer(kwargs.get("optimizer"))
        if optimizer is not None:
            optimizer.close()


def _get_optimizer_cls_and_kwargs(args: TrainingArguments, model: nn.Module | None = None) -> tuple[Any, Any]:
    """Replaces `Trainer.get_optimizer_cls_and_kwargs`.

    The Trainer calls the class with its own parameter groups, so its split into decayed and undecayed parameters, or
    a subclass's, stands; `param_options` divides those groups further.
    """
    name = optim_name(args)
    kind = KINDS.get(name)
    if kind is None:
        return cast("tuple[Any, Any]", _originals["get_optimizer_cls_and_kwargs"](args, model))
    config = GaLoreConfig.from_optim_args(args.optim_args)
    if args.optim_target_modules is None:
        raise ValueError(
            f"optim={name!r} needs optim_target_modules: which linear layers to project, such as ['attn', 'mlp'] or "
            "'all-linear'."
        )
    if model is None:
        raise ValueError(f"optim={name!r} needs the model, to find optim_target_modules in it.")
    _check_no_engine(f"optim={name!r}", args)
    projected_backward = kind.layerwise if config.projected_backward is None else config.projected_backward
    if kind.layerwise or projected_backward:
        asked = f"optim={name!r}" + (" with projected_backward=true" if config.projected_backward else "")
        _check_can_hook(asked, f"optim={name.removesuffix('_layerwise')!r} without projected_backward", args)

    check_parameters(model.named_parameters(), model)  # before the optimizer makes state for them
    targets = find_targets(model, args.optim_target_modules, config)
    options: dict[Tensor, dict[str, Any]] = {}
    if kind.cls is not GaLoreAdamW8bit:
        if config.embedding_bits != 32:
            raise ValueError(
                f"embedding_bits={config.embedding_bits} is for the 8-bit optimizers, and {name!r} is none of them. "
                "Leave it out."
            )
    elif config.embedding_bits == 32:  # bitsandbytes' rule, which the Trainer applies to its 8-bit optimizers
        options.update((weight, {"optim_bits": 32}) for weight in embedding_weights(model))
    options.update((weight, config.group_options()) for weight in targets.projected.values())
    if args.process_index == 0:
        logger.info(summarize(model, targets, config))
        adapters = targets.lora_adapters()
        if adapters:
            logger.warning(
                "%d of the %d matrices that GaLore projects are adapters of LoRA, such as %s. Their optimizer state is "
                "small as it is, and projecting them gains nothing: train them with optim='adamw_torch', or the model "
                "itself without LoRA.",
                len(adapters),
                len(targets.projected),
                adapters[0],
            )

    kwargs: dict[str, Any] = {
        "lr": args.learning_rate,
        "param_options": options,
        "module": model,
        "layerwise": kind.layerwise,
        "projected_backward": projected_backward,
        "hold_gradients": args.max_grad_norm > 0,
        "stochastic_rounding": config.stochastic_rounding,
    }
    if issubclass(kind.cls, GaLoreAdamW):
        kwargs.update(betas=(args.adam_beta1, args.adam_beta2), eps=args.adam_epsilon)
    else:
        _check_no_adam_arguments(name, args)
    return kind.cls, kwargs


def _create_optimizer(self: Trainer, model: nn.Module | None = None) -> Any:
    """Replaces `Trainer.create_optimizer`."""
    opt_model = self.model if model is None else model
    if opt_model is not None:
        # Hooks that an interrupted run left, of whatever optimizer: this trainer's own are put back below.
        detach_all(opt_model)
    if _uses_galore(self):
        _check_no_engine(f"optim={optim_name(self.args)!r}", self.args, self)
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
    _look_after(self)  # one that is there already: before its state is loaded
    prepared = _originals["_prepare_for_training"](self, max_steps, train_dataloader, resume_from_checkpoint)
    _look_after(self)
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
        _check_optimizer(trainer, optimizer)
    except ValueError:
        optimizer.close()  # making it has put the hooks on
        raise
    if optimizer.hooks is not None:
        optimizer.hooks.attach()
        use_fused_head()
        _hold_for_others(trainer, optimizer)
    if _callback_of(trainer) is None:
        trainer.add_callback(GaLoreCallback)


def _check_optimizer(trainer: Trainer, optimizer: GaLoreOptimizer) -> None:
    """Refuse what an optimizer cannot do, whoever made it."""
    kind = type(optimizer).__name__
    _check_no_engine(kind, trainer.args, trainer)
    if optimizer.hooks is not None:
        asked = f"{kind} with layerwise=True or projected_backward=True"
        _check_can_hook(asked, f"{kind} without them", trainer.args)
    _check_targets(trainer, optimizer)
    if trainer.model is not None:
        trained = {id(param) for group in optimizer.param_groups for param in group["params"]}
        named = ((name, param) for name, param in trainer.model.named_parameters() if id(param) in trained)
        check_parameters(named, trainer.model, on_meta=False)


def _check_targets(trainer: Trainer, optimizer: GaLoreOptimizer) -> None:
    """Refuse an optimizer that somebody else made with no targets where the arguments ask for some."""
    args, kind, name = trainer.args, type(optimizer).__name__, optim_name(trainer.args)
    if args.optim_target_modules is None and not (name in KINDS and args.optim_args):
        return
    options = [GaLoreConfig.from_group(target.group) for target in optimizer.targets()]
    if not options:
        raise ValueError(
            f"optim_target_modules is {args.optim_target_modules!r}, but the {kind} that this Trainer was given, or "
            "that a subclass of it made, projects nothing: optim_target_modules and optim_args are read only where the "
            "Trainer makes the optimizer by its name. Set optim='galore_adamw' and leave out optimizers and "
            "optimizer_cls_and_kwargs; or give the optimizer its targets, by groups with a 'rank' or by "
            "param_options={weight: {'rank': 128}}, as Trainer.get_optimizer_cls_and_kwargs(args, model) returns them."
        )
    if name in KINDS and args.optim_args and _callback_of(trainer) is None:  # once
        config = GaLoreConfig.from_optim_args(args.optim_args)
        if not any(found is not None and found.group_options() == config.group_options() for found in options):
            logger.warning(
                "optim_args is %r, but no parameter group of the %s that this Trainer was given has these options: it "
                "trains as it was made.",
                args.optim_args,
                kind,
            )


def _load_optimizer_and_scheduler(self: Trainer, checkpoint: str | None) -> None:
    """Replaces `Trainer._load_optimizer_and_scheduler`, which advises to load what cannot be used unsafely."""
    try:
        _originals["_load_optimizer_and_scheduler"](self, checkpoint)
    except pickle.UnpicklingError:
        reason = None
        if checkpoint is not None and galore_optimizer(self.optimizer) is not None:
            reason = _why_not_loadable(os.path.join(checkpoint, "optimizer.pt"))
        if reason is None:
            raise
        raise ValueError(f"{checkpoint} cannot be resumed. {reason}") from None


def _why_not_loadable(file: str) -> str | None:
    """What is wrong with a file of optimizer state that holds Python objects; `None` where it is something else."""
    try:
        kinds = torch.serialization.get_unsafe_globals_in_checkpoint(file)
    except Exception:  # no zip file, none at all, ...: what the load said stands
        return None
    if any(kind.startswith("galore_torch.") for kind in kinds):
        return written_by_galore_torch()
    if not kinds:
        return None
    return (
        f"Its optimizer state is another optimizer's: it holds Python objects ({', '.join(sorted(kinds))}), where "
        f"GaLore has tensors only. Resume with the optim of the run that wrote it. {FROM_WEIGHTS}"
    )


def _hold_for_others(trainer: Trainer, optimizer: GaLoreOptimizer) -> None:
    """Keep gradients until the step where somebody may drop them before: a callback, or a batch that is too large."""
    hooks = optimizer.hooks
    if hooks is None or not hooks.layerwise or hooks.hold_gradients:
        return
    reasons = [
        f"the callback {type(callback).__name__} is called before the optimizer's step"
        for callback in trainer.callback_handler.callbacks
        if type(callback).on_pre_optimizer_step is not TrainerCallback.on_pre_optimizer_step
    ]
    if trainer.args.auto_find_batch_size:
        reasons.append("auto_find_batch_size goes on after running out of memory")
    if reasons:
        hooks.hold_gradients = True
        logger.info(
            "Layerwise holds low-rank gradients until the step, as with max_grad_norm above 0, because %s. Else "
            "weights are updated during the backward pass.",
            reasons[0],
        )


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
    callback, optimizer = _callback_of(self), galore_optimizer(self.optimizer)
    if callback is not None and optimizer is not None and "loss" in logs:  # not the logs of evaluation and of the end
        logs.update(callback.figures(optimizer))
    _originals["log"](self, logs, start_time)


def _callback_of(trainer: Trainer) -> GaLoreCallback | None:
    callbacks = trainer.callback_handler.callbacks
    return next((callback for callback in callbacks if isinstance(callback, GaLoreCallback)), None)


def _check_no_engine(asked: str, args: TrainingArguments, trainer: Trainer | None = None) -> None:
    """Refuse engines that shard, also where they are asked for and not had: on CPUs accelerate leaves FSDP out."""
    for engine in ("fsdp", "deepspeed"):
        variable = f"ACCELERATE_USE_{engine.upper()}"
        given = [key for key in (engine, f"{engine}_config") if getattr(args, key, None)]
        # accelerate leaves the variable behind where a trainer has failed: one process has nothing to shard.
        several = args.parallel_mode == ParallelMode.DISTRIBUTED
        in_environment = several and os.environ.get(variable, "").lower() == "true"
        if given or in_environment or getattr(trainer, f"is_{engine}_enabled", False):
            where = f"in the training arguments: {' and '.join(given)}" if given else f"by accelerate ({variable})"
            raise ValueError(
                f"{asked} does not work under {engine.upper()}, which shards or flattens the matrices that GaLore "
                f"projects. It is asked for {where}. Leave that out, and run on one GPU, or under DDP without a "
                "layerwise optimizer."
            )


def _check_can_hook(asked: str, instead: str, args: TrainingArguments) -> None:
    """Refuse what the hooks into the backward pass cannot do."""
    problem = None
    if args.fp16:
        problem = "fp16: its loss scaling unscales and checks gradients that are not there. Set bf16=True"
    elif args.parallel_mode == ParallelMode.DISTRIBUTED:
        problem = "more than one process: low-rank gradients are not reduced over them. Launch one"
    elif args.n_gpu > 1:
        problem = "several GPUs in one process. Set CUDA_VISIBLE_DEVICES=0"
    if problem is not None:
        raise ValueError(f"{asked} does not work with {problem}, or use {instead}.")


def _check_no_adam_arguments(name: str, args: TrainingArguments) -> None:
    defaults = {field.name: field.default for field in dataclasses.fields(TrainingArguments)}
    for key in ("adam_beta1", "adam_beta2", "adam_epsilon"):
        if getattr(args, key) != defaults[key]:
            raise ValueError(f"optim={name!r} has no use for {key}={getattr(args, key)}. Leave it out.")


def _uses_galore(trainer: Trainer) -> bool:
    made_elsewhere = trainer.optimizer is not None or trainer.optimizer_cls_and_kwargs is not None
    return not made_elsewhere and optim_name(trainer.args) in KINDS


def optim_name(args: TrainingArguments) -> str:
    """The name of the optimizer that training arguments ask for."""
    # TrainingArguments turns names into enum members; arguments changed afterwards may hold either.
    return str(getattr(args.optim, "value", args.optim))


def galore_optimizer(optimizer: Any) -> GaLoreOptimizer | None:
    """The GaLore optimizer that this is, or that accelerate's wrapper holds."""
    inner = getattr(optimizer, "optimizer", optimizer)
    return inner if isinstance(inner, GaLoreOptimizer) else None
