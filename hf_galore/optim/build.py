"""From a model, `optim_target_modules` and `optim_args` to an optimizer with its hooks: with a Trainer and without one.

`make_optimizer` is for training loops of one's own. A Trainer comes by `optimizer_cls_and_kwargs`, since it makes the
parameter groups itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..config import OPTIONS, GaLoreConfig, nearest
from ..integrations.target_modules import find_targets
from ..integrations.target_summary import summarize, warning_of_unreached
from ..integrations.weights import embedding_weights
from ..log import and_others, logger
from ..rules import RULES
from .admission import check_parameters
from .classes import GaLoreAdafactor, GaLoreAdamW, GaLoreAdamW8bit
from .optimizer import GaLoreOptimizer


@dataclasses.dataclass(frozen=True)
class Kind:
    """What a name of `TrainingArguments.optim` stands for."""

    cls: type[GaLoreOptimizer]
    layerwise: bool


KINDS: dict[str, Kind] = {
    "galore_adamw": Kind(GaLoreAdamW, layerwise=False),
    "galore_adamw_8bit": Kind(GaLoreAdamW8bit, layerwise=False),
    "galore_adafactor": Kind(GaLoreAdafactor, layerwise=False),
    "galore_adamw_layerwise": Kind(GaLoreAdamW, layerwise=True),
    "galore_adamw_8bit_layerwise": Kind(GaLoreAdamW8bit, layerwise=True),
    "galore_adafactor_layerwise": Kind(GaLoreAdafactor, layerwise=True),
}
"""The names of the optimizers, as in `TrainingArguments.optim`."""


def make_optimizer(
    model: nn.Module,
    target_modules: Any = "all-linear",
    *,
    optim: str = "galore_adamw",
    optim_args: GaLoreConfig | Mapping[str, Any] | str | None = None,
    lr: float = 1e-3,
    weight_decay: float = 0.0,
    hold_gradients: bool = False,
    params: Iterable[Any] | None = None,
    **hyperparameters: Any,
) -> GaLoreOptimizer:
    """Make an optimizer for a training loop of one's own, as a Trainer would make it from the same arguments.

    With the same data, learning rates and `hold_gradients` (a Trainer's `max_grad_norm` above 0) the weights end bit
    for bit where the Trainer's end. Biases and norms are not decayed, as far as a Trainer knows them: it decays the
    weights of GroupNorm, of BatchNorm, and of an RMSNorm by an unusual name. For a layerwise optimizer, and for one
    with a projected backward, hooks are put on the model: `optimizer.close()` takes them off.

        optimizer = make_optimizer(model, optim="galore_adamw_8bit_layerwise", optim_args={"rank": 256}, lr=1e-4)

    Args:
        model: the model; several as one, `nn.ModuleList([unet, text_encoder])`. What is frozen stays out of the
            optimizer.
        target_modules: which weights to project, as `TrainingArguments.optim_target_modules`: a list of parts of names,
            a regular expression for whole names, or "all-linear", which may be in a list with others.
        optim: one of `KINDS`.
        optim_args: the options of GaLore, as a string of `key=value` items, a mapping, or a `GaLoreConfig`.
        lr: learning rate η.
        weight_decay: λ, of the weights that are decayed.
        hold_gradients: whether a layerwise optimizer waits for `step()` with its updates, as clipping needs it.
        params: the trainable parameters of the model in groups of your own, or in one, in place of a Trainer's two:
            `[{"params": unet.parameters(), "lr": 1e-5}, {"params": text_encoder.parameters(), "lr": 1e-6}]`. A group
            without `lr` or `weight_decay` has those above.
        hyperparameters: what else the optimizer's class takes: `betas` and `eps` of `GaLoreAdamW` and
            `GaLoreAdamW8bit`; `eps`, `clip_threshold`, `decay_rate` and `beta1` of `GaLoreAdafactor`.

    Raises:
        ValueError: an unknown `optim`; an unknown key of `optim_args` or a value out of range; targets that select
            nothing; parameters that GaLore cannot train; `params` that are not the model's, or not all of them.
        TypeError: a keyword that the optimizer's class does not have, or arguments of other types.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"make_optimizer takes the model itself, but was given a {type(model).__name__}.")
    _check_keywords(_kind(optim).cls, hyperparameters)
    groups = _groups(model, weight_decay) if params is None else _given_groups(model, params, weight_decay)
    cls, kwargs = optimizer_cls_and_kwargs(
        model,
        target_modules,
        optim=optim,
        config=_config(optim_args),
        hold_gradients=hold_gradients,
        say=_is_first_process(),
    )
    make: Callable[..., GaLoreOptimizer] = cls
    return make(groups, lr=lr, **kwargs, **hyperparameters)


def needs_hooks(optim: str, config: GaLoreConfig) -> bool:
    """Whether an optimizer by this name and with these options hooks into the backward pass."""
    return KINDS[optim].layerwise or bool(config.projected_backward) or config.exchange == "low_rank"


def optimizer_cls_and_kwargs(
    model: nn.Module, target_modules: Any, *, optim: str, config: GaLoreConfig, hold_gradients: bool, say: bool = True
) -> tuple[type[GaLoreOptimizer], dict[str, Any]]:
    """The class of an optimizer, and the keywords that make it project the targets of a model.

    Args:
        model: the model.
        target_modules: as in `make_optimizer`.
        optim: one of `KINDS`.
        config: the options.
        hold_gradients: as in `make_optimizer`.
        say: whether to log the summary, and warn of targets that gain nothing.

    Returns:
        The class, to be called with parameters or groups, and its keywords but for hyperparameters (`lr`, ...).

    Raises:
        ValueError: as `make_optimizer`.
        TypeError: `target_modules` is neither a string nor a list of strings.
    """
    kind = _kind(optim)
    check_parameters(model.named_parameters(), model)  # before the optimizer makes state for them
    targets = find_targets(model, target_modules, config)
    options: dict[Tensor, dict[str, Any]] = {}
    if kind.cls is not GaLoreAdamW8bit:
        if config.embedding_bits != 32:
            raise ValueError(
                f"embedding_bits={config.embedding_bits} is for the 8-bit optimizers, and {optim!r} is none of them. "
                "Leave it out."
            )
    elif config.embedding_bits == 32:  # bitsandbytes' rule, which the Trainer applies to its 8-bit optimizers
        options.update((weight, {"optim_bits": 32}) for weight in embedding_weights(model))
    for name, weight in targets.projected.items():
        view = {"view_as": targets.views[name]} if name in targets.views else {}
        options[weight] = {**config.group_options(), **view}
    if say:
        logger.info(summarize(model, targets, config))
        unreached = warning_of_unreached(model, target_modules, targets, config)
        if unreached:
            logger.warning(unreached)
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
    return kind.cls, {
        "param_options": options,
        "module": model,
        "layerwise": kind.layerwise,
        "projected_backward": config.projected_backward,
        "hold_gradients": hold_gradients,
        "exchange": config.exchange,
        "stochastic_rounding": config.stochastic_rounding,
    }


def _check_keywords(cls: type[GaLoreOptimizer], given: Iterable[str]) -> None:
    """Check the keywords for a class besides those that `make_optimizer` has itself.

    Raises:
        TypeError: one is unknown; the message says where it belongs, or what is nearest.
    """
    own = RULES[cls.rule_name].defaults.keys() - {"lr", "weight_decay"}
    known = ["target_modules", "optim", "optim_args", "lr", "weight_decay", "hold_gradients", "params", *sorted(own)]
    for name in given:
        if name in own:
            continue
        if name in OPTIONS:
            advice = f"It is an option of GaLore: optim_args={{{name!r}: ...}}."
        elif name == "layerwise":
            advice = "Take an optim that ends in _layerwise."
        else:
            advice = f"It has {', '.join(known)}.{nearest(name, [*known, *OPTIONS])}"
        raise TypeError(f"make_optimizer has no keyword {name!r}. {advice}")


def _kind(optim: Any) -> Kind:
    name = str(getattr(optim, "value", optim))  # a member of transformers' OptimizerNames too
    if name not in KINDS:
        known = list(KINDS)
        raise ValueError(f"optim has to be one of {', '.join(known)}, but is {name!r}.{nearest(name, known)}")
    return KINDS[name]


def _config(optim_args: GaLoreConfig | Mapping[str, Any] | str | None) -> GaLoreConfig:
    if isinstance(optim_args, GaLoreConfig):
        return optim_args
    return GaLoreConfig.from_optim_args(optim_args)


def _groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The trainable parameters, decayed and undecayed, as the Trainer divides and orders them."""
    from ..integrations.decay import decayed_names  # imports transformers' Trainer, which takes seconds

    decayed = decayed_names(model)
    trained = {name: param for name, param in model.named_parameters() if param.requires_grad}
    return [
        {"params": [param for name, param in trained.items() if name in decayed], "weight_decay": weight_decay},
        {"params": [param for name, param in trained.items() if name not in decayed], "weight_decay": 0.0},
    ]


def _given_groups(model: nn.Module, params: Iterable[Any], weight_decay: float) -> list[dict[str, Any]]:
    """Somebody's own groups, without what is frozen.

    Raises:
        TypeError: `params` are neither parameters nor groups of them.
        ValueError: a parameter is not the model's; a trainable one of the model is in no group.
    """
    given = list(params)
    if not all(isinstance(entry, Mapping) and "params" in entry for entry in given):
        given = [{"params": given}]
    names = {id(param): name for name, param in model.named_parameters() if param.requires_grad}
    groups: list[dict[str, Any]] = []
    missing = dict(names)
    for group in given:
        entries = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
        entries = [entry[1] if isinstance(entry, tuple) else entry for entry in entries]  # of named_parameters()
        others = sorted({type(entry).__name__ for entry in entries if not isinstance(entry, Tensor)})
        if others:
            raise TypeError(
                "params has to be parameters, or groups such as {'params': unet.parameters(), 'lr': 1e-5}, but has "
                f"{', '.join(others)}."
            )
        trainable = [param for param in entries if param.requires_grad]
        for param in trainable:
            if id(param) not in names:
                raise ValueError(
                    f"params has a parameter of shape {tuple(param.shape)} that is none of {type(model).__name__}. To "
                    "train several models give them as one: make_optimizer(nn.ModuleList([unet, text_encoder]), ...)."
                )
            missing.pop(id(param), None)
        groups.append({"weight_decay": weight_decay, **group, "params": trainable})
    if missing:
        name, *more = missing.values()
        raise ValueError(
            f"{name}{and_others(len(more))} can be trained, but is in no group of params. Add what is missing to a "
            "group, or freeze it by requires_grad_(False)."
        )
    return groups


def _is_first_process() -> bool:
    distributed = torch.distributed
    return not (distributed.is_available() and distributed.is_initialized()) or distributed.get_rank() == 0
