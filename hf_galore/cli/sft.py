"""`hf-galore sft`: fine-tune a model as a recipe says."""

from __future__ import annotations

import contextlib
import copy
import linecache
import shlex
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import datasets
from transformers import AutoConfig, TrainingArguments
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
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

import hf_galore
from hf_galore.log import logger
from hf_galore.planner import MemoryPlan, plan
from hf_galore.trainer import KINDS, optim_name

from . import recipe
from .errors import Stopped, UserError
from .run_record import RecordedTrainer

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


def run_sft(parsed: recipe.Arguments) -> SFTTrainer:
    """Load model and data, train, save: what `trl sft` does, with mistakes said in one line.

    Args:
        parsed: which model and dataset, how to train. `resume_from_checkpoint` may be "true": the last checkpoint in
            `output_dir`.

    Returns:
        The trainer after training; the model has been saved to `output_dir`.

    Raises:
        UserError: something in the arguments is wrong. No file or folder is left behind then.
    """
    with reporting_errors(parsed.training.output_dir):
        memory_plan = plan_for_card(parsed)
        trainer = make_trainer(parsed.script, parsed.training, parsed.model, parsed.dataset)
        trainer.memory_plan = memory_plan
        data = data_name(parsed.script, parsed.dataset)
        trainer.record(PROG, parsed.recipe, str(parsed.model.model_name_or_path), data)
        train_and_save(trainer, parsed.script.dataset_name)
    return trainer


def plan_for_card(parsed: Any) -> MemoryPlan | None:
    """The plan of a run that is to be published: its model card says it. `None` for others, and where there is none."""
    if not parsed.training.push_to_hub or optim_name(parsed.training) not in KINDS:
        return None
    try:
        return plan(copy.deepcopy(parsed))  # which a plan uses up
    except ValueError as error:
        logger.warning("The model card will say nothing of memory: %s", error)
        return None


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
    """The first half of `run_sft`: everything up to the training.

    What needs neither model nor data is checked before they are loaded, which may take minutes.
    """
    hf_galore.register()
    if model_args.model_name_or_path is None:
        raise UserError("model_name_or_path is missing: give a model's name or folder.")
    galore_config(training_args)  # read now, for its mistakes
    check_folders(training_args)
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


def galore_config(training_args: TrainingArguments) -> hf_galore.GaLoreConfig | None:
    """What `optim_args` of a `galore_*` optim say; `None` for another optim.

    Raises:
        ValueError: they are not what GaLore takes.
    """
    if optim_name(training_args) not in KINDS:
        return None
    return hf_galore.GaLoreConfig.from_optim_args(training_args.optim_args)


def train_and_save(trainer: RecordedTrainer, dataset_name: str | None = None) -> None:
    """The second half of a run: train, or go on training, and save the model and the log."""
    trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    trainer.save_model(trainer.args.output_dir)
    trainer.save_record()
    if trainer.args.push_to_hub:
        trainer.push_to_hub(dataset_name=dataset_name)


# ---- model and data


def check_model(model_args: ModelConfig, *, trust_remote_code: bool = False) -> None:
    """Find a model that is not there before the data are loaded, and name it: transformers' error may not.

    Raises:
        UserError: there is no such model.
    """
    name = model_args.model_name_or_path
    try:
        AutoConfig.from_pretrained(name, revision=model_args.model_revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise UserError(f"model_name_or_path {name} cannot be loaded: {error}") from error


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


# ---- folders and checkpoints


def check_folders(training_args: TrainingArguments) -> None:
    """Whether `output_dir` can be written to; and `resume_from_checkpoint` becomes the folder that it means.

    Raises:
        UserError: it cannot, or there is no such checkpoint.
    """
    _check_writable(Path(training_args.output_dir))
    training_args.resume_from_checkpoint = _checkpoint(training_args)


def _check_writable(folder: Path) -> None:
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise UserError(f"output_dir {folder} cannot be a folder, because {nearest} is a file. Give another one.")
    try:  # permissions alone do not say it: file systems have rules of their own
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"output_dir {folder} cannot be written to ({error}). Give another one.") from error


