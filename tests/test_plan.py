"""A plan's figures are those of the real run, byte for byte; and a plan leaves nothing behind."""

from __future__ import annotations

import gc
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import trl.trainer.utils
from peft import LoraConfig
from tokenizers import Tokenizer, models
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
)
from trl import SFTConfig, SFTTrainer

import hf_galore.fused_head
from hf_galore.cli import stand_in
from hf_galore.fakes import fake_training
from hf_galore.plan import MemoryPlan, measure, plan
from hf_galore.quantize import _equal_steps
from hf_galore.tracking import GRANULE
from tests import helpers
from tests.helpers import NAMES, VOCABULARY, make_trainer, optimizer_of, snapshot, tiny_llama

LENGTH, BATCH = 16, 2
# A square matrix, a tall and a wide one. The low-rank gradients of the last two have 4,096 elements, from where 8-bit
# moments are really in 8 bits.
TARGETS = ["q_proj", "up_proj", "down_proj"]
OPTIM_ARGS = f"rank={helpers.RANK}, update_proj_gap={helpers.GAP}"
GALORE = {"optim_target_modules": TARGETS, "optim_args": OPTIM_ARGS}

ModelOf = Callable[[], Any]
Maker = Callable[[], Trainer]


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of logits that are smaller than the vocabulary, and no longer larger than all else."""
    monkeypatch.setattr(trl.trainer.utils, "_CHUNKED_LOGPROB_CHUNK_SIZE", 96)
    monkeypatch.setattr(hf_galore.fused_head, "VOCABULARY_PART", 80)


def llama(**overrides: Any) -> LlamaForCausalLM:
    """With grouped-query attention."""
    return tiny_llama(num_attention_heads=4, num_key_value_heads=2, **overrides)


def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {f"<{index}>": index for index in range(VOCABULARY)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="<0>")), eos_token="<1>", pad_token="<2>"
    )


def rows(**more: Any) -> datasets.Dataset:
    tokens = list(range(5, 5 + LENGTH))
    row = {"input_ids": [tokens], "labels": [tokens], **more}
    return datasets.Dataset.from_dict(row).select([0] * 32)


def sft(
    folder: Path,
    optim: str,
    model: ModelOf = llama,
    data: datasets.Dataset | None = None,
    peft_config: Any = None,
    **overrides: Any,
) -> Maker:
    """Makes an SFTTrainer; `overrides` are training arguments."""
    data = rows() if data is None else data
    values = {
        "output_dir": str(folder),
        "optim": optim,
        "max_length": LENGTH,
        "per_device_train_batch_size": BATCH,
        "per_device_eval_batch_size": BATCH,
        "max_grad_norm": 0.0,
        "activation_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "max_steps": 4,
        "save_strategy": "no",
        "dataset_kwargs": {"skip_prepare_dataset": True},
        **(GALORE if optim.startswith("galore") else {}),
        **overrides,
    }

    def make() -> Trainer:
        return SFTTrainer(
            model(),
            SFTConfig(**values),
            train_dataset=data,
            eval_dataset=data.select(range(4)),
            processing_class=tokenizer(),
            peft_config=peft_config,
        )

    return make


def assert_plan_is_measured(make: Maker) -> MemoryPlan:
    planned, measured = plan(make, target="cpu"), measure(make)
    assert planned.phase_peaks == measured.phase_peaks
    assert (planned.peak_bytes, planned.phase) == (measured.peak_bytes, measured.phase)
    assert planned.resident_bytes == measured.resident_bytes
    assert planned.parameters == measured.parameters
    for figures in (planned, measured):
        assert sum(figures.breakdown.values()) == figures.peak_bytes == max(figures.phase_peaks.values())
        assert list(figures.breakdown.values()) == sorted(figures.breakdown.values(), reverse=True)
    # The loss of a micro-batch that a plan leaves out goes by another name.
    assert set(planned.breakdown) == set(measured.breakdown)
    for label, nbytes in planned.breakdown.items():
        assert abs(nbytes - measured.breakdown[label]) <= GRANULE, label
    return planned


# ---- a plan's figures are those of the real run

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulated": {"gradient_accumulation_steps": 4},
    "clipped": {"max_grad_norm": 1.0},
    "checkpointed": {"activation_checkpointing": True},
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("optim", ["adamw_torch", *NAMES])
def test_every_optimizer(optim: str, setting: str, tmp_path: Path) -> None:
    planned = assert_plan_is_measured(sft(tmp_path, optim, **SETTINGS[setting]))
    assert {"forward", "backward", "update", "evaluation"} <= set(planned.phase_peaks)
    assert {"parameters", "activations"} <= set(planned.breakdown)
