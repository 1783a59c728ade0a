"""A recipe of `hf-galore glue`: a classifier, its keys, the Trainer that they describe, and what a run scored."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from peft import TaskType, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    TrainingArguments,
    set_seed,
)
from transformers.trainer import TRAINER_STATE_NAME
from trl import ModelConfig, get_peft_config

from ..errors import UserError
from ..integrations.devices import keep_to_one_gpu
from .checkpoints import last_checkpoint, no_checkpoint
from .checks import check_arguments, check_model, check_training, say_if_widened
from .glue_data import LABEL, GlueArguments, TextData, load_texts, numbered
from .glue_tasks import CLASSIFICATION, REGRESSION, TASKS, scorer
from .output_folder import OutputArguments, check_unused
from .parser import parse_into
from .run_record import RecordedTrainer, RunFacts
from .templates import check_tokenizer_files
from .weight_bits import ModelArguments, check_weight_bits, quantization_of

DATACLASSES = (GlueArguments, TrainingArguments, ModelArguments, OutputArguments)
"""Their fields are the keys of a recipe."""


class Arguments(NamedTuple):
    """What a recipe and the command line say."""

    glue: GlueArguments
    training: TrainingArguments
    model: ModelConfig
    recipe: Path | None
    """The recipe's file, if there is one."""
    output: OutputArguments
    given: dict[str, Any]
    """What was said, by the file and the command line."""

    @property
    def command(self) -> str:
        """The command of `hf-galore` that this is for."""
        return "glue"

    @property
    def model_name(self) -> str | None:
        """The model's name or folder."""
        name: str | None = self.model.model_name_or_path
        return name

    @property
    def data_name(self) -> str:
        """The task's name, or that of the file with the texts."""
        return self.glue.task_name or Path(str(self.glue.train_file)).name

    @property
    def hub_dataset(self) -> str | None:
        """The dataset for the model card: none, since GLUE's has a configuration for each task."""
        return None

    @property
    def metrics(self) -> tuple[str, ...]:
        """What an evaluation's result is told by, the best first: what is published for the task."""
        return TASKS[self.glue.task_name].metrics if self.glue.task_name else (*CLASSIFICATION, *REGRESSION)

    def check(self) -> Checked:
        """Check all that can be checked before the weights are loaded; see `check`."""
        return check(self)

    def make_trainer(self, checked: Checked | None = None) -> RecordedTrainer:
        """Make the Trainer; see `make_trainer`."""
        return make_trainer(self, checked)


class Score(NamedTuple):
    """What one run reached, by the metric that is published for its task; from 0 to 1."""

    metric: str
    best: float
    """Over its evaluations."""
    last: float


def parse(arguments: Sequence[str], prog: str, about: str) -> Arguments:
    """Read a command's arguments, with the arguments and errors of `parser.parse_into`."""
    (glue, training, model, output), path, given = parse_into(DATACLASSES, arguments, prog, about)
    return Arguments(glue, training, model, path, output, given)


def runs_of(every: Sequence[Arguments]) -> list[tuple[Arguments, Score | None]]:
    """Return one run for each recipe and seed, each in a folder of its own where there are several seeds.

    Args:
        every: the recipes. If they are to be resumed, those that have not begun begin.

    Returns:
        The arguments of each run; and its score, where it is finished and the recipe is to be resumed.

    Raises:
        UserError: `resume_from_checkpoint` is a folder although there are several seeds, or nothing can be resumed.
    """
    runs = [run for parsed in every for run in _runs_of_one(parsed)]
    resumes = str(every[0].training.resume_from_checkpoint or "false").lower() == "true"
    if resumes and not any(known or one.training.resume_from_checkpoint for one, known in runs):
        raise no_checkpoint(every[0].training.output_dir)
    return runs


def _runs_of_one(parsed: Arguments) -> list[tuple[Arguments, Score | None]]:
    seeds = parsed.glue.seeds or [parsed.training.seed]
    wanted = str(parsed.training.resume_from_checkpoint or "false")
    resumes = wanted.lower() == "true"
    if len(seeds) > 1 and wanted.lower() not in ("true", "false"):
        raise UserError(
            f"resume_from_checkpoint {wanted}: with several seeds give no folder. Each goes on with its own."
        )
    runs = []
    for seed in seeds:
        training = copy.deepcopy(parsed.training)
        training.seed = seed
        if len(seeds) > 1:
            training.output_dir = str(Path(training.output_dir) / f"seed-{seed}")
        own = {"seed": seed, "output_dir": training.output_dir} if len(seeds) > 1 else {}
        given = {key: value for key, value in parsed.given.items() if not own or key != "seeds"}
        one = parsed._replace(training=training, given={**given, **own})
        check_unused(Path(training.output_dir), parsed.output, resumes=wanted.lower() != "false")
        known = finished_score(one) if resumes else None
        if resumes and known is None:
            last = last_checkpoint(Path(training.output_dir))
            training.resume_from_checkpoint = None if last is None else str(last)  # or else this one has not begun
        runs.append((one, known))
    return runs


