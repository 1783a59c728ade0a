"""What a Trainer with FSDP2 is told: no processes are needed for that."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest

from hf_galore.integrations.fsdp import say_if_whole_gradients_accumulate


@pytest.mark.parametrize(
    ("steps", "layerwise", "projected", "sharded", "sync_each_batch", "warns"),
    [
        (4, True, False, True, False, True),
        (1, True, False, True, False, False),
        (4, False, False, True, False, False),
        (4, True, False, False, False, False),
        (4, True, False, True, True, False),
        (4, True, True, True, False, False),
    ],
)
def test_whole_gradients_that_accumulate_are_said(
    caplog: pytest.LogCaptureFixture,
    steps: int,
    layerwise: bool,
    projected: bool,
    sharded: bool,
    sync_each_batch: bool,
    warns: bool,
) -> None:
    state = SimpleNamespace(plugin_kwargs={"sync_each_batch": sync_each_batch})
    trainer: Any = SimpleNamespace(
        args=SimpleNamespace(gradient_accumulation_steps=steps), accelerator=SimpleNamespace(gradient_state=state)
    )
    parameters = [SimpleNamespace(ranks=object() if sharded else None)]
    hooks = SimpleNamespace(layerwise=layerwise, projected_backward=projected)
    optimizer: Any = SimpleNamespace(hooks=hooks, trained_parameters=lambda: parameters)
    with caplog.at_level(logging.WARNING):
        say_if_whole_gradients_accumulate(trainer, optimizer)
    assert ("'sync_each_batch': True" in caplog.text) == warns
