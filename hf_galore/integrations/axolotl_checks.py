"""What axolotl's plugin refuses of a configuration, before a model or data are loaded: plain functions on its keys.

axolotl ignores keys that it does not know, and trains with `adamw_torch_fused` where none says otherwise. So what
would train other than as asked is looked for among the keys themselves.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from ..config import OPTIONS, GaLoreConfig, nearest
from ..optim.build import KINDS, needs_hooks

PLUGIN = "hf_galore.axolotl.GaLorePlugin"

OPTIMIZER, TARGETS, ARGUMENTS = "optimizer", "optim_target_modules", "optim_args"
_ANOTHER = "Leave the plugin out to train with another optimizer."

# Keys that shard or split a model, and from which value on.
_SHARDING: dict[str, int] = {
    "deepspeed": 0,
    "fsdp": 0,
    "fsdp_config": 0,
    "dp_shard_size": 1,
    "tensor_parallel_size": 1,
    "context_parallel_size": 1,
    "sequence_parallel_degree": 1,
    "expert_parallel_size": 1,
}
_QUANTIZED = ("load_in_8bit", "load_in_4bit", "gptq")
_Q_GALORE = "qgalore_"


def check_config(config: Mapping[str, Any], known: Mapping[str, Any], processes: int = 1) -> None:
    """Refuse a configuration of axolotl that names the plugin and does not train with GaLore as asked.

    Args:
        config: the keys that were given, and their values.
        known: the keys that axolotl knows, with their defaults.
        processes: how many processes train.

    Raises:
        ValueError: something is wrong; the message says what was given, what is allowed and what to do.
    """
    _check_names(config, known)
    name = _check_optimizer(config)
    options = _check_options(config)
    _check_other_keys(config, known, name)
    if needs_hooks(name, options):
        _check_hooks(config, name, options, processes)


def joined(optim_args: Any) -> str | None:
    """The text that axolotl makes of `optim_args`, which may be a mapping there, for the Trainer.

    Raises:
        ValueError: it is neither.
    """
    if isinstance(optim_args, Mapping):
        return ",".join(f"{key}={value}" for key, value in optim_args.items())
    if optim_args is None or isinstance(optim_args, str):
        return optim_args
    raise ValueError(
        f"{ARGUMENTS} has to be a mapping (rank: 128) or a text ('rank=128, scale=2'), but is {optim_args!r}."
    )


def _check_names(config: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    """Refuse keys that axolotl would ignore, and that look like those that the plugin is about."""
    for key in config:
        if key in known:
            continue
        if key in OPTIONS:
            raise ValueError(f"{key} is an option of GaLore, and axolotl ignores it here. Put it below {ARGUMENTS}.")
        close = difflib.get_close_matches(key, [OPTIMIZER, TARGETS, ARGUMENTS], n=1, cutoff=0.8)
        meant = OPTIMIZER if key == "optim" else next(iter(close), None)
        if meant is not None:
            raise ValueError(f"axolotl has no key {key!r}, and would ignore it. Its key is {meant}.")
        if key.startswith("galore_"):
            raise ValueError(
                f"axolotl has no key {key!r}, and would ignore it. GaLore's options go below {ARGUMENTS}: "
                f"{', '.join(OPTIONS)}."
            )
    for key, value in config.items():
        if key.startswith(_Q_GALORE) and value != known.get(key):
            raise ValueError(
                f"{key} is for {OPTIMIZER}: q_galore_adamw8bit, and would be ignored. GaLore's options go below "
                f"{ARGUMENTS}: {', '.join(OPTIONS)}."
            )


def _check_optimizer(config: Mapping[str, Any]) -> str:
    given, allowed = config.get(OPTIMIZER), list(KINDS)
    if given is None:
        raise ValueError(
            f"The configuration names the plugin of hf_galore and no {OPTIMIZER}, for which axolotl takes "
            f"adamw_torch_fused. Set {OPTIMIZER} to one of {', '.join(allowed)}. {_ANOTHER}"
        )
    name = str(getattr(given, "value", given))
    if name not in KINDS:
        raise ValueError(
            f"The configuration names the plugin of hf_galore, and {OPTIMIZER} is {name!r}, which is none of its own: "
            f"{', '.join(allowed)}.{nearest(name, allowed)} {_ANOTHER}"
        )
    return name


def _check_options(config: Mapping[str, Any]) -> GaLoreConfig:
    if not config.get(TARGETS):
        raise ValueError(
            f"{OPTIMIZER}: {config[OPTIMIZER]} needs {TARGETS}: which weights to project, such as [attn, mlp] or "
            "all_linear."
        )
    return GaLoreConfig.from_optim_args(joined(config.get(ARGUMENTS)))


def _check_other_keys(config: Mapping[str, Any], known: Mapping[str, Any], name: str) -> None:
    for key, most in _SHARDING.items():
        value = config.get(key)
        if value and not (most and isinstance(value, int) and value <= most):
            raise ValueError(
                f"{OPTIMIZER}: {name} does not work with {key}, which shards or splits the matrices that GaLore "
                "projects, or their gradients. Leave it out, and train on one GPU, or in several processes (DDP)."
            )
    if config.get("adapter"):
        raise ValueError(
            f"{OPTIMIZER}: {name} trains the weights themselves, but adapter is {config['adapter']!r}, whose own "
            "optimizer state is small as it is. Leave out adapter, or train it with optimizer: adamw_torch_fused and "
            "without the plugin."
        )
    for key in _QUANTIZED:
        if config.get(key):
            raise ValueError(
                f"{OPTIMIZER}: {name} trains the weights themselves, and quantized ones ({key}) cannot be trained. "
                "Leave it out; bf16: true loads them in 16 bits."
            )
    if config.get("loraplus_lr_ratio"):
        raise ValueError(
            f"loraplus_lr_ratio is for adapters, which {OPTIMIZER}: {name} is not for. Leave it out; embedding_lr and "
            "lr_groups give parts of the model rates of their own."
        )
    if KINDS[name].cls.rule_name == "adafactor":
        for key in ("adam_beta1", "adam_beta2", "adam_epsilon"):
            if config.get(key) is not None:
                raise ValueError(f"{OPTIMIZER}: {name} has no use for {key}={config[key]}. Leave it out.")


def _check_hooks(config: Mapping[str, Any], name: str, options: GaLoreConfig, processes: int) -> None:
    """What the hooks into the backward pass cannot do; `checks.check_can_hook` refuses it too, but later."""
    asked = f"{OPTIMIZER}: {name}" + (" with projected_backward: true" if options.projected_backward else "")
    instead = f"{OPTIMIZER}: {name.removesuffix('_layerwise')} without projected_backward"
    if config.get("fp16") and config.get("bf16") in (None, False, "auto"):
        problem = "fp16: its loss scaling unscales and checks gradients that are not there. Set bf16: true"
    elif processes > 1:
        problem = f"{processes} processes: low-rank gradients are not reduced over them. Start one"
    else:
        return
    raise ValueError(f"{asked} does not work with {problem}, or use {instead}.")
