"""The key `report_to`: whether the trackers that it names are there, and whether somebody is logged in to them."""

from __future__ import annotations

import os

from transformers import TrainingArguments
from transformers.integrations import get_available_reporting_integrations, get_reporting_integration_callbacks

from ..errors import UserError
from .hub import check_login

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


def check_logins(args: TrainingArguments) -> None:
    """Raise an error where nobody is logged in to a tracker that needs it; in a terminal, W&B asks for it now.

    Left to the Trainer, that comes when the model is loaded: hours later, in a queue.

    Raises:
        UserError: nobody is logged in, and nobody is there to ask.
    """
    if args.process_index != 0:  # the others report nothing
        return
    if "wandb" in args.report_to:
        _check_wandb()
    if "trackio" in args.report_to:
        spaces = ("trackio_space_id", "trackio_static_space_id", "trackio_bucket_id")
        key = next((key for key in spaces if getattr(args, key, None)), None)
        if key is not None:
            check_login(f"report_to trackio with {key}", args.hub_token, f"or set {key} to null to keep the run here")


def _check_wandb() -> None:
    if os.environ.get("WANDB_MODE", "online") not in ("online", "shared"):
        return
    import wandb

    if wandb.setup().settings.mode not in ("online", "shared"):  # by `wandb offline`, say
        return
    try:
        wandb.login(verify=False)  # asks in a terminal
    except wandb.errors.Error as error:
        raise UserError(
            "report_to: nobody is logged in to wandb, and there is no terminal to ask in. Run `wandb login`, or set "
            "WANDB_API_KEY; or set WANDB_MODE=offline, to keep the run here for `wandb sync`; or set report_to to "
            "'none'."
        ) from error
