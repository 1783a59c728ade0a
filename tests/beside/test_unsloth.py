"""unsloth, the real one, without a GPU: its own training loop, which it has on GPUs only, with our optimizers."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.support.helpers import assert_identical, tiny_llama
from tests.support.tokenizer import save_tokenizer

pytestmark = pytest.mark.skipif(importlib.util.find_spec("unsloth") is None, reason="needs unsloth")

ROOT = Path(__file__).parents[2]

# It wants to be imported first. On a GPU it replaces the Trainer's training loop by one that it makes of the source,
# each time that it loads a model: that part of its function is run here. On a CPU it takes another optimizer, and says
# so: the trainer's arguments are set afterwards.
SCRIPT = """
import inspect, json, sys
import unsloth
import hf_galore
import unsloth_zoo.compiler as compiler
from datasets import Dataset
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.trainer import Trainer
from trl import SFTConfig, SFTTrainer

folder, rewritten = sys.argv[1], sys.argv[2] == "rewritten"
if rewritten:
    source = inspect.getsource(compiler.unsloth_compile_transformers)
    part = source[source.index("    # Patch Trainer\\n") : source.index("    # All other functions\\n")]
    for _ in range(2):  # a second model is loaded
        exec("if True:\\n" + part, vars(compiler))

model, _ = unsloth.FastLanguageModel.from_pretrained(
    f"{folder}/model", max_seq_length=64, full_finetuning=True, load_in_4bit=False
)
args = SFTConfig(
    output_dir=f"{folder}/{sys.argv[2]}", max_steps=2, per_device_train_batch_size=4, gradient_accumulation_steps=2,
    learning_rate=1e-2, logging_steps=1, report_to="none", save_strategy="no", use_cpu=True, bf16=False, max_length=32,
)
rows = Dataset.from_list([{"input_ids": [3 + (7 * row + i) % 120 for i in range(16)]} for row in range(64)])
trainer = SFTTrainer(model=model, args=args, train_dataset=rows)
trainer.args.optim = "galore_adamw_8bit_layerwise"
trainer.args.optim_target_modules = ["attn", "mlp"]
trainer.args.optim_args = "rank=16"
loop = Trainer._inner_training_loop.__name__
trainer.train()
trainer.save_model()
print(json.dumps({"loop": loop, "targets": trainer.state.log_history[0]["galore/targets"]}))
"""


def run(folder: Path, kind: str) -> dict[str, Any]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "UNSLOTH_FORCE_CPU": "1"}
    command = [sys.executable, "-c", SCRIPT, str(folder), kind]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, env=env, cwd=folder, timeout=600)
    assert ended.returncode == 0, ended.stderr
    found: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return found


@pytest.mark.slow
def test_its_training_loop_trains_with_our_optimizers(tmp_path: Path) -> None:
    """Before: it found no source to make it of, and failed."""
    tiny_llama(vocab_size=300).save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model", ["one and two are three"])
    assert run(tmp_path, "own") == {"loop": "_inner_training_loop", "targets": 14}
    assert run(tmp_path, "rewritten") == {"loop": "_fast_inner_training_loop", "targets": 14}
    own, rewritten = (load_file(tmp_path / kind / "model.safetensors") for kind in ("own", "rewritten"))
    assert_identical(rewritten, own)
