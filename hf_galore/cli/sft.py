"""`hf-galore sft`: fine-tune a model as a recipe says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
from trl import (
    DatasetMixtureConfig,
    ModelConfig,
    ScriptArguments,
    SFTConfig,
    SFTTrainer,
    get_dataset,
    get_peft_config,
    get_quantization_config,
)

from . import recipe
from .checkpoints import stop
from .errors import UserError
from .run_record import RecordedTrainer
from .training import check_arguments, check_model, run_recorded

PROG = "hf-galore sft"
ABOUT = """Fine-tune a model with TRL's SFTTrainer. The file holds 'key: value' lines, with the keys below: those of
`trl sft`, optim: galore_* among them. Options on the command line come after the file and override it."""


class RecordedSFTTrainer(RecordedTrainer, SFTTrainer):  # type: ignore[misc, unused-ignore]
    """An SFTTrainer that leaves a record of its run."""


def run(arguments: Sequence[str]) -> int:
    """`hf-galore sft --config FILE [--key value ...]`.

    Raises:
        UserError: something that was given is wrong.
        Stopped: Ctrl-C.
    """
    if not arguments:
        raise UserError("give a recipe: --config recipe.yaml, and --key value to override what it says.")
    parsed = recipe.parse(arguments, PROG, ABOUT)
    try:
        trainer = run_sft(parsed)
    except KeyboardInterrupt:
        stop(PROG, arguments, parsed.training.output_dir)
    trainer.accelerator.print(f"The model is in {parsed.training.output_dir}.")
    trainer.end()
    return 0


def run_sft(parsed: recipe.Arguments) -> RecordedSFTTrainer:
    """Load model and data, train, save: what `trl sft` does, with mistakes said in one line.

    Args:
        parsed: which model and dataset, how to train. `resume_from_checkpoint` may be "true": the last checkpoint in
            `output_dir`.

    Returns:
        The trainer after training; the model has been saved to `output_dir`.

    Raises:
        UserError: something in the arguments is wrong. No file or folder is left behind then.
    """
    return run_recorded(
        parsed,
        lambda: make_trainer(parsed.script, parsed.training, parsed.model, parsed.dataset),
        command=PROG,
        model=str(parsed.model.model_name_or_path),
        data=data_name(parsed.script, parsed.dataset),
        dataset_name=parsed.script.dataset_name,
    )


def data_name(script_args: ScriptArguments, dataset_args: DatasetMixtureConfig) -> str:
    """What a run is trained on, for its record."""
    if dataset_args.datasets:
        return ", ".join(str(one.path) for one in dataset_args.datasets)
    return str(script_args.dataset_name)


def make_trainer(
    script_args: ScriptArguments,
    training_args: SFTConfig,
    model_args: ModelConfig,
    dataset_args: DatasetMixtureConfig,
) -> RecordedSFTTrainer:
    """The first half of `run_sft`: everything up to the training."""
    if model_args.model_name_or_path is None:
        raise UserError("model_name_or_path is missing: give a model's name or folder.")
    check_arguments(training_args)
    check_model(model_args, trust_remote_code=training_args.trust_remote_code)
    splits = _load_dataset(script_args, dataset_args)
    train = _split(splits, script_args.dataset_train_split, "dataset_train_split", training_args)
    evaluated = None
    if training_args.eval_strategy != "no":
        evaluated = _split(splits, script_args.dataset_test_split, "dataset_test_split", training_args)
    return make_sft_trainer(model_args.model_name_or_path, training_args, model_args, train, evaluated)


def make_sft_trainer(
    model: str,
    training_args: SFTConfig,
    model_args: ModelConfig,
    train_dataset: Any,
    eval_dataset: Any,
    processing_class: Any = None,
) -> RecordedSFTTrainer:
    """The Trainer of a recipe for a model, by name or folder, and data that have been found."""
    if training_args.device.type == "cpu":
        training_args.dataloader_pin_memory = False  # there is no device to copy to
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "trust_remote_code": training_args.trust_remote_code,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }
    return RecordedSFTTrainer(
        model=model,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=processing_class,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )


# ---- model and data


def _load_dataset(script_args: ScriptArguments, dataset_args: DatasetMixtureConfig) -> Any:
    name = script_args.dataset_name
    if name and dataset_args.datasets:
        raise UserError(f"Both dataset_name ({name}) and datasets are given; leave one out.")
    if dataset_args.datasets:
        return get_dataset(dataset_args)
    if not name:
        raise UserError("dataset_name is missing: give a dataset's name or folder, or a list of them as datasets.")
    try:
        return datasets.load_dataset(name, name=script_args.dataset_config, streaming=script_args.dataset_streaming)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise UserError(f"dataset_name {name} cannot be loaded: {error}") from error


def _split(splits: Any, name: str, key: str, training_args: SFTConfig) -> Any:
    if name not in splits:
        raise UserError(f"The dataset has no split {name!r}; it has {', '.join(splits)}. Set {key} to one of them.")
    split = splits[name]
    _check_columns(split, name, training_args)
    return split


def _check_columns(split: Any, name: str, training_args: SFTConfig) -> None:
    columns = split.column_names
    if columns is None:  # a stream does not know its columns beforehand
        return
    text = training_args.dataset_text_field
    usable = ({"messages"}, {"conversations"}, {"prompt", "completion"}, {text}, {"input_ids"})
    if not any(needed <= set(columns) for needed in usable):
        raise UserError(
            f"The dataset's split {name!r} has the columns {', '.join(columns)}. It needs 'messages' (lists of "
            f"role and content), 'prompt' and 'completion', {text!r} (dataset_text_field), or 'input_ids'."
        )
