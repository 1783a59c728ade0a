"""What people call options elsewhere: in other trainers, papers, older releases and scripts of their own.

Spelling alone leads astray: `--rank` is closer to `--local_rank` than to GaLore's rank, which is written in optim_args.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection

GALORE = {
    "r": "rank",
    "apollo_rank": "rank",
    "galore_r": "rank",
    "galore_rank": "rank",
    "gap": "update_proj_gap",
    "t": "update_proj_gap",
    "apollo_update_interval": "update_proj_gap",
    "galore_gap": "update_proj_gap",
    "galore_update_interval": "update_proj_gap",
    "galore_update_proj_gap": "update_proj_gap",
    "proj_gap": "update_proj_gap",
    "proj_update_gap": "update_proj_gap",
    "refresh_gap": "update_proj_gap",
    "subspace_update_interval": "update_proj_gap",
    "update_gap": "update_proj_gap",
    "update_interval": "update_proj_gap",
    "update_proj_interval": "update_proj_gap",
    "alpha": "scale",
    "apollo_scale": "scale",
    "galore_alpha": "scale",
    "galore_scale": "scale",
    "proj_params_lr_scale": "scale",
    "apollo_proj_type": "proj_type",
    "galore_proj_type": "proj_type",
    "proj_side": "proj_type",
    "projection_type": "proj_type",
    "bits": "proj_bits",
    "galore_proj_bits": "proj_bits",
    "proj_bit": "proj_bits",
    "quantize_bits": "proj_bits",
    "apollo_scale_type": "scaling",
    "scale_type": "scaling",
    "inactive_update_rule": "residual",
    "inactive_lr_scale": "residual_scale",
    "reset_statistics": "moments",
}
"""GaLore's arguments by other names: of galore_torch, Q-GaLore, APOLLO, FRUGAL and LLaMA-Factory."""

_LIMITED = "The growth of what residual=fira and scaling add is limited always, before scale: leave it out."
_PROJECTION = "With scaling projections are random always; without it refresh says how a basis is computed."
_OF_MUON = "rule=muon looks ahead as Nesterov does, and takes five steps, always: leave it out."
GALORE_PHRASES = {
    "apollo_proj": _PROJECTION,
    "proj": _PROJECTION,
    "apollo_scale_front": _LIMITED,
    "disable_nl": _LIMITED,
    "scale_front": _LIMITED,
    "density": "It is a share of a matrix's smaller side, where rank is a number: density=0.25 of 1024 is rank=256.",
    "momentum": "It is rule=muon's, and a key of parameter groups: {'rank': 128, 'rule': 'muon', 'momentum': 0.9}.",
    "nesterov": _OF_MUON,
    "ns_steps": _OF_MUON,
}
"""What stands for none of GaLore's arguments."""

