"""Runs that are to go to the Hub: who may write there is known before the weights are loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants
from transformers import TrainingArguments

from hf_galore.errors import UserError
from hf_galore.recipes.hub import check_hub


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    return TrainingArguments(output_dir=str(folder), use_cpu=True, report_to="none", push_to_hub=True, **changes)


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the Hub says of each token; an exception is raised."""
    found: dict[str, Any] = {}

    def whoami(token: str) -> Any:
        if isinstance(found[token], Exception):
            raise found[token]
        return found[token]

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    monkeypatch.setattr(huggingface_hub, "whoami", whoami)
    return found


@pytest.mark.usefixtures("answers")
def test_nobody_is_logged_in(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"push_to_hub: nobody is logged in to the Hugging Face Hub. Run `hf auth login`"
    ):
        check_hub(arguments(tmp_path))
    check_hub(TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none"))


def test_a_token_that_may_not_write_or_is_none(answers: dict[str, Any], tmp_path: Path) -> None:
    answers["reads"] = {"name": "me", "auth": {"accessToken": {"displayName": "mine", "role": "read"}}}
    answers["wrong"] = OSError("Invalid user token.")
    answers["writes"] = {"name": "me", "auth": {"accessToken": {"displayName": "mine", "role": "write"}}}
    answers["old"] = {"name": "me"}
    with pytest.raises(UserError, match=r"push_to_hub: the token 'mine' may only read. Make one that may write"):
        check_hub(arguments(tmp_path, hub_token="reads"))
    with pytest.raises(UserError, match=r"does not let us in: Invalid user token. Mend that, or leave out push_to_hub"):
        check_hub(arguments(tmp_path, hub_token="wrong"))
    check_hub(arguments(tmp_path, hub_token="writes"))
    check_hub(arguments(tmp_path, hub_token="old"))


@pytest.mark.usefixtures("answers")
def test_a_name_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="hub_model_id my model: "):
        check_hub(arguments(tmp_path, hub_model_id="my model", hub_token="writes"))
