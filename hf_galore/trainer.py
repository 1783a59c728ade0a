"""All contact with the internals of transformers: the optimizer names, and what a Trainer has to do differently.

`register()` replaces three methods of `transformers.Trainer`; `unregister()` puts them back. Each replacement
concerns itself with the `galore_*` optimizers only and hands everything else on.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, cast

import transformers
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import Trainer
from transformers.training_args import ParallelMode

from .config import GaLoreConfig
from .layerwise import LayerwiseHooks, detach_all
from .log import logger
from .optimizers import GaLoreAdafactor, GaLoreAdamW, GaLoreAdamW8bit, GaLoreOptimizer
from .targets import embedding_weights, find_targets, summarize


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
    "_get_grad_norm": "(self, model, grad_norm=None)",
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
        "_get_grad_norm": _get_grad_norm,
    }
    for name, replacement in replacements.items():
        _originals[name] = inspect.getattr_static(Trainer, name)
        setattr(Trainer, name, replacement)


def unregister() -> None:
    """Give transformers its own methods back. Does nothing where they are."""
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


class LayerwiseCallback(TrainerCallback):
    """Takes the layerwise hooks off the model when training ends: a later backward pass trains nothing."""

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        optimizer = _unwrapped(kwargs.get("optimizer"))
        if isinstance(optimizer, GaLoreOptimizer):
            optimizer.close()


def _get_optimizer_cls_and_kwargs(args: TrainingArguments, model: nn.Module | None = None) -> tuple[Any, Any]:
    """Replaces `Trainer.get_optimizer_cls_and_kwargs`.

    The Trainer calls the class with its own parameter groups, so its split into decayed and undecayed parameters, or
    a subclass's, stands; `param_options` divides those groups further.
    """
    name = _optim_name(args)
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
    if kind.layerwise:
        _check_layerwise(name, args)

    targets = find_targets(model, args.optim_target_modules, config)
    options: dict[Tensor, dict[str, Any]] = {}
    if kind.cls is GaLoreAdamW8bit:  # bitsandbytes' rule, which the Trainer applies to its 8-bit optimizers
        options.update((weight, {"optim_bits": 32}) for weight in embedding_weights(model))
    options.update((weight, config.group_options()) for weight in targets.projected.values())
    logger.info(summarize(model, targets, config))

    kwargs: dict[str, Any] = {"lr": args.learning_rate, "param_options": options}
    if issubclass(kind.cls, GaLoreAdamW):
        kwargs.update(betas=(args.adam_beta1, args.adam_beta2), eps=args.adam_epsilon)
    else:
        _check_no_adam_arguments(name, args)
    if kind.layerwise:
        kwargs["layerwise"] = model
    return kind.cls, kwargs


def _create_optimizer(self: Trainer, model: nn.Module | None = None) -> Any:
    """Replaces `Trainer.create_optimizer`."""
    opt_model = self.model if model is None else model
    if opt_model is not None:
        # Hooks that an interrupted run left, of whatever optimizer: this trainer's own are put back below.
        detach_all(opt_model)
    if _uses_galore(self):
        for engine in ("fsdp", "deepspeed"):
            if getattr(self, f"is_{engine}_enabled", False):
                raise ValueError(
                    f"optim={_optim_name(self.args)!r} does not work under {engine.upper()}, which shards or flattens "
                    "the matrices that GaLore projects. Run it on one GPU, or under DDP without a layerwise optimizer."
                )
    optimizer = _originals["create_optimizer"](self, model)
    hooks = _hooks_of(optimizer)
    if hooks is not None:
        hooks.attach()
        if not any(isinstance(callback, LayerwiseCallback) for callback in self.callback_handler.callbacks):
            self.add_callback(LayerwiseCallback)
    return optimizer


def _get_grad_norm(self: Trainer, model: nn.Module, grad_norm: Any = None) -> Any:
    """Replaces `Trainer._get_grad_norm`: layerwise gradients are gone when the Trainer looks for them."""
    hooks = _hooks_of(self.optimizer)
    if hooks is not None and hooks.attached:
        return hooks.grad_norm()
    return _originals["_get_grad_norm"](self, model, grad_norm)


def _check_layerwise(name: str, args: TrainingArguments) -> None:
    plain = name.removesuffix("_layerwise")
    reasons: dict[str, Callable[[], bool]] = {
        f"gradient_accumulation_steps={args.gradient_accumulation_steps}; set it to 1": (
            lambda: args.gradient_accumulation_steps > 1
        ),
        f"max_grad_norm={args.max_grad_norm}, clipping; set max_grad_norm=0": (lambda: args.max_grad_norm > 0),
        "fp16 loss scaling; set bf16=True": (lambda: bool(args.fp16)),
        "more than one process; launch one": (lambda: args.parallel_mode == ParallelMode.DISTRIBUTED),
        "more than one GPU in a process; set CUDA_VISIBLE_DEVICES=0": (lambda: args.n_gpu > 1),
    }
    for reason, applies in reasons.items():
        if applies():
            raise ValueError(f"optim={name!r} does not work with {reason}, or use optim={plain!r}.")


def _check_no_adam_arguments(name: str, args: TrainingArguments) -> None:
    defaults = {field.name: field.default for field in dataclasses.fields(TrainingArguments)}
    for key in ("adam_beta1", "adam_beta2", "adam_epsilon"):
        if getattr(args, key) != defaults[key]:
            raise ValueError(f"optim={name!r} has no use for {key}={getattr(args, key)}. Leave it out.")


def _uses_galore(trainer: Trainer) -> bool:
    return trainer.optimizer is None and _optim_name(trainer.args) in KINDS


def _optim_name(args: TrainingArguments) -> str:
    # TrainingArguments turns names into enum members; arguments changed afterwards may hold either.
    return str(getattr(args.optim, "value", args.optim))


def _unwrapped(optimizer: Any) -> Any:
    """The optimizer inside accelerate's wrapper, if there is one."""
    return getattr(optimizer, "optimizer", optimizer)


def _hooks_of(optimizer: Any) -> LayerwiseHooks | None:
    inner = _unwrapped(optimizer)
    return inner.layerwise_hooks if isinstance(inner, GaLoreOptimizer) else None
