"""`hf-galore glue`: fine-tune a classifier on a task of GLUE, or on anybody's texts, and score it."""

from __future__ import annotations

import copy
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from peft import TaskType, get_peft_model
from rich.console import Console
from rich.table import Table
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    TrainingArguments,
    set_seed,
)
from transformers.trainer import TRAINER_STATE_NAME
from trl import ModelConfig, get_peft_config, get_quantization_config

from . import recipe
from .checkpoints import last_checkpoint, stop
from .errors import UserError
from .glue_data import LABEL, GlueArguments, load_texts, numbered
from .glue_tasks import CLASSIFICATION, PUBLISHED, PUBLISHED_IN, REGRESSION, TASKS, scorer
from .run_record import RecordedTrainer, RunFacts
from .training import check_arguments, check_model, run_recorded

PROG = "hf-galore glue"
ABOUT = """Fine-tune a sequence-classification model on tasks of GLUE, a file for each after --config, or on texts of
your own, and show its scores beside the published ones. A file holds 'key: value' lines, with the keys below. Options
on the command line come after the files and override them. With --resume_from_checkpoint, what an interrupted run has
not done is done."""


class Arguments(NamedTuple):
    """What a recipe and the command line say."""

    glue: GlueArguments
    training: TrainingArguments
    model: ModelConfig
    recipe: Path | None

    @property
    def name(self) -> str:
        """What is trained on, for people."""
        return self.glue.task_name or Path(str(self.glue.train_file)).name


class Score(NamedTuple):
    """What one run reached, by the metric that is published for its task; from 0 to 1."""

    metric: str
    best: float
    """Over its evaluations."""
    last: float


def run(arguments: Sequence[str]) -> int:
    """`hf-galore glue --config FILE [FILE ...] [--seeds 1 2 3] [--key value ...]`.

    Raises:
        UserError: something that was given is wrong.
        Stopped: Ctrl-C.
    """
    if not arguments:
        raise UserError(
            "give a recipe: --config glue/roberta_base_mrpc.yaml, and --key value to override what it says."
        )
    configs, rest = _take_configs(arguments)
    every = [parse([*(["--config", config] if config else []), *rest]) for config in configs]
    _check_apart(every)
    scores: dict[str, list[Score]] = {}
    for parsed in every:
        for one, known in _by_seed(parsed):
            try:
                score = run_glue(one) if known is None else known
            except KeyboardInterrupt:
                stop(PROG, arguments, one.training.output_dir)
            scores.setdefault(parsed.name, []).append(score)
    published = all(parsed.glue.task_name and parsed.glue.train_file is None for parsed in every)
    Console(highlight=False).print(score_table(scores, published=published))
    return 0


def parse(arguments: Sequence[str], prog: str = PROG, about: str = ABOUT) -> Arguments:
    """Read the command's arguments, with the errors of `recipe.parse`."""
    (glue, training, model), path = recipe.parse_into(
        (GlueArguments, TrainingArguments, ModelConfig), arguments, prog, about
    )
    return Arguments(glue, training, model, path)


def _take_configs(arguments: Sequence[str]) -> tuple[list[str | None], list[str]]:
    """The files after `--config`, of which a shell makes several from one pattern, and the other arguments."""
    items = list(arguments)
    if "--config" not in items:
        name, rest = recipe.take_config(items)  # --config=FILE, or none
        return [name], rest
    start = items.index("--config") + 1
    end = next((index for index in range(start, len(items)) if items[index].startswith("--")), len(items))
    if start == end:
        raise UserError("--config needs a file: --config recipe.yaml.")
    rest = items[: start - 1] + items[end:]
    if any(item.partition("=")[0] == "--config" for item in rest):
        raise UserError("--config is given twice. Give all files after one: --config a.yaml b.yaml.")
    return list(items[start:end]), rest


def _check_apart(every: Sequence[Arguments]) -> None:
    folders = [parsed.training.output_dir for parsed in every]
    if len(set(folders)) < len(folders):
        raise UserError(
            f"output_dir {folders[0]} would be that of several runs. Leave it out: each recipe has one of its own."
        )


