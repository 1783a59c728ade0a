"""What is refused of training arguments and of optimizers that a Trainer is to train with, before the first step."""

from __future__ import annotations

import dataclasses
import os

import torch
from transformers import TrainingArguments
from transformers.trainer import Trainer
from transformers.training_args import ParallelMode

from ..config import GaLoreConfig
from ..int8 import is_int8
from ..log import logger
from ..optim.admission import check_parameters
from ..optim.build import KINDS
from ..optim.groups import FROM_WEIGHTS, written_by_galore_torch
from ..optim.optimizer import GaLoreOptimizer
from ..rules import RULES, without_own_name
from .accelerate import compiles, unwrapped
from .callback import galore_callback, galore_optimizer
from .engines import instead, refusal_of_int8, supports_fsdp2
from .fsdp import say_if_whole_gradients_accumulate
from .holding import check_held
from .llamafactory import own_optimizer_of


def optim_name(args: TrainingArguments) -> str:
    """The name of the optimizer that training arguments ask for."""
    # TrainingArguments turns names into enum members; arguments changed afterwards may hold either.
    return str(getattr(args.optim, "value", args.optim))


def check_optimizer(trainer: Trainer, optimizer: GaLoreOptimizer) -> None:
    """Refuse what an optimizer cannot do, whoever made it."""
    kind = type(optimizer).__name__
    check_no_engine(kind, trainer.args, trainer)
    if optimizer.hooks is not None:
        asked = f"{kind} with layerwise=True or projected_backward=True"
        check_can_hook(asked, f"{kind} without them", trainer.args)
        if compiles(trainer.accelerator):
            optimizer.hooks.notices.compiled()
        check_held(trainer.args, optimizer)
    _check_targets(trainer, optimizer)
    say_if_whole_gradients_accumulate(trainer, optimizer)
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
    if name in KINDS and args.optim_args and galore_callback(trainer) is None:  # once
        config = GaLoreConfig.from_optim_args(args.optim_args)
        asked = without_own_name(RULES[optimizer.rule], config.group_options())
        if not any(found is not None and found.group_options() == asked for found in options):
            logger.warning(
                "optim_args is %r, but no parameter group of the %s that this Trainer was given has these options: it "
                "trains as it was made.",
                args.optim_args,
                kind,
            )


def check_asked_for(trainer: Trainer, given: bool) -> None:
    """Refuse another optimizer than `optim` asks for, where a subclass of the Trainer has made one.

    Args:
        trainer: one that is ready to train.
        given: whether it was given the optimizer, or its class, and made none. transformers lets that come before
            `optim`; a warning says so.
    """
    name = optim_name(trainer.args)
    if name not in KINDS or trainer.optimizer is None or galore_optimizer(trainer.optimizer) is not None:
        return
    kind = type(unwrapped(trainer.optimizer)).__name__
    if given:
        logger.warning(
            "optim=%r is not used: this Trainer was given an optimizer, and trains with that %s.", name, kind
        )
        return
    # Who calls train() again is to hear it again, and not that it was given.
    trainer.optimizer = trainer.lr_scheduler = None
    setting = own_optimizer_of(trainer)
    if setting is None:
        leave_out = "Make none there for this optim, and let super().create_optimizer() do it; or leave out optim, "
    else:
        leave_out = f"LLaMA-Factory does so for {setting}. Leave that out; or, to train with it, leave out optim, "
    raise ValueError(
        f"optim={name!r} was asked for, but {type(trainer).__name__}.create_optimizer has made an optimizer of its "
        f"own, {kind}. {leave_out}optim_target_modules and optim_args."
    )


def check_no_engine(asked: str, args: TrainingArguments, trainer: Trainer | None = None) -> None:
    """Refuse engines that shard or flatten, also where they are asked for and not had.

    Args:
        asked: what was asked for, to begin a sentence.
        args: the training arguments.
        trainer: the Trainer, where there is one: `accelerate launch` may have given it an engine.

    Raises:
        ValueError: DeepSpeed, FSDP, or tensor, context or pipeline parallelism is asked for; the message says where.
    """
    where = _engine_asked_for("deepspeed", args, trainer)
    if where is not None:
        raise ValueError(
            f"{asked} does not work under DEEPSPEED: ZeRO-1 and 2 hand an optimizer flat pieces of many weights, and "
            f"ZeRO-3 shards each weight, so no matrix is there to project. It is asked for {where}. Leave that out, "
            f"and {instead()}."
        )
    _check_fsdp(asked, args, trainer)
    found = _parts_of_matrices(args, trainer)
    if found is not None:
        raise ValueError(
            f"{asked} does not work under tensor, context, expert or pipeline parallelism, where processes have parts "
            f"of a matrix, of a sequence or of the model. It is asked for by {found}. Leave that out, and {instead()}."
        )


def check_int8_engine(trainer: Trainer) -> None:
    """Refuse engines that shard or copy, where the model has weights in 8 bits: before they ask for views of these.

    Raises:
        ValueError: FSDP or DeepSpeed is asked for; the message says where. Or the Trainer is to use DataParallel.
    """
    if trainer.model is None or not any(map(is_int8, trainer.model.parameters())):
        return
    for engine in ("fsdp", "deepspeed"):
        where = _engine_asked_for(engine, trainer.args, trainer)
        if where is not None:
            raise refusal_of_int8("The model", f"{engine.upper()}, which is asked for {where}")
    copies = trainer.args.parallel_mode == ParallelMode.NOT_DISTRIBUTED  # of several GPUs
    if copies and not getattr(trainer.model, "is_loaded_in_8bit", False):
        raise refusal_of_int8("The model", "DataParallel, by which a Trainer of one process uses several GPUs")


