"""The eight tasks of GLUE (Wang et al., 2018, arXiv:1804.07461): columns, metrics, and what was published for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from transformers import EvalPrediction

from ..extras import require


class Task(NamedTuple):
    """One task. What is published is the first of its metrics."""

    columns: tuple[str, ...]
    """One text, or a pair."""
    metrics: tuple[str, ...]
    validation: tuple[str, ...] = ("validation",)
    """Splits to score on, taken together."""


TASKS: dict[str, Task] = {
    "cola": Task(("sentence",), ("matthews_correlation",)),
    "stsb": Task(("sentence1", "sentence2"), ("pearson", "spearman")),
    "mrpc": Task(("sentence1", "sentence2"), ("f1", "accuracy")),
    "rte": Task(("sentence1", "sentence2"), ("accuracy",)),
    "sst2": Task(("sentence",), ("accuracy",)),
    "mnli": Task(("premise", "hypothesis"), ("accuracy",), ("validation_matched", "validation_mismatched")),
    "qnli": Task(("question", "sentence"), ("accuracy",)),
    "qqp": Task(("question1", "question2"), ("accuracy", "f1")),
}
REGRESSION = ("pearson", "spearman")
CLASSIFICATION = ("accuracy",)

PUBLISHED_IN = "RoBERTa-base, as published: GaLore (arXiv:2403.03507), table 4"
# In the order of TASKS, in per cent.
_PUBLISHED = {
    "full fine-tuning": (62.24, 90.92, 91.30, 79.42, 94.57, 87.18, 92.33, 92.28),
    "GaLore, rank 4": (60.35, 90.73, 92.25, 79.42, 94.04, 87.00, 92.24, 91.06),
    "LoRA, rank 4": (61.38, 90.57, 91.07, 78.70, 92.89, 86.82, 92.18, 91.29),
    "GaLore, rank 8": (60.06, 90.82, 92.01, 79.78, 94.38, 87.17, 92.20, 91.11),
    "LoRA, rank 8": (61.83, 90.80, 91.90, 79.06, 93.46, 86.94, 92.25, 91.22),
}
PUBLISHED: dict[str, dict[str, float]] = {
    method: dict(zip(TASKS, scores, strict=True)) for method, scores in _PUBLISHED.items()
}


def _classes(prediction: EvalPrediction) -> tuple[Any, Any]:
    return prediction.label_ids, np.argmax(_first(prediction.predictions), axis=-1)


def _numbers(prediction: EvalPrediction) -> tuple[Any, Any]:
    return prediction.label_ids, np.squeeze(_first(prediction.predictions), axis=-1)


def _first(predictions: Any) -> Any:
    # Some models give their hidden states too.
    return predictions[0] if isinstance(predictions, tuple) else predictions


def scorer(names: tuple[str, ...]) -> Callable[[EvalPrediction], Mapping[str, float]]:
    """Return what a Trainer takes as `compute_metrics`, for metrics by their names.

    Raises:
        MissingExtraError: scikit-learn and SciPy, which compute them, are not there.
    """
    require("glue", "The score of a classifier")
    from scipy import stats  # only who scores needs them
    from sklearn import metrics

    computed: dict[str, Callable[[EvalPrediction], float]] = {
        "accuracy": lambda prediction: metrics.accuracy_score(*_classes(prediction)),
        "f1": lambda prediction: metrics.f1_score(*_classes(prediction)),
        "matthews_correlation": lambda prediction: metrics.matthews_corrcoef(*_classes(prediction)),
        "pearson": lambda prediction: stats.pearsonr(*_numbers(prediction)).statistic,
        "spearman": lambda prediction: stats.spearmanr(*_numbers(prediction)).statistic,
    }

    def score(prediction: EvalPrediction) -> Mapping[str, float]:
        return {name: float(computed[name](prediction)) for name in names}

    return score
