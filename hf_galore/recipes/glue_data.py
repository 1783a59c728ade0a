"""Texts and labels for `hf-galore glue`: a task of GLUE, or anybody's files."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import datasets

from ..errors import UserError
from .data_loading import load_dataset, load_files, reporting_unreadable
from .glue_tasks import CLASSIFICATION, REGRESSION, TASKS
from .rows import numbered_rows

_KINDS = {".csv": "csv", ".json": "json", ".jsonl": "json"}
LABEL = "label"


@dataclasses.dataclass
class GlueArguments:
    """Which texts, and which seeds."""

    task_name: str | None = dataclasses.field(default=None, metadata={"help": "Task of GLUE.", "choices": list(TASKS)})
    dataset_name: str = dataclasses.field(
        default="nyu-mll/glue",
        metadata={"help": "Where the tasks are: a name on the Hub, or a folder with one for each task."},
    )
    train_file: str | None = dataclasses.field(
        default=None,
        metadata={
            "help": "Texts of your own: a CSV or JSON file with a column label and one or two columns of text (those "
            "of the task, if task_name is given). Numbers with a decimal point as labels make it a regression."
        },
    )
    validation_file: str | None = dataclasses.field(
        default=None, metadata={"help": "Texts of your own to score on, as those of train_file."}
    )
    max_length: int = dataclasses.field(default=128, metadata={"help": "Tokens; longer texts are cut."})
    seeds: list[int] | None = dataclasses.field(
        default=None, metadata={"help": "Train once with each of these seeds, and show the mean. Instead of seed."}
    )

    def __post_init__(self) -> None:
        if self.max_length < 1:
            raise ValueError(f"max_length has to be at least 1, but is {self.max_length}.")
        if self.seeds is not None and (not self.seeds or len(set(self.seeds)) < len(self.seeds)):
            raise ValueError(f"seeds have to be different numbers, but are {self.seeds}.")


class TextData(NamedTuple):
    """What is trained and scored on, with columns `label` and those of `columns`."""

    train: datasets.Dataset
    validation: datasets.Dataset
    columns: tuple[str, ...]
    labels: list[str] | None
    """The classes by their numbers; `None` for a regression."""
    metrics: tuple[str, ...]


def load_texts(args: GlueArguments) -> TextData:
    """Load the texts that the arguments name, and find out what their columns are.

    Raises:
        UserError: it is not there, or a split or column is missing.
    """
    task = TASKS.get(args.task_name or "")
    if args.train_file is None and args.validation_file is None:
        if task is None:
            raise UserError("task_name is missing: give a task of GLUE, or texts of your own as train_file.")
        splits = _load_task(args.dataset_name, str(args.task_name))
        train, validation = _splits(splits, ("train",), args), _splits(splits, task.validation, args)
    else:
        files = {"train": _file(args.train_file, "train_file")}
        files["validation"] = _file(args.validation_file, "validation_file")
        kinds = {_KINDS[path.suffix.lower()] for path in files.values()}
        if len(kinds) > 1:
            raise UserError(
                f"train_file {args.train_file} and validation_file {args.validation_file}: give one format."
            )
        splits = _load_files(kinds.pop(), {name: [str(path)] for name, path in files.items()})
        train, validation = splits["train"], splits["validation"]
    columns = _columns(train, None if task is None else task.columns)
    missing = [column for column in (LABEL, *columns) if column not in validation.column_names]
    if missing:
        raise UserError(f"The validation texts have no column {', '.join(missing)}, which those of the training have.")
    for split, which in ((train, "training"), (validation, "validation")):
        _check_rows(split, which, [LABEL, *columns])
    labels = _labels(train, validation)
    if task is not None and (task.metrics == REGRESSION) != (labels is None):
        raise UserError(
            f"The labels of task_name {args.task_name} have to be "
            f"{'numbers with a decimal point' if labels is not None else 'classes'}. Mend the files, or leave "
            "task_name out."
        )
    if task is not None and "f1" in task.metrics and len(labels or ()) != 2:
        raise UserError(f"task_name {args.task_name} has two classes, but the labels are {', '.join(labels or ())}.")
    metrics = task.metrics if task is not None else (REGRESSION if labels is None else CLASSIFICATION)
    return TextData(train, validation, columns, labels, metrics)


def _load_task(name: str, task: str) -> Any:
    if Path(name).is_dir():
        return _load_folder(Path(name) / task)
    return load_dataset(f"dataset_name {name}", name, task)


def _load_folder(folder: Path) -> Any:
    """Load files that are named as their splits, as on the Hub: `validation_matched-00000-of-00001.parquet`."""
    files: dict[str, list[str]] = {}
    kinds = {**_KINDS, ".parquet": "parquet"}
    found = [path for path in sorted(folder.glob("*")) if path.suffix.lower() in kinds]
    if not found:
        raise UserError(f"dataset_name: {folder} has no files that end in one of {', '.join(kinds)}.")
    for path in found:
        files.setdefault(path.stem.partition("-")[0], []).append(str(path))
    return _load_files(kinds[found[0].suffix.lower()], files)


def _load_files(kind: str, files: dict[str, list[str]]) -> Any:
    names = ", ".join(name for of_split in files.values() for name in of_split)
    return load_files(names, kind, files)


def _file(name: str | None, key: str) -> Path:
    if name is None:
        raise UserError(f"{key} is missing: train_file and validation_file belong together.")
    path = Path(name).expanduser()
    if path.suffix.lower() not in _KINDS:
        raise UserError(f"{key} {name}: its name has to end in one of {', '.join(_KINDS)}.")
    if not path.is_file():
        raise UserError(f"{key} {name}: there is no such file.")
    return path


def _splits(splits: Any, names: tuple[str, ...], args: GlueArguments) -> datasets.Dataset:
    missing = [name for name in names if name not in splits]
    if missing:
        raise UserError(
            f"dataset_name {args.dataset_name} has no split {missing[0]!r} of {args.task_name}; it has "
            f"{', '.join(splits)}."
        )
    return datasets.concatenate_datasets([splits[name] for name in names])


def _columns(train: datasets.Dataset, wanted: tuple[str, ...] | None) -> tuple[str, ...]:
    found = train.column_names
    # Of one's own files: every column of text but an index.
    columns = wanted or tuple(name for name, feature in train.features.items() if name != LABEL and _is_text(feature))
    if LABEL not in found or not columns or len(columns) > 2 or not set(columns) <= set(found):
        needed = " and ".join(wanted) if wanted else "one or two with text"
        raise UserError(f"The texts have the columns {', '.join(found)}. They need {LABEL}, and {needed}.")
    return columns


def _is_text(feature: Any) -> bool:
    return getattr(feature, "dtype", None) in ("string", "large_string")


def _check_rows(split: datasets.Dataset, which: str, columns: list[str]) -> None:
    with reporting_unreadable(f"The {which} texts"):
        found = (
            (number, column)
            for number, row in numbered_rows(split, columns)
            for column in columns
            if row[column] is None
        )
        missing = next(found, None)
    if missing is not None:
        number, column = missing
        raise UserError(
            f"The {which} texts have a row without {column} (it is missing or null): row {number}. Mend it, or leave "
            "it out."
        )
    if not len(split):
        raise UserError(f"The {which} texts have no rows.")


def _labels(train: datasets.Dataset, validation: datasets.Dataset) -> list[str] | None:
    feature = train.features[LABEL]
    if isinstance(feature, datasets.ClassLabel):
        return list(feature.names)
    if str(feature.dtype).startswith("float"):
        return None
    every = set(train.unique(LABEL)) | set(validation.unique(LABEL))
    if len(every) < 2:
        raise UserError(f"All texts have the {LABEL} {every.pop()}. A classifier needs texts of two classes or more.")
    return [str(label) for label in sorted(every)]


def numbered(data: TextData) -> TextData:
    """Replace the labels of files by the numbers of their classes, as GLUE's are."""
    if data.labels is None or isinstance(data.train.features[LABEL], datasets.ClassLabel):
        return data
    numbers = {label: number for number, label in enumerate(data.labels)}

    def number(row: dict[str, Any]) -> dict[str, Any]:
        return {"labels": numbers[str(row[LABEL])]}

    def renamed(split: datasets.Dataset) -> datasets.Dataset:
        return split.map(number, remove_columns=[LABEL]).rename_column("labels", LABEL)

    return data._replace(train=renamed(data.train), validation=renamed(data.validation))
