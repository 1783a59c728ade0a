"""The recipes for large models, run with a small one put in by command-line overrides, and counted at full size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from hf_galore import GaLoreAdamW8bit, GaLoreConfig
from hf_galore.cli.embedded import Embedded, embedded
from hf_galore.cli.main import main
from hf_galore.cli.recipe import recipes_folder
from hf_galore.targets import embedding_weights, find_targets

LLAMA2 = recipes_folder() / "llama2_7b_oasst2.yaml"
GIB = 2**30


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Embedded:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_GALORE_CACHE", str(tmp_path_factory.mktemp("cache")))
        return embedded()


def settings(path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return loaded


def test_llama2_is_the_guide() -> None:
    """The settings of the 2024 guide, under today's names."""
    expected = {
        "model_name_or_path": "meta-llama/Llama-2-7b-hf",
        "dataset_name": "g-ronimo/oasst2_top4k_en",
        "optim": "galore_adamw_8bit_layerwise",
        "optim_target_modules": ["attn", "mlp"],
        "per_device_train_batch_size": 16,
        "max_length": 256,
        "learning_rate": 1e-5,
        "lr_scheduler_type": "constant",
        "num_train_epochs": 3,
        "activation_checkpointing": True,
        "dtype": "bfloat16",
    }
    found = settings(LLAMA2)
    assert {key: found[key] for key in expected} == expected
    assert GaLoreConfig.from_optim_args(found["optim_args"]) == GaLoreConfig(rank=1024, update_proj_gap=200, scale=2)


def test_llama2_trains_with_overrides_only(small: Embedded, tmp_path: Path) -> None:
    out = tmp_path / "out"
    smaller = {"model_name_or_path": small.model, "dataset_name": small.data, "per_device_train_batch_size": 2}
    smaller |= {"optim_args": "rank=16, update_proj_gap=2, scale=2", "learning_rate": 1e-3, "max_steps": 4}
    on_cpu = {"dtype": "float32", "bf16": "false", "use_cpu": "true"}
    often = {"eval_steps": 2, "save_steps": 2, "output_dir": out, "disable_tqdm": "true"}
    overrides = [item for key, value in (smaller | on_cpu | often).items() for item in (f"--{key}", str(value))]
    assert main(["sft", "--config", str(LLAMA2), *overrides]) == 0

    start = AutoModelForCausalLM.from_pretrained(small.model)
    end = AutoModelForCausalLM.from_pretrained(out)
    weights = dict(end.named_parameters())
    projected = find_targets(start, ["attn", "mlp"], GaLoreConfig(rank=16)).projected
    assert len(projected) == 7 * start.config.num_hidden_layers
    for name, weight in start.named_parameters():
        if name.removesuffix(".weight") in projected:
            assert not torch.equal(weight, weights[name]), f"{name} did not move"
    assert {folder.name for folder in out.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}
    optimizer = torch.load(out / "checkpoint-4" / "optimizer.pt", weights_only=True)
    assert any("exp_avg_absmax" in state for state in optimizer["state"].values())
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.eos_token == "<|im_end|>"


def test_llama2_counts_what_its_header_says() -> None:
    """Weights, moments and bases at full size, on the meta device."""
    with torch.device("meta"):
        # Llama-2-7B, with the vocabulary that the two tokens of ChatML make, in steps of 64.
        config = LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, vocab_size=32064)
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    galore = GaLoreConfig.from_optim_args(settings(LLAMA2)["optim_args"])
    targets = find_targets(model, ["attn", "mlp"], galore)
    assert len(targets.projected) == 224
    options: dict[torch.Tensor, dict[str, Any]] = {weight: {"optim_bits": 32} for weight in embedding_weights(model)}
    options |= {weight: galore.group_options() for weight in targets.projected.values()}
    optimizer = GaLoreAdamW8bit(model.parameters(), param_options=options)

    counted = {"weights": sum(param.numel() * 2 for param in model.parameters()), "bases": 0, "moments": 0, "rest": 0}
    for state in optimizer.state.values():
        of_target = any(key.startswith("basis") for key in state)
        for key, value in state.items():
            part = "bases" if key.startswith("basis") else "moments" if of_target else "rest"
            counted[part] += value.numel() * value.element_size()
    said = {"weights": "12.6 GiB", "bases": "0.5 GiB", "moments": "3.1 GiB", "rest": "1.2 GiB"}
    text = LLAMA2.read_text(encoding="utf-8")
    for part, words in said.items():
        assert words in text
        assert counted[part] / GIB == pytest.approx(float(words.split()[0]), abs=0.05)


def test_chatml_marks_the_assistants_words_and_their_end(small: Embedded) -> None:
    tokenizer = AutoTokenizer.from_pretrained(small.model)
    tokenizer.chat_template = AutoTokenizer.from_pretrained(recipes_folder() / "chatml").chat_template
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Who are you?"},
        {"role": "assistant", "content": "A model."},
        {"role": "user", "content": "Good."},
        {"role": "assistant", "content": "Thanks."},
    ]
    rendered = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    learnt = [i for i, mask in zip(rendered["input_ids"], rendered["assistant_masks"], strict=True) if mask]
    assert tokenizer.decode(learnt) == "A model.<|im_end|>Thanks.<|im_end|>"
    assert tokenizer.decode(rendered["input_ids"]).startswith(
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user"
    )
    asked = tokenizer.apply_chat_template(messages[:2], tokenize=False, add_generation_prompt=True)
    assert asked.endswith("Who are you?<|im_end|>\n<|im_start|>assistant\n")
