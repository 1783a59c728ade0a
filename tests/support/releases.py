"""What older releases do not have, for the tests of it: by version, so that what a newer one moves still fails."""

from __future__ import annotations

from typing import Any

import datasets
import pytest
import transformers.trainer
import trl
from packaging.version import parse
from transformers import TrainingArguments

from hf_galore.integrations.older import masks_ask_themselves
from hf_galore.integrations.trl_parser import OLD_NAMES

TRL = parse(trl.__version__)
# Before, TRL has no fused loss that we stand in for, or one that only a GPU computes.
FUSED_HEAD = parse("1.16") <= TRL
# A tile of logits is some tokens' of the whole vocabulary. TRL 0.29 and older have no such loss.
HEAD_BY_TOKENS = parse("1.9") <= TRL < parse("1.15")
# Before datasets 5, what a map makes of its last batch is lost where a stream goes on in the middle of it.
LOSES_LAST_ROWS = parse("5") > parse(datasets.__version__)
needs_fused_head = pytest.mark.skipif(not FUSED_HEAD, reason="TRL before 1.16 has another fused loss, or none")
needs_newest = pytest.mark.skipif(not FUSED_HEAD, reason="older releases say other things, and we of them")
needs_hub_function = pytest.mark.skipif(
    not hasattr(transformers.trainer, "hf_api"), reason="transformers here reaches the Hub otherwise"
)
needs_fast_all = pytest.mark.skipif(masks_ask_themselves(), reason="transformers here asks masks otherwise")


def as_named_here(values: dict[str, Any]) -> dict[str, Any]:
    """Training arguments by the names that this transformers has."""
    new = {name: old for old, name in OLD_NAMES.items() if name not in TrainingArguments.__dataclass_fields__}
    return {new.get(key, key): value for key, value in values.items()}
