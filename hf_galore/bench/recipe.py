"""The recipe of a job: what of it a measurement changes, and what each contender makes of it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import transformers
from transformers import LlamaConfig

from ..errors import UserError
from ..integrations.trainer import optim_name
from ..recipes import any_recipe, sft
from ..recipes.checks import galore_config
from .jobs import ADAMW_8BIT, GALORE, SMALL_LAYERS, SMALL_RANK, TRAINERS_OWN, WARM_UP, Job

PROG = "hf-galore bench"
# Neither evaluated, nor saved, nor reported.
_OWN = {
    "eval_strategy": "no",
    "save_strategy": "no",
    "report_to": "none",
    "logging_steps": "1",
    "disable_tqdm": "true",
}
# Matrices that a CPU has room for, and moments that are large enough for 8 bits.
_SMALL_MODEL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 512,
    "max_position_embeddings": 128,
}
_SMALL: dict[str, str] = {
    "dtype": "float32",
    "bf16": "false",
    "use_cpu": "true",
    "per_device_train_batch_size": "2",
    "max_length": "16",
}


def parsed_recipe(job: Job, folder: Path) -> sft.Arguments:
    """The recipe of a job as it is for the job's contender.

    Raises:
        UserError: it is none that can be measured, or something that was given is wrong.
    """
    arguments = list(job.arguments)
    if job.small:
        name = str(folder / "small")
        LlamaConfig(**_SMALL_MODEL, num_hidden_layers=SMALL_LAYERS, architectures=["LlamaForCausalLM"]).save_pretrained(
            name
        )
        small = [f"--{key}={value}" for key, value in {"model_name_or_path": name, **_SMALL}.items()]
        # Behind the file, before what was given: that holds.
        arguments[2:2] = small
    arguments += [f"--{key}={value}" for key, value in {**_OWN, "output_dir": str(folder / "output")}.items()]
    arguments += [f"--max_steps={WARM_UP + job.steps}"]
    parsed = any_recipe.parse(arguments, PROG, "")
    if not isinstance(parsed, sft.Arguments):
        raise UserError(f"a recipe of hf-galore {parsed.command} was given. {PROG} takes those of hf-galore sft.")
    training = parsed.training
    training.chat_template_path = None  # tokens are random
    if job.contender != GALORE:  # their updates are less than a step of 8 bits
        parsed.model.weight_bits = 16
    config = galore_config(training)
    if config is None:
        raise UserError(
            f"the recipe's optim is {optim_name(training)}, but {PROG} measures GaLore beside others. Give a recipe "
            "with a galore_* optim."
        )
    rank = job.rank or (SMALL_RANK if job.small else None)
    if rank is not None:
        config = dataclasses.replace(config, rank=rank)
        training.optim_args = config.optim_args()
    if job.contender == TRAINERS_OWN:  # which has these keys only
        own = {key: getattr(config, key) for key in ("rank", "update_proj_gap", "scale", "proj_type")}
        if isinstance(
            config.scale, str
        ):  # a number of each matrix, where this has one of all; nothing that is measured asks
            del own["scale"]
        training.optim_args = ", ".join(f"{key}={value}" for key, value in own.items())
    elif job.contender == ADAMW_8BIT:
        training.optim = transformers.training_args.OptimizerNames.ADAMW_8BIT
        training.optim_args = training.optim_target_modules = None
    return parsed
