"""The Hugging Face Hub: whether anybody is logged in, and whether a model may be downloaded. Never waits for long."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

from ..errors import UserError
from .findings import Finding

TIMEOUT = 3.0  # seconds, for each question to the Hub

_LOG_IN = "hf auth login"


def hub(model: str | None = None) -> Iterator[Finding]:
    """Whether anybody is logged in, and whether a model's licence is accepted.

    Nothing is asked where HF_HUB_OFFLINE is set, and no answer is waited for longer than `TIMEOUT` seconds.

    Args:
        model: a model's name on the Hub, if one is of interest.
    """
    import huggingface_hub
    from huggingface_hub import constants

    token = huggingface_hub.get_token()
    if constants.HF_HUB_OFFLINE:
        logged_in = "somebody has logged in" if token else "nobody has logged in"
        yield Finding("Hub", "note", f"HF_HUB_OFFLINE is set, so nothing was asked; {logged_in}.")
        return
    api = huggingface_hub.HfApi()
    if token is None:
        yield Finding(
            "Hub",
            "note",
            "nobody has logged in: models with a licence (Llama) cannot be had.",
            command=_LOG_IN,
        )
    else:
        yield login(answer(lambda: api.whoami(token=token)))
    if model is not None:
        yield access(model, answer(lambda: api.auth_check(model)))


def login(answered: Any) -> Finding:
    """Whether the Hub knows the token, by what `whoami` returned or raised."""
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(answered, HfHubHTTPError) and answered.response.status_code in (401, 403):
        return Finding("Hub", "problem", "the token that is kept here is refused.", "Log in again:", _LOG_IN)
    if isinstance(answered, Exception):
        return Finding("Hub", "note", f"not reached ({type(answered).__name__}); somebody has logged in.")
    return Finding("Hub", "ok", f"logged in as {answered.get('name', 'somebody')}")


def access(model: str, answered: Any) -> Finding:
    """Whether a model may be downloaded, by what `auth_check` returned or raised."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    page = f"https://huggingface.co/{model}"
    if isinstance(answered, GatedRepoError):
        return Finding(
            "model",
            "problem",
            f"{model} has a licence that this account has not accepted.",
            f"Accept it at {page}, and log in:",
            _LOG_IN,
        )
    if isinstance(answered, RepositoryNotFoundError):
        return Finding(
            "model", "problem", f"there is no {model} on the Hub, or only for those who are logged in.", command=_LOG_IN
        )
    if isinstance(answered, Exception):
        return Finding("model", "note", f"{model} was not asked for: no answer ({type(answered).__name__}).")
    return Finding("model", "ok", f"{model} may be downloaded")


def need_model(model: str) -> None:
    """Raise an error where this account cannot download a model: now, and not after everything else is ready.

    Args:
        model: a model's name on the Hub.

    Raises:
        UserError: its licence is not accepted, nobody has logged in, or there is no such model.
    """
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        return
    found = access(model, answer(lambda: HfApi().auth_check(model)))
    if found.status == "problem":
        raise UserError(" ".join(part for part in (found.text, found.advice, found.command) if part is not None))


def answer(question: Callable[[], Any], timeout: float = TIMEOUT) -> Any:
    """What a function returns or raises; a `TimeoutError` where that takes too long: the thread is left behind."""
    found: list[Any] = []

    def ask() -> None:
        try:
            found.append(question())
        except Exception as error:  # whatever it is, it is reported
            found.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(timeout)
    return found[0] if found else TimeoutError()
