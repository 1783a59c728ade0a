"""The memory of a training that axolotl is asked for: its own trainer, with fake weights and data.

What is planned is what `axolotl train` makes of the same file: its loader, its patches, its data loading and its
trainer. Only weights, data, and a tokenizer and a model's config that are not on this machine are stood in for.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import yaml

from ..errors import UserError
from ..integrations import axolotl_trainer
from ..integrations.axolotl_checks import PLUGIN
from ..integrations.axolotl_logging import quiet_axolotl
from ..integrations.trainer import registered
from ..optim.build import KINDS
from ..plan.fakes import Target
from ..plan.planner import MemoryPlan, plan, quiet
from ..plan.rehearsal import STEPS, Progress
from .stand_in import find_config, find_tokenizer, tokenizer_for

# Keys that change what is in memory in ways that fake tensors cannot show, and why; or a training of another kind.
NOT_PLANNED: dict[str, str] = {
    **dict.fromkeys(("rl", "reward_model", "process_reward_model"), "plans are of language modelling (SFT)"),
    **dict.fromkeys(("pretraining_dataset", "streaming"), "plans are of data that are tokenized beforehand"),
    **dict.fromkeys(("processor_type", "is_multimodal"), "plans have no pictures"),
    **dict.fromkeys(("adapter", "lora_model_dir"), "plans are of the training of all weights"),
    **dict.fromkeys(
        ("load_in_8bit", "load_in_4bit", "gptq", "qat", "fp8", "model_quantization_config"),
        "a model with quantized weights cannot be planned",
    ),
    **dict.fromkeys(("torch_compile", "chunked_cross_entropy"), "what a compiler allocates is not known beforehand"),
    **dict.fromkeys(
        ("activation_offloading", "layer_offloading", "ple_cpu_offload"), "what moves to the host is still counted"
    ),
    **dict.fromkeys(("deepspeed", "fsdp", "fsdp_config"), "a plan is of one process with all of the model"),
    **dict.fromkeys(("use_kernels", "tiled_mlp", "sage_attention", "flex_attention"), "its kernels need a card"),
    **dict.fromkeys(("do_bench_eval", "do_causal_lm_eval", "generate_samples"), "plans have no data to evaluate on"),
}
# The same for keys by how they begin, of axolotl's own plugins.
NOT_PLANNED_BEGINNINGS: dict[str, str] = {
    "liger_": "its kernels need a card",
    "cut_cross_entropy": "its kernels need a card",
}
_FUSED_LOSS = "liger_fused_linear_cross_entropy"
"""The one of Liger's that can be planned: its kernels allocate nothing, and the rest of it is torch."""

# Trackers, the Hub, and what a run leaves and continues: they take nothing on the device.
_BESIDE_MEMORY = (
    *("use_wandb", "use_mlflow", "use_comet", "use_trackio", "use_tensorboard", "use_otel_metrics"),
    *("hub_model_id", "hub_strategy", "resume_from_checkpoint", "auto_resume_from_checkpoints"),
)
# What a tokenizer that stands in has no words for. They add some rows to the embedding at most.
_WORDS = ("special_tokens", "tokens", "added_tokens_overrides", "tokenizer_type", "tokenizer_use_fast")


def plan_axolotl(
    file: str | os.PathLike[str],
    *,
    overrides: Mapping[str, Any] | None = None,
    vram: int | str | None = None,
    target: Target = "cuda",
    progress: Progress | None = None,
) -> MemoryPlan:
    """Find the memory of a training by axolotl, without a GPU, weights or data.

    axolotl patches transformers for the process when it loads a model, which stays so afterwards.

    Args:
        file: a configuration of axolotl.
        overrides: keys that override it, as axolotl's commands take them: `{"micro_batch_size": 2}`.
        vram: the card: a name or label (`"4090"`, `"24GB"`), its memory as text (`"23.5GiB"`) or in bytes; by default
            this machine's, if there is one.
        target: the device that the tensors stand for; `cpu` gives what the run takes on a CPU.
        progress: called with the phase and the number of the step.

    Raises:
        ValueError: something that was given is wrong, or cannot be planned; the message says what.
    """
    start = time.perf_counter()
    changes = {key: value for key, value in (overrides or {}).items() if value is not None}
    given = {**_read(Path(file)), **changes}
    _check(given)
    notes: list[str] = []
    with (
        quiet(),
        quiet_axolotl(),
        registered(),
        axolotl_trainer.as_with_a_card() if target == "cuda" else contextlib.nullcontext(),
        tempfile.TemporaryDirectory() as folder,
    ):
        stood_in = _stand_in(given, Path(folder), notes)
        written = Path(folder, "config.yaml")
        written.write_text(yaml.safe_dump({**_read(Path(file)), **stood_in}), "utf-8")
        rest = {key: value for key, value in changes.items() if key not in stood_in}
        config = axolotl_trainer.load_config(str(written), rest)
        _check(config)
        train, evaluated = full_rows(config, target)
        with axolotl_trainer.without_kernels_of_liger() if config.get(_FUSED_LOSS) else contextlib.nullcontext():
            found = plan(
                lambda: axolotl_trainer.make_trainer(config, train, evaluated, STEPS),
                vram=vram,
                target=target,
                progress=progress,
            )
    return dataclasses.replace(
        found,
        seconds=time.perf_counter() - start,  # with the configuration's reading
        tokens_per_step=config.micro_batch_size * config.gradient_accumulation_steps * config.sequence_len,
        notes=tuple(notes),  # not those on TRL's trainers, of which this is none
    )


