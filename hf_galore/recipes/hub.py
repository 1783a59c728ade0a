"""The keys that send something to the Hugging Face Hub: whether it can be reached, and who is logged in."""

from __future__ import annotations

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined, unused-ignore]
from transformers import TrainingArguments

from ..errors import UserError


def check_hub(args: TrainingArguments) -> None:
    """Raise an error where a run is to go to the Hub and cannot: the Trainer's comes when the model is loaded.

    Raises:
        UserError: offline, nobody is logged in, the token is not valid or may not write, or `hub_model_id` is no name.
    """
    if not args.push_to_hub or args.process_index != 0:
        return
    instead = "or leave out push_to_hub; the model stays in output_dir, and `hf upload` sends it later"
    if args.hub_model_id is not None:
        try:
            validate_repo_id(args.hub_model_id)
        except ValueError as error:
            raise UserError(f"hub_model_id {args.hub_model_id}: {error}") from error
    check_login("push_to_hub", args.hub_token, instead)


def check_login(key: str, token: str | None, instead: str) -> None:
    """Raise an error unless the Hub can be reached, by somebody who may write there.

    Args:
        key: what asks for it, for the error.
        token: instead of the one of this machine.
        instead: what to do without it, to end the error with.

    Raises:
        UserError: it cannot.
    """
    if constants.HF_HUB_OFFLINE:
        raise UserError(f"{key}: HF_HUB_OFFLINE is set, so nothing reaches the Hugging Face Hub. Unset it, {instead}.")
    token = token or huggingface_hub.get_token()
    if token is None:
        raise UserError(
            f"{key}: nobody is logged in to the Hugging Face Hub. Run `hf auth login`, or set HF_TOKEN to a token that "
            f"may write (https://huggingface.co/settings/tokens), {instead}."
        )
    try:
        found = huggingface_hub.whoami(token=token)
    except Exception as error:  # each release has another transport with errors of its own
        raise UserError(f"{key}: the Hugging Face Hub does not let us in: {error} Mend that, {instead}.") from error
    access = found.get("auth", {}).get("accessToken") or {}
    if access.get("role") == "read":
        raise UserError(
            f"{key}: the token {access.get('displayName', '')!r} may only read. Make one that may write "
            f"(https://huggingface.co/settings/tokens), {instead}."
        )