class Checked(NamedTuple):
    """What checking a recipe has loaded: all but the weights."""

    data: TextData
    tokenizer: Any


def check(parsed: Arguments) -> Checked:
    """Check the arguments, the model's config and the tokenizer, and load the texts; the cheapest first.

    `output_dir` is there afterwards, and `resume_from_checkpoint` is the folder that it means.

    Raises:
        UserError: something in the arguments or in the data is wrong.
    """
    training, model_args = parsed.training, parsed.model
    if training.eval_strategy == "no":
        raise UserError("eval_strategy is 'no': a run is for its scores. Set it to 'epoch' or 'steps'.")
    check_arguments(training)
    config = check_model(model_args)
    keep_to_one_gpu(training)
    say_if_widened(model_args, training, config)
    check_weight_bits(model_args, training, config.dtype if model_args.dtype in (None, "auto") else model_args.dtype)
    check_training(
        training,
        parsed.output,
        config,
        dtype=model_args.dtype,
        auto_class=AutoModelForSequenceClassification,
        max_length=parsed.glue.max_length,
        adapters=model_args.use_peft or model_args.load_in_4bit or model_args.load_in_8bit,
    )
    check_tokenizer_files(str(model_args.model_name_or_path))
    tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path, revision=model_args.model_revision)
    if tokenizer.pad_token is None:  # of a decoder
        tokenizer.pad_token = tokenizer.eos_token
    return Checked(numbered(load_texts(parsed.glue)), tokenizer)


def make_trainer(parsed: Arguments, checked: Checked | None = None) -> RecordedTrainer:
    """Check a recipe, load the model, and make the Trainer.

    Args:
        parsed: the recipe.
        checked: what checking it has loaded, where that is done.

    Raises:
        UserError: something in the arguments or in the data is wrong.
    """
    data, tokenizer = checked or check(parsed)

    def tokenized(split: Any) -> Any:
        def encode(rows: Any) -> dict[str, Any]:
            texts = (rows[column] for column in data.columns)
            return {**tokenizer(*texts, truncation=True, max_length=parsed.glue.max_length), "labels": rows[LABEL]}

        return split.map(encode, batched=True, remove_columns=split.column_names)

    return make_glue_trainer(
        str(parsed.model.model_name_or_path),
        parsed,
        data.labels,
        data.metrics,
        tokenized(data.train),
        tokenized(data.validation),
        tokenizer,
    )


def make_glue_trainer(
    model_name: str,
    parsed: Arguments,
    labels: Sequence[str] | None,
    metrics: tuple[str, ...],
    train: Any,
    evaluated: Any,
    tokenizer: Any,
) -> RecordedTrainer:
    """Make the Trainer of a model, by name or folder, for texts that have been loaded and tokenized.

    Args:
        labels: the classes by their numbers; `None` for a regression.
        metrics: to be computed, by their names.
    """
    training, model_args = parsed.training, parsed.model
    keep_to_one_gpu(training)
    set_seed(training.seed)
    names = dict(enumerate(labels or ()))
    quantization = quantization_of(model_args)
    model = AutoModelForSequenceClassification.from_pretrained(
        model_name,
        revision=model_args.model_revision,
        dtype=model_args.dtype,
        attn_implementation=model_args.attn_implementation,
        **({} if quantization is None else {"quantization_config": quantization}),
        ignore_mismatched_sizes=True,  # a head for other classes gives way to a new one
        num_labels=len(labels or ("score",)),
        **({"id2label": names, "label2id": {name: number for number, name in names.items()}} if names else {}),
    )
    model.config.pad_token_id = tokenizer.pad_token_id
    if model_args.use_peft:
        model_args.lora_task_type = TaskType.SEQ_CLS
        model = get_peft_model(model, get_peft_config(model_args))
    return RecordedTrainer(
        model=model,
        args=training,
        train_dataset=train,
        eval_dataset=evaluated,
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=scorer(metrics),
    )


# ---- scores


def finished_score(parsed: Arguments) -> Score | None:
    """What the finished run in `output_dir` scored; `None` where no finished run is there.

    Raises:
        UserError: what it left cannot be read.
    """
    folder = Path(parsed.training.output_dir)
    try:
        facts = RunFacts.read(folder)
        if facts is None or not facts.finished:
            return None
        state = json.loads((folder / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder} cannot be gone on with: {error}. Remove it, or give --overwrite_output_dir instead of "
            "--resume_from_checkpoint to train anew."
        ) from error
    return score_of(state["log_history"], parsed)


def score_of(history: Sequence[Mapping[str, Any]], parsed: Arguments) -> Score:
    """What a run scored by its log: by the metric that is published for its task, or the first that was computed."""
    metric = next(name for name in parsed.metrics if any(f"eval_{name}" in entry for entry in history))
    values = [entry[f"eval_{metric}"] for entry in history if f"eval_{metric}" in entry]
    return Score(metric, max(values), values[-1])