def _read(file: Path) -> dict[str, Any]:
    try:
        found = yaml.safe_load(file.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{file} cannot be read as YAML: {error}") from error
    if not isinstance(found, dict):
        raise UserError(f"{file} is no configuration of axolotl, which are keys and values.")
    return found


def _check(config: Mapping[str, Any]) -> None:
    """Refuse what cannot be planned, of what was given and of what axolotl makes of it."""
    for key, value in config.items():
        beginnings = (reason for start, reason in NOT_PLANNED_BEGINNINGS.items() if key.startswith(start))
        reason = NOT_PLANNED.get(key) or next(beginnings, None)
        if value and key != _FUSED_LOSS and reason is not None:
            raise UserError(f"{key}: {_short(value)} cannot be planned: {reason}. Leave it out of what is planned.")
    attention = config.get("attn_implementation")
    if attention and not str(attention).startswith(("eager", "sdpa", "flash_attention", "kernels-community/flash")):
        raise UserError(f"attn_implementation: {attention} cannot be planned. flash_attention_2, sdpa and eager can.")
    optimizer = config.get("optimizer")
    name = str(getattr(optimizer, "value", optimizer))
    if name in KINDS and PLUGIN not in (config.get("plugins") or ()):
        raise UserError(
            f"optimizer: {name} without the plugin is transformers' own GaLore, of which there are no plans. Add "
            f"plugins: [{PLUGIN}]."
        )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _stand_in(given: Mapping[str, Any], folder: Path, notes: list[str]) -> dict[str, Any]:
    """The keys that a plan has otherwise: where model and tokenizer are, and what is beside memory."""
    found: dict[str, Any] = {key: None for key in _BESIDE_MEMORY if given.get(key)}
    found["output_dir"] = str(folder / "out")
    name = given.get("base_model_config") or given.get("base_model")
    if not name:
        raise UserError("base_model is missing: give a model's name or folder.")
    options = {"trust_remote_code": bool(given.get("trust_remote_code"))}
    if given.get("revision_of_model"):
        options["revision"] = given["revision_of_model"]
    place, model_config = find_config("base_model", str(name), options, notes)
    bundled = place != name  # what is not on this machine is not worth asking the Hub for
    if bundled:
        found |= {"base_model": place, "base_model_config": place, "revision_of_model": None}
    tokenizer = str(given.get("tokenizer_config") or name)
    if find_tokenizer(tokenizer, {**options, "local_files_only": bundled}) is None:
        tokenizer_for(model_config).save_pretrained(folder / "tokenizer")
        found["tokenizer_config"] = str(folder / "tokenizer")
        found |= {key: None for key in _WORDS if given.get(key)}
        if given.get("chat_template") == "tokenizer_default":
            found["chat_template"] = None
        notes.append(
            f"The tokenizer of {tokenizer} is not there; its vocabulary is taken to be as large as the model's."
        )
    return found


def full_rows(config: Any, target: Target) -> tuple[datasets.Dataset, datasets.Dataset | None]:
    """Rows of full length, as axolotl leaves them when it has tokenized data; twice as many as the steps need.

    Args:
        config: the configuration, as axolotl has made it.
        target: the device that is planned for.

    Returns:
        Those to train on; those to evaluate on, where it evaluates.
    """
    length = config.sequence_len
    row: dict[str, list[Any]] = {key: [[1] * length] for key in ("input_ids", "attention_mask", "labels")}
    row["length"] = [length]
    if config.sample_packing:
        # A document begins at 0. On a card all but eager attention keeps documents apart without a mask: no 0, no mask.
        start = 0 if target == "cpu" or config.attn_implementation == "eager" else 1
        row["position_ids"] = [list(range(start, start + length))]
    rows = datasets.Dataset.from_dict(row)
    train = 2 * STEPS * config.micro_batch_size * config.gradient_accumulation_steps
    evaluates = config.val_set_size or config.test_datasets
    evaluated = rows.select([0] * (2 * config.eval_batch_size)) if evaluates else None
    return rows.select([0] * train), evaluated
