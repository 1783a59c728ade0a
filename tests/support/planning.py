"""Trainers that are small enough to be planned and run many times."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import torch
from tokenizers import Tokenizer, models
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
)
from trl import SFTConfig, SFTTrainer

from tests.support import helpers
from tests.support.helpers import VOCABULARY, tiny_llama
from tests.support.releases import as_named_here

LENGTH, BATCH = 16, 2
# A square matrix, a tall and a wide one. The low-rank gradients of the last two have 4,096 elements, from where 8-bit
# moments are really in 8 bits.
TARGETS = ["q_proj", "up_proj", "down_proj"]
OPTIM_ARGS = f"rank={helpers.RANK}, update_proj_gap={helpers.GAP}"
GALORE = {"optim_target_modules": TARGETS, "optim_args": OPTIM_ARGS}
# A rank that the gradients of 16 different tokens have: a refresh of those that have not takes a copy of the gradient.
MIXTURE: dict[str, Any] = {"optim_target_modules": "all-linear", "optim_args": f"rank=4, update_proj_gap={helpers.GAP}"}

ModelOf = Callable[[], Any]
Maker = Callable[[], Trainer]


def llama(**overrides: Any) -> LlamaForCausalLM:
    """With grouped-query attention."""
    return tiny_llama(num_attention_heads=4, num_key_value_heads=2, **overrides)


def mixtral(**overrides: Any) -> MixtralForCausalLM:
    """Every token goes to all of its experts: a plan gives each a share of the tokens, and a real run may not."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    experts = {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 4, **overrides}
    return MixtralForCausalLM(MixtralConfig(vocab_size=VOCABULARY, max_position_embeddings=64, **sizes, **experts))


def llama_folder(folder: Path, layers: int) -> Path:
    """The folder, with the config of a small model in it and nothing else."""
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder)
    return folder


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
            SFTConfig(**as_named_here(values)),
            train_dataset=data,
            eval_dataset=data.select(range(4)),
            processing_class=tokenizer(),
            peft_config=peft_config,
        )

    return make
