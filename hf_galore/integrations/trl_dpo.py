"""What a plan puts in the place of parts of TRL's DPOTrainer that read numbers, or have nothing to prepare.

The reference's log-probabilities are computed before the first step where `precompute_ref_log_probs` says so, and kept
in a file by a hash of the weights. A plan has no weights to hash, and no numbers to keep; how much memory the computing
takes, a rehearsal finds by the Trainer's own method (`hf_galore.plan.rehearsal`).
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

from ..errors import UserError
from .older import trl_is_at_least
from .signatures import moved

_MODULE = "trl.trainer.dpo_trainer"
_OLDEST = "1.16"

PARTS: dict[str, str] = {
    "_prepare_dataset": "(self, dataset, processing_class, args, dataset_name)",
    "_precompute_ref_logps": "(self, dataset, name, batch_size)",
    "compute_ref_log_probs": "(self, model, inputs)",
}
_FUNCTIONS: dict[str, str] = {"hash_module": "(module)"}

REFERENCE_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")
"""Of prepared data, where the reference's log-probabilities have been computed beforehand."""


def moved_parts() -> list[str]:
    """What this TRL no longer has as it is needed here, in words; empty where all is well."""
    import trl.trainer.dpo_trainer as module

    return moved(module.DPOTrainer, "DPOTrainer", PARTS) + moved(module, _MODULE, _FUNCTIONS)


def check_release() -> None:
    """Check that this TRL's DPOTrainer is one that can be planned.

    Raises:
        UserError: it is an older one.
    """
    if not trl_is_at_least(_OLDEST):
        import trl

        raise UserError(
            f"a plan of DPO is made with TRL {_OLDEST} or later, but TRL {trl.__version__} is installed. Upgrade trl; "
            "training works without a plan."
        )


def without_reference_numbers() -> list[tuple[Any, str, Callable[..., Any]]]:
    """Owner, name and replacement of what computes the reference's log-probabilities beforehand.

    Empty where nothing has imported the DPOTrainer, or where TRL is older.
    """
    module = sys.modules.get(_MODULE)
    if module is None or not trl_is_at_least(_OLDEST):
        return []
    return [
        (module.DPOTrainer, "_precompute_ref_logps", _with_reference_columns),
        (module, "hash_module", lambda module: ""),
    ]


def _with_reference_columns(self: Any, dataset: Any, name: str, batch_size: int) -> Any:
    """Instead of computing them: a number for each row."""
    for column in REFERENCE_COLUMNS:
        dataset = dataset.add_column(column, [0.0] * len(dataset))
    return dataset


@contextlib.contextmanager
def prepared_data() -> Iterator[None]:
    """Within, a DPOTrainer takes its data for prepared: rows of `prompt_ids`, `chosen_ids` and `rejected_ids`."""
    from trl import DPOTrainer

    def as_it_is(self: Any, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        return dataset

    with mock.patch.object(DPOTrainer, "_prepare_dataset", as_it_is):
        yield