def _check_fsdp(asked: str, args: TrainingArguments, trainer: Trainer | None) -> None:
    where = _engine_asked_for("fsdp", args, trainer)
    if where is None:
        return
    version = _fsdp_version(args, trainer)
    if supports_fsdp2() and args.device.type == "cpu":
        raise ValueError(
            f"{asked} does not work under FSDP on a CPU: accelerate has none there, and trains under DDP without a "
            f"word. It is asked for {where}. Leave that out, or shard the model by torch's fully_shard in a loop of "
            "your own."
        )
    if supports_fsdp2() and version != 2:
        raise ValueError(
            f"{asked} does not work under FSDP1, which flattens the matrices that GaLore projects. It is asked for "
            f"{where}. Set version 2: fsdp_version: 2 in accelerate's file, fsdp_config={{'version': 2}} in "
            f"TrainingArguments; or {instead()}."
        )
    if not supports_fsdp2():
        raise ValueError(
            f"{asked} does not work under FSDP, which shards or flattens the matrices that GaLore projects. It is "
            f"asked for {where}. Leave that out, and {instead()}."
        )


def _engine_asked_for(engine: str, args: TrainingArguments, trainer: Trainer | None) -> str | None:
    """Where `fsdp` or `deepspeed` is asked for, in words; `None` where it is not."""
    given = [key for key in (engine, f"{engine}_config") if _asks(getattr(args, key, None))]
    if given:
        return f"in the training arguments: {' and '.join(given)}"
    variable = f"ACCELERATE_USE_{engine.upper()}"
    # accelerate leaves the variable behind where a trainer has failed: one process has nothing to shard.
    several = args.parallel_mode == ParallelMode.DISTRIBUTED
    in_environment = several and os.environ.get(variable, "").lower() == "true"
    if in_environment or getattr(trainer, f"is_{engine}_enabled", False):
        return f"by accelerate ({variable})"
    return None


def _fsdp_version(args: TrainingArguments, trainer: Trainer | None) -> int:
    """Which FSDP is asked for: by accelerate's plugin, the training arguments, or `accelerate launch`."""
    accelerator = getattr(trainer, "accelerator", None)
    plugin = getattr(getattr(accelerator, "state", None), "fsdp_plugin", None)
    if plugin is not None:
        return int(plugin.fsdp_version)
    from_args = [getattr(args, "fsdp_plugin_args", None), args.fsdp_config]  # older transformers have the second only
    for config in from_args:
        for key in ("fsdp_version", "version"):
            if isinstance(config, dict) and config.get(key) is not None:
                return int(config[key])
    return int(os.environ.get("FSDP_VERSION", "1"))  # accelerate's default


_PARTS = ("tp_size", "cp_size", "sp_size", "ep_size", "pp_size")


def _parts_of_matrices(args: TrainingArguments, trainer: Trainer | None) -> str | None:
    """What splits matrices, sequences or layers among processes, in words; `None` where nothing does."""
    model = getattr(trainer, "model", None)
    for name, config in (
        ("parallelism_config", getattr(args, "parallelism_config", None)),
        ("accelerate's parallelism_config", getattr(getattr(trainer, "accelerator", None), "parallelism_config", None)),
        ("the model's DistributedConfig", getattr(getattr(model, "config", None), "distributed_config", None)),
    ):
        for key in _PARTS:
            size = config.get(key) if isinstance(config, dict) else getattr(config, key, None)
            if isinstance(size, int) and size > 1:
                return f"{name}: {key} {size}"
    size = getattr(model, "_tp_size", None)
    return f"the model's tp_plan, over {size} processes" if isinstance(size, int) and size > 1 else None


def _asks(value: object) -> bool:
    """Whether a setting of an engine asks for it. Where none does, older transformers give a mapping of 0 and False."""
    return any(value.values()) if isinstance(value, dict) else bool(value)


def check_can_hook(asked: str, instead: str, args: TrainingArguments) -> None:
    """Refuse what the hooks into the backward pass cannot do."""
    problem = None
    if args.fp16:
        problem = "fp16: its loss scaling unscales and checks gradients that are not there. Set bf16=True"
    elif args.n_gpu > 1:
        problem = "several GPUs in one process. Set CUDA_VISIBLE_DEVICES=0"
    if problem is not None:
        raise ValueError(f"{asked} does not work with {problem}, or use {instead}.")


def check_no_adam_arguments(name: str, args: TrainingArguments) -> None:
    defaults = {field.name: field.default for field in dataclasses.fields(TrainingArguments)}
    for key in ("adam_beta1", "adam_beta2", "adam_epsilon"):
        if getattr(args, key) != defaults[key]:
            raise ValueError(f"optim={name!r} has no use for {key}={getattr(args, key)}. Leave it out.")


def why_not_loadable(file: str) -> str | None:
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
