"""The key `report_to`: whether the trackers that it names are there."""

from __future__ import annotations

from transformers import TrainingArguments
from transformers.integrations import get_available_reporting_integrations, get_reporting_integration_callbacks

from ..errors import UserError

EXTRA = ("tensorboard", "trackio", "wandb")  # what the extra `tracking` installs

# transformers leaves these out of its list of what is there even where they are: the Trainer has to find out.
_UNLISTED = ("azure_ml", "flyte")


def check_trackers(args: TrainingArguments) -> None:
    """Raise an error for a tracker that is not there: the Trainer's comes after model and data are loaded, and is long.

    Raises:
        UserError: `report_to` names what is no tracker, or one that is not installed.
    """
    try:
        get_reporting_integration_callbacks(args.report_to)
    except ValueError as error:
        raise UserError(f"report_to: {error}") from error
    there = get_available_reporting_integrations()
    for name in args.report_to:
        if name in there or name in _UNLISTED:
            continue
        if name in EXTRA:
            problem, remedy = "is not installed", f'Install it (pip install {name}, or "hf-galore[tracking]")'
        else:
            problem, remedy = "is not installed, or not set up", "Install it as its documentation says"
        others = f"one of {', '.join(there)}" if there else "'none'"
        raise UserError(f"report_to: {name} {problem}. {remedy}, or set report_to to {others}.")
