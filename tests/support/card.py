"""What tests and benchmarks of a graphics card share: the device, sizes for it, models with random weights.

HF_GALORE_CARD=cpu lets all of them run on a CPU with small sizes: to try them out where there is no card.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

DEVICE = torch.device(os.environ.get("HF_GALORE_CARD", "cuda"))
ON_CARD = DEVICE.type == "cuda"
IS_THERE = torch.cuda.is_available() if ON_CARD else True

ROOT = Path(__file__).resolve().parents[2]
LLAMA_7B = ROOT / "recipes" / "configs" / "meta-llama" / "Llama-2-7b-hf"
RECIPE = ROOT / "recipes" / "llama2_7b_oasst2.yaml"

GIB = 2**30
# What torch sees of an RTX 4090 is 23.6 GiB; the driver and the libraries' handles take 0.4 of it.
CAP = 23.2 * GIB

# A Llama whose matrices are small enough for a CPU, and large enough for moments in 8 bits at a quarter of the width.
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 512,
}
SMALL_RANK = 16

Value = TypeVar("Value")


def sized(on_card: Value, on_cpu: Value) -> Value:
    """The one of two sizes that is for the device in use."""
    return on_card if ON_CARD else on_cpu


def wait() -> None:
    """Wait for the card."""
    if ON_CARD:
        torch.cuda.synchronize()


def seconds_of(function: Callable[[], object]) -> float:
    """How long a call takes until the card has done it all."""
    wait()
    start = time.perf_counter()
    function()
    wait()
    return time.perf_counter() - start


def llama_config(layers: int, **overrides: Any) -> Any:
    """The config of Llama-2-7B with so many layers; `SMALL` on a CPU."""
    config = AutoConfig.from_pretrained(LLAMA_7B, local_files_only=True)
    values = {**({} if ON_CARD else SMALL), "num_hidden_layers": layers, "use_cache": False, **overrides}
    for key, value in values.items():
        setattr(config, key, value)
    return config


def llama(layers: int, dtype: torch.dtype = torch.bfloat16, **overrides: Any) -> Any:
    """A Llama of 7B's shapes, with random weights that are made on the device."""
    config = llama_config(layers, **overrides)
    torch.manual_seed(0)
    with torch.device(DEVICE):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def targets(model: nn.Module) -> list[Tensor]:
    """The weights of attention and MLP."""
    return [
        module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ("attn" in name or "mlp" in name)
    ]


def options_of(model: nn.Module, rank: int, **options: Any) -> dict[Tensor, dict[str, Any]]:
    """`param_options` that project attention and MLP."""
    return {weight: {"rank": rank, **options} for weight in targets(model)}


def tokens(model: nn.Module, rows: int, length: int, seed: int = 0) -> Tensor:
    """Random tokens of a model's vocabulary."""
    vocabulary: int = model.config.vocab_size  # type: ignore[union-attr, assignment]
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randint(vocabulary, (rows, length), generator=generator, device=DEVICE)


@contextlib.contextmanager
def waiting(mode: str) -> Iterator[None]:
    """Within, torch raises an error or warns (`mode`) where the host waits for the card; nothing on a CPU."""
    if not ON_CARD:
        yield
        return
    torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