def _checkpoint(training_args: TrainingArguments) -> str | None:
    """The checkpoint that `resume_from_checkpoint` means: a folder, or the last one in `output_dir`."""
    wanted = training_args.resume_from_checkpoint
    if wanted is None or str(wanted).lower() == "false":
        return None
    if str(wanted).lower() == "true":
        last = last_checkpoint(Path(training_args.output_dir))
        if last is None:
            raise UserError(
                f"resume_from_checkpoint: there is no complete checkpoint in {training_args.output_dir}. Leave it out "
                "to start from the beginning, or give the output_dir of the run to continue."
            )
        return str(last)
    for name in (TRAINER_STATE_NAME, SCHEDULER_NAME):  # the first alone is also in a finished run's folder
        if not (Path(wanted) / name).is_file():
            raise UserError(
                f"resume_from_checkpoint: {wanted} is no checkpoint; it holds no {name}. Give a folder "
                f"{PREFIX_CHECKPOINT_DIR}-N, or no value for the last one in output_dir."
            )
    return str(wanted)


def last_checkpoint(output_dir: Path) -> Path | None:
    """The latest complete checkpoint in `output_dir`, `None` where there is none.

    Complete: a run that was killed while it saved one leaves a folder without the file that is written last.
    """
    steps = {}
    for folder in output_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        step = folder.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
        if step.isdigit() and (folder / TRAINER_STATE_NAME).is_file():
            steps[int(step)] = folder
    return steps[max(steps)] if steps else None


def stop(prog: str, arguments: Sequence[str], output_dir: str) -> NoReturn:
    """After Ctrl-C: say how to go on.

    Args:
        prog: the command that was stopped.
        arguments: what it was given.
        output_dir: where its checkpoints are.
    """
    last = last_checkpoint(Path(output_dir))
    if last is None:
        raise Stopped(
            f"interrupted; {output_dir} holds no checkpoint yet, so run the same command again. save_steps says how "
            "often one is written."
        ) from None
    command = _without_resume(arguments)
    raise Stopped(f"interrupted; go on from {last} with: {prog} {shlex.join(command)} --resume_from_checkpoint")


def _without_resume(arguments: Sequence[str]) -> list[str]:
    kept: list[str] = []
    skipping = False
    for item in arguments:
        if item.startswith("--"):
            skipping = item.partition("=")[0].replace("-", "_") == "__resume_from_checkpoint"
        if not skipping:
            kept.append(item)
    return kept


# ---- errors


@contextlib.contextmanager
def reporting_errors(output_dir: str) -> Iterator[None]:
    """Turn complaints of libraries about arguments into `UserError`, and leave no empty `output_dir` behind."""
    folder = Path(output_dir).absolute()
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    with reporting_complaints():
        try:
            yield
        except BaseException:
            for path in missing:
                with contextlib.suppress(OSError):  # it is not there, or not empty
                    path.rmdir()
            raise


@contextlib.contextmanager
def reporting_complaints() -> Iterator[None]:
    """Turn complaints of libraries about arguments into `UserError`."""
    try:
        yield
    except Exception as error:
        if _is_about_arguments(error):
            raise UserError(str(error)) from error
        raise


# The libraries that read a recipe's values.
_CHECKING = ("hf_galore", "trl", "transformers", "datasets", "peft")


def _is_about_arguments(error: Exception) -> bool:
    """Whether a library raised `error` on purpose, about what it was given; a bug's traceback is to be seen."""
    if not isinstance(error, (ValueError, ImportError, OSError, datasets.exceptions.DatasetsError)):
        return False
    if isinstance(error, OSError) and error.errno is not None:  # the operating system's: disk full, and the like
        return False
    frame, line = list(traceback.walk_tb(error.__traceback__))[-1]
    raised = linecache.getline(frame.f_code.co_filename, line).lstrip().startswith("raise ")
    return raised and str(frame.f_globals.get("__name__")).partition(".")[0] in _CHECKING
