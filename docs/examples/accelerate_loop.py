"""Train all weights of a language model by a loop of one's own with accelerate.

python docs/examples/accelerate_loop.py                          # a tiny model with random weights
python docs/examples/accelerate_loop.py HuggingFaceTB/SmolLM2-135M --checkpoint out    # goes on where that has one
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, get_scheduler

from hf_galore import make_optimizer


def train(
    model: nn.Module,
    rows: list[dict[str, Tensor]],
    checkpoint: Path,
    *,
    steps: int = 8,
    stop_at: int | None = None,
    batch_size: int = 4,
    accumulate: int = 2,
    max_norm: float | None = 1.0,
    precision: str = "no",
    optim: str = "galore_adamw_8bit_layerwise",
    optim_args: str = "rank=16, update_proj_gap=4, scale=1",
    lr: float = 1e-3,
) -> list[float]:
    """Train, from `checkpoint` on if it is there, and leave one there.

    Args:
        rows: of data, one pass over which is `steps` optimizer steps or more.
        stop_at: the step after which to stop before `steps`, as an interruption would.
        accumulate: micro-batches of a step.
        max_norm: of the gradients; `None` for no clipping.

    Returns:
        The loss of each micro-batch.
    """
    accelerator = Accelerator(gradient_accumulation_steps=accumulate, mixed_precision=precision)
    # Of the model itself, before prepare() wraps it.
    galore = make_optimizer(
        model,
        "all-linear",
        optim=optim,
        optim_args=optim_args,
        lr=lr,
        weight_decay=0.01,
        hold_gradients=max_norm is not None,  # layerwise: until step(), to be clipped. An accumulation holds by itself
    )
    schedule = get_scheduler("cosine", galore, num_warmup_steps=2, num_training_steps=steps)
    model, optimizer, loader, schedule = accelerator.prepare(
        model, galore, DataLoader(rows, batch_size=batch_size), schedule
    )
    step = 0
    if checkpoint.exists():
        accelerator.load_state(checkpoint)
        step = schedule.scheduler.last_epoch
        loader = accelerator.skip_first_batches(loader, step * accumulate)
    model.train()
    losses = []
    for batch in loader:
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients and max_norm is not None:
                accelerator.clip_grad_norm_(model.parameters(), max_norm)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        losses.append(loss.item())
        step += accelerator.sync_gradients
        if step == (stop_at or steps):
            break
    accelerator.save_state(checkpoint)
    galore.close()  # takes the hooks off the model
    return losses


def tiny_model() -> Any:
    """A Llama of 0.1 million weights."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=128,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )


def counting_rows(rows: int = 64, length: int = 16) -> list[dict[str, Tensor]]:
    """Rows of numbers that count upwards."""
    tokens = 3 + (7 * torch.arange(rows).unsqueeze(1) + torch.arange(length)) % 120
    return [{"input_ids": row, "labels": row} for row in tokens]


def main() -> None:
    """Run by hand."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="a name on the Hub or a folder; without it a tiny model")
    parser.add_argument("--checkpoint", type=Path, default=Path(tempfile.mkdtemp()) / "checkpoint")
    arguments = parser.parse_args()
    model = tiny_model() if arguments.model is None else AutoModelForCausalLM.from_pretrained(arguments.model)
    print(train(model, counting_rows(), arguments.checkpoint))


if __name__ == "__main__":
    main()