TRAINING = {
    "accumulation_steps": "gradient_accumulation_steps",
    "attention": "attn_implementation",
    "base_model": "model_name_or_path",
    "batch_size": "per_device_train_batch_size",
    "block_size": "max_length",
    "bsz": "per_device_train_batch_size",
    "chat_template": "chat_template_path",
    "checkpoint_every": "save_steps",
    "clip": "max_grad_norm",
    "clip_grad": "max_grad_norm",
    "completion_only": "assistant_only_loss",
    "cutoff_len": "max_length",
    "data": "dataset_name",
    "data_path": "dataset_name",
    "dataset": "dataset_name",
    "dataset_path": "dataset_name",
    "epochs": "num_train_epochs",
    "eps": "adam_epsilon",
    "eval_batch_size": "per_device_eval_batch_size",
    "eval_every": "eval_steps",
    "evaluation_strategy": "eval_strategy",
    "flash_attention": "attn_implementation",
    "galore_target": "optim_target_modules",
    "galore_target_modules": "optim_target_modules",
    "grad_accum": "gradient_accumulation_steps",
    "grad_accum_steps": "gradient_accumulation_steps",
    "grad_clip": "max_grad_norm",
    "gradient_clip_val": "max_grad_norm",
    "gradient_clipping": "max_grad_norm",
    "instruction_template": "assistant_only_loss",
    "learn_rate": "learning_rate",
    "log_every": "logging_steps",
    "log_interval": "logging_steps",
    "lr": "learning_rate",
    "lr_scheduler": "lr_scheduler_type",
    "max_norm": "max_grad_norm",
    "max_seq_len": "max_length",
    "max_seq_length": "max_length",
    "max_sequence_length": "max_length",
    "micro_batch_size": "per_device_train_batch_size",
    "model": "model_name_or_path",
    "model_id": "model_name_or_path",
    "model_name": "model_name_or_path",
    "model_path": "model_name_or_path",
    "n_epochs": "num_train_epochs",
    "no_cuda": "use_cpu",
    "num_epochs": "num_train_epochs",
    "num_steps": "max_steps",
    "optim_target": "optim_target_modules",
    "optimizer": "optim",
    "out": "output_dir",
    "out_dir": "output_dir",
    "output": "output_dir",
    "pretrained_model_name_or_path": "model_name_or_path",
    "response_template": "assistant_only_loss",
    "resume": "resume_from_checkpoint",
    "resume_from": "resume_from_checkpoint",
    "save_dir": "output_dir",
    "save_every": "save_steps",
    "scheduler": "lr_scheduler_type",
    "seq_len": "max_length",
    "seq_length": "max_length",
    "sequence_len": "max_length",
    "sequence_length": "max_length",
    "setup_chat_format": "chat_template_path",
    "steps": "max_steps",
    "target_modules": "optim_target_modules",
    "torch_dtype": "dtype",
    "train_batch_size": "per_device_train_batch_size",
    "train_steps": "max_steps",
    "warmup": "warmup_steps",
    "wd": "weight_decay",
}
"""Keys of recipes, and options of commands, by other names."""

_LAYERWISE = "Layerwise is a part of the optimizer's name: optim: galore_adamw_8bit_layerwise."
PHRASES = {
    "device_map": "A model is trained on one GPU, which CUDA_VISIBLE_DEVICES chooses.",
    "galore": _LAYERWISE,
    "galore_layerwise": _LAYERWISE,
    "group_by_length": "It is train_sampling_strategy: group_by_length today.",
    "layerwise": _LAYERWISE,
    "logging_dir": "It is an environment variable today: env: {TENSORBOARD_LOGGING_DIR: folder}.",
    "save_safetensors": "Weights are saved as safetensors always.",
    "use_galore": "The optimizer's name says it: optim: galore_adamw_8bit_layerwise.",
    "vram": "It is one of hf-galore plan.",
}
"""What stands for no single key."""

DTYPES = {
    "bf16": "bfloat16",
    "float": "float32",
    "fp16": "float16",
    "fp32": "float32",
    "full": "float32",
    "half": "float16",
}
"""Types of numbers by other names: spelling finds nothing near `fp32`."""


def synonym(name: str, table: dict[str, str], known: Collection[str]) -> str | None:
    """What a name stands for, in a table, if that is among the known names."""
    meant = table.get(plain(name))
    return meant if meant in known else None


def plain(name: str) -> str:
    """A name as keys of recipes are written: `--Learning-Rate` is `learning_rate`."""
    return name.lstrip("-").replace("-", "_").lower()


def hint(name: str, known: Collection[str], galore: Collection[str]) -> str:
    """What somebody meant who wrote an option that there is not; begins with a space, or is empty.

    Args:
        name: what was written, `lr` in a file or `--lr` on a command line.
        known: the keys that a recipe may have.
        galore: GaLore's arguments, which optim_args holds.
    """
    key, dashes = plain(name), "--" if name.startswith("-") else ""
    phrase = PHRASES.get(key) or GALORE_PHRASES.get(key)
    if phrase:
        return f" {phrase}"
    argument = key if key in galore else synonym(key, GALORE, galore)
    if argument is None:
        meant = synonym(key, TRAINING, known)
        if meant is not None:
            return f" Did you mean '{dashes}{meant}'?"
        (closest,) = difflib.get_close_matches(key, [*known, *galore], n=1) or [""]
        if closest not in galore or closest in known:
            return f" Did you mean '{dashes}{closest}'?" if closest else ""
        argument = closest
    separator = " " if dashes else ": "
    quote = "'" if dashes else ""
    return (
        f" {argument} is one of GaLore's arguments, which stand together in optim_args: "
        f"{dashes}optim_args{separator}{quote}{argument}=..., ...{quote}"
    )