def _by_seed(parsed: Arguments) -> list[tuple[Arguments, Score | None]]:
    """One run for each seed, in a folder of its own where there are several; with its score, if it need not be run."""
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
        one = parsed._replace(training=training)
        known = finished_score(one) if resumes else None
        if resumes and known is None:
            last = last_checkpoint(Path(training.output_dir))
            training.resume_from_checkpoint = None if last is None else str(last)  # or else this one has not begun
        runs.append((one, known))
    if resumes and not any(known or one.training.resume_from_checkpoint for one, known in runs):
        raise UserError(
            f"resume_from_checkpoint: there is no complete checkpoint in {parsed.training.output_dir}. Leave it out to "
            "start from the beginning, or give the output_dir of the run to continue."
        )
    return runs


def run_glue(parsed: Arguments) -> Score:
    """Train with one seed, and say what it scored.

    Raises:
        UserError: something in the arguments is wrong. No file or folder is left behind then.
    """
    trainer = run_recorded(
        parsed,
        lambda: make_trainer(parsed),
        command=PROG,
        model=str(parsed.model.model_name_or_path),
        data=parsed.name,
        dataset_name=None,
    )
    trainer.end()
    return _score(trainer.state.log_history, parsed)


def make_trainer(parsed: Arguments) -> RecordedTrainer:
    """Everything up to the training."""
    if parsed.model.model_name_or_path is None:
        raise UserError("model_name_or_path is missing: give a model's name or folder.")
    if parsed.training.eval_strategy == "no":
        raise UserError("eval_strategy is 'no': a run is for its scores. Set it to 'epoch' or 'steps'.")
    check_arguments(parsed.training)
    check_model(parsed.model)
    data = numbered(load_texts(parsed.glue))
    tokenizer = AutoTokenizer.from_pretrained(parsed.model.model_name_or_path, revision=parsed.model.model_revision)
    if tokenizer.pad_token is None:  # of a decoder
        tokenizer.pad_token = tokenizer.eos_token

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
    """The Trainer of a model, by name or folder, for tokenized texts that have been found.

    Args:
        labels: the classes by their numbers; `None` for a regression.
        metrics: to be computed, by their names.
    """
    training, model_args = parsed.training, parsed.model
    if training.device.type == "cpu":
        training.dataloader_pin_memory = False  # there is no device to copy to
    set_seed(training.seed)
    names = dict(enumerate(labels or ()))
    model = AutoModelForSequenceClassification.from_pretrained(
        model_name,
        revision=model_args.model_revision,
        dtype=model_args.dtype,
        attn_implementation=model_args.attn_implementation,
        quantization_config=get_quantization_config(model_args),
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
    """What the finished run in a folder has scored; `None` where none has finished there.

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
            f"{folder} cannot be gone on with: {error}. Remove it, or leave out --resume_from_checkpoint to train anew."
        ) from error
    return _score(state["log_history"], parsed)


def _score(history: Sequence[Mapping[str, Any]], parsed: Arguments) -> Score:
    known = TASKS[parsed.glue.task_name].metrics if parsed.glue.task_name else (*CLASSIFICATION, *REGRESSION)
    metric = next(name for name in known if any(f"eval_{name}" in entry for entry in history))
    values = [entry[f"eval_{metric}"] for entry in history if f"eval_{metric}" in entry]
    return Score(metric, max(values), values[-1])


def score_table(scores: Mapping[str, Sequence[Score]], *, published: bool) -> Table:
    """Scores in per cent, of the best and of the last evaluation; the mean and, of several seeds, the deviation.

    Args:
        scores: of each task, those of its seeds.
        published: whether what was published for the tasks goes below.
    """
    table = Table(title="Scores in per cent", title_justify="left")
    table.add_column("")
    for name, runs in scores.items():
        table.add_column(f"{name}\n{runs[0].metric}", justify="right")
    several = published and len(scores) > 1
    if several:
        table.add_column("mean", justify="right")
    for label, pick in (("best evaluation", lambda score: score.best), ("last evaluation", lambda score: score.last)):
        found = [[100 * pick(score) for score in runs] for runs in scores.values()]
        cells = [_mean(values) for values in found]
        table.add_row(label, *cells, *([f"{statistics.mean(map(statistics.mean, found)):.2f}"] if several else []))
    if published:
        table.add_section()
        for method, known in PUBLISHED.items():
            values = [known[name] for name in scores]
            mean = [f"{statistics.mean(values):.2f}"] if several else []
            table.add_row(method, *(f"{value:.2f}" for value in values), *mean)
        table.caption = f"Below the line: {PUBLISHED_IN}."
    return table


def _mean(values: Sequence[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.2f}"
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"
