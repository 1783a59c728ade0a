"""Trains by a recipe for some steps, in a process of its own, and prints what the card had to give as JSON.

    python -m tests.support.card_run --steps 4 --cap 23.2 max_grad_norm=1

Weights and data are random, which makes no difference to memory or time. Only a fresh process has the allocator's
settings (`PYTORCH_ALLOC_CONF`) and peaks to itself.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import tempfile
import time
from typing import Any

import datasets
import torch
import yaml
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, TrainerCallback
from trl import SFTConfig, SFTTrainer

import hf_galore  # noqa: F401  (registers the names)
from tests.support.card import GIB, ON_CARD, RECIPE, SMALL_RANK, llama, wait


class Watch(TrainerCallback):
    """The seconds of each step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._start = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        wait()
        self._start = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        wait()
        self.seconds.append(time.perf_counter() - self._start)


class Warnings(logging.Handler):
    """What the library warned of."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def settings(overrides: list[str], folder: str, steps: int) -> dict[str, Any]:
    """What `SFTConfig` takes of the recipe, with nothing evaluated and nothing saved."""
    values = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))
    if not ON_CARD:
        values.update(
            use_cpu=True, per_device_train_batch_size=2, max_length=16, optim_args=f"rank={SMALL_RANK}, scale=2"
        )
    values.update(yaml.safe_load("\n".join(item.replace("=", ": ", 1) for item in overrides)) or {})
    known = {field.name for field in dataclasses.fields(SFTConfig)}
    values = {key: value for key, value in values.items() if key in known}
    for key in ("chat_template_path", "eval_steps", "save_steps"):
        values.pop(key, None)
    return {
        **values,
        "output_dir": folder,
        "max_steps": steps,
        "eval_strategy": "no",
        "save_strategy": "no",
        "assistant_only_loss": False,
        "disable_tqdm": True,
        "dataset_kwargs": {"skip_prepare_dataset": True},
    }


def rows(count: int, length: int, vocabulary: int) -> datasets.Dataset:
    """Random tokens."""
    ids = torch.randint(5, vocabulary, (count, length), generator=torch.Generator().manual_seed(0)).tolist()
    return datasets.Dataset.from_dict({"input_ids": ids, "labels": ids})


def tokenizer() -> PreTrainedTokenizerFast:
    """Nobody asks it for tokens."""
    vocabulary = {f"<{index}>": index for index in range(3)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="<0>")), eos_token="<1>", pad_token="<2>"
    )


def run(layers: int, steps: int, overrides: list[str]) -> dict[str, Any]:
    """Train, and return the figures. Sizes in bytes."""
    warnings, watch = Warnings(), Watch()
    logging.getLogger("hf_galore").addHandler(warnings)
    with tempfile.TemporaryDirectory() as folder:
        args = SFTConfig(**settings(overrides, folder, steps))
        model = llama(layers)
        per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps
        data = rows(steps * per_step, args.max_length, model.config.vocab_size)
        trainer = SFTTrainer(model, args, train_dataset=data, processing_class=tokenizer(), callbacks=[watch])
        if ON_CARD:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        trainer.train()
    logs = trainer.state.log_history
    return {
        "device": torch.cuda.get_device_name() if ON_CARD else "CPU",
        "layers": layers,
        "overrides": overrides,
        "parameters": sum(param.numel() for param in model.parameters()),
        "tokens_per_step": per_step * args.max_length,
        "allocated": torch.cuda.max_memory_allocated() if ON_CARD else None,
        "reserved": torch.cuda.max_memory_reserved() if ON_CARD else None,
        "resident": torch.cuda.memory_allocated() if ON_CARD else None,
        "outside_torch": used_outside_torch() if ON_CARD else None,
        "seconds": watch.seconds,
        "losses": [entry["loss"] for entry in logs if "loss" in entry],
        "refresh_seconds": [entry["galore/refresh_seconds"] for entry in logs if "galore/refresh_seconds" in entry],
        "captured_energy_min": [
            entry["galore/captured_energy_min"] for entry in logs if "galore/captured_energy_min" in entry
        ],
        "warnings": warnings.messages,
    }


def used_outside_torch() -> int:
    """What of the card is taken, by whomever, and not reserved by torch: CUDA's context, the libraries' handles."""
    free, total = torch.cuda.mem_get_info()
    return int(total - free - torch.cuda.memory_reserved())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--cap", type=float, help="GiB that torch may reserve")
    parser.add_argument("overrides", nargs="*", help="key=value, over the recipe's")
    args = parser.parse_args()
    if args.cap is not None and ON_CARD:
        torch.cuda.set_per_process_memory_fraction(min(1.0, args.cap * GIB / torch.cuda.mem_get_info()[1]))
    print(json.dumps(run(args.layers, args.steps, args.overrides)))  # noqa: T201


if __name__ == "__main__":
    main()
