"""Graphics cards that are not there: what training arguments would have found."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from transformers import TrainingArguments


def with_gpus(args: TrainingArguments, count: int) -> TrainingArguments:
    """Let arguments that have found this machine's CPU have found that many GPUs beside it."""
    assert args.n_gpu == 0
    args._n_gpu = count
    assert args.n_gpu == count, "TrainingArguments no longer keeps the number of GPUs in _n_gpu"
    return args


def on(args: TrainingArguments, device: str) -> TrainingArguments:
    """Let arguments have found that device."""
    args.__dict__["_setup_devices"] = torch.device(device)
    assert args.device == torch.device(device), "TrainingArguments no longer keeps its device in _setup_devices"
    return args


def pretend_gpus(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Let all training arguments find that many GPUs, and train on the CPU."""
    found = TrainingArguments.__dict__["_setup_devices"].func

    def pretended(self: Any) -> torch.device:
        device: torch.device = found(self)
        self._n_gpu = count
        return device

    attribute = functools.cached_property(pretended)
    attribute.__set_name__(TrainingArguments, "_setup_devices")
    monkeypatch.setattr(TrainingArguments, "_setup_devices", attribute)
