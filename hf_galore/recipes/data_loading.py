"""Loading data with the `datasets` library, with its errors said in one line."""

from __future__ import annotations

from typing import Any

import datasets

from ..errors import UserError


def load_dataset(given: str, *args: Any, **options: Any) -> Any:
    """Load the splits of a dataset.

    Args:
        given: what names the data, for the error: `dataset_name org/data`.
        args: those of `datasets.load_dataset`.
        options: those of `datasets.load_dataset`.

    Raises:
        UserError: it cannot be loaded.
    """
    try:
        return datasets.load_dataset(*args, **options)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise UserError(f"{given} cannot be loaded: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    cause = error.__cause__ or error.__context__
    if isinstance(cause, UnicodeDecodeError):
        return f"it holds a file that is not text in UTF-8 ({cause})"
    # This one says that something went wrong; what that was says its cause.
    says_nothing = type(error) is datasets.exceptions.DatasetGenerationError
    return str(cause if says_nothing and cause is not None else error)


def split_of(splits: Any, name: str, key: str) -> Any:
    """The split of a dataset that a key names.

    Args:
        splits: from `load_dataset`.
        name: of the split.
        key: where the name comes from: `dataset_train_split`.

    Raises:
        UserError: there is no such split.
    """
    if name not in splits:
        raise UserError(f"The dataset has no split {name!r}; it has {', '.join(splits)}. Set {key} to one of them.")
    return splits[name]
