"""Which model is meant by a run's folder, what is said where there is none, and that it is the one that was saved."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from hf_galore.errors import UserError
from hf_galore.recipes.embedded_model import Embedded
from hf_galore.recipes.saved_model import Saved, find_saved, load


def save(small: Embedded, folder: Path, *, when: int = 0) -> Path:
    """A model in a folder, saved at a time."""
    shutil.copytree(small.model, folder, dirs_exist_ok=True)
    os.utime(folder / "model.safetensors", (when, when))
    return folder


def cut_off(folder: Path) -> None:
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(1000)


def test_a_finished_runs_model(small: Embedded, tmp_path: Path) -> None:
    run = save(small, tmp_path / "out", when=9)
    save(small, run / "checkpoint-4", when=5)
    assert find_saved(run) == Saved(run, adapter=False)
    assert find_saved(run, "latest").folder == find_saved(run, "4").folder == run / "checkpoint-4"
    assert find_saved(run / "checkpoint-4").folder == run / "checkpoint-4"


def test_a_run_that_was_resumed_and_has_not_ended(small: Embedded, tmp_path: Path) -> None:
    run = save(small, tmp_path / "out", when=9)
    save(small, run / "checkpoint-8", when=20)
    assert find_saved(run).remark == "checkpoint-8 in it is newer: --checkpoint latest loads that"


def test_of_a_run_that_has_not_ended_the_last_whole_checkpoint(small: Embedded, tmp_path: Path) -> None:
    run = tmp_path / "out"
    for step in (8, 16, 24):
        save(small, run / f"checkpoint-{step}")
    assert find_saved(run) == Saved(run / "checkpoint-24", adapter=False, remark="the run has not ended")
    cut_off(run / "checkpoint-24")
    found = find_saved(run)
    assert found.folder == run / "checkpoint-16"
    assert str(found.remark).startswith(
        "the run has not ended; checkpoint-24 is not whole: model.safetensors is cut off"
    )
    assert find_saved(run, "latest").folder == run / "checkpoint-16"
    with pytest.raises(UserError, match=r"checkpoint-24 cannot be loaded: model\.safetensors is cut off"):
        find_saved(run, "24")


def test_a_model_that_was_cut_off_while_it_was_saved(small: Embedded, tmp_path: Path) -> None:
    run = save(small, tmp_path / "out")
    cut_off(run)
    with pytest.raises(UserError, match=r"the model in .* cannot be loaded: model\.safetensors is cut off"):
        find_saved(run)
    save(small, run / "checkpoint-8")
    found = find_saved(run)
    assert found.folder == run / "checkpoint-8"
    assert str(found.remark).startswith("the model beside it is not whole: model.safetensors is cut off")


def test_a_shard_that_is_missing(small: Embedded, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(small.model).save_pretrained(tmp_path, max_shard_size="4MB")
    assert find_saved(tmp_path).folder == tmp_path
    shard = sorted(tmp_path.glob("model-*-of-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(UserError, match=f"{shard.name} is missing"):
        find_saved(tmp_path)


def test_what_is_no_run(small: Embedded, tmp_path: Path) -> None:
    save(small, tmp_path / "galore")
    with pytest.raises(UserError, match=re.escape("there is no folder")) as error:
        find_saved(tmp_path / "galor")
    assert str(error.value).endswith("Did you mean 'galore'?")
    with pytest.raises(UserError, match=r"holds no model and no checkpoint.* There is one in .*galore\.$"):
        find_saved(tmp_path)
    with pytest.raises(UserError, match="is a file; give the folder of a run"):
        find_saved(tmp_path / "galore" / "config.json")
    with pytest.raises(UserError, match="holds no checkpoint; leave out --checkpoint"):
        find_saved(tmp_path / "galore", "8")
    save(small, tmp_path / "galore" / "checkpoint-8")
    with pytest.raises(UserError, match="holds no checkpoint 7, only checkpoint-8; or latest"):
        find_saved(tmp_path / "galore", "7")


def test_a_classifier_writes_no_text(small: Embedded, tmp_path: Path) -> None:
    save(small, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["LlamaForSequenceClassification"]}))
    with pytest.raises(UserError, match="holds a LlamaForSequenceClassification, which writes no text"):
        load(find_saved(tmp_path))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_is_loaded_as_it_was_saved(dtype: torch.dtype, small: Embedded, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(small.model, dtype=dtype)
    save(small, tmp_path)
    model.save_pretrained(tmp_path)
    loaded, tokenizer = load(find_saved(tmp_path), "cpu")
    assert loaded.dtype == dtype
    assert not loaded.training
    tokens = tokenizer("Who are you?", return_tensors="pt")
    assert torch.equal(loaded(**tokens).logits, model.eval()(**tokens).logits)


def test_an_adapter_is_loaded_over_its_model(small: Embedded, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(small.model)
    adapted = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    adapted.save_pretrained(str(tmp_path))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(small.model / name, tmp_path)
    saved = find_saved(tmp_path)
    assert saved.adapter
    loaded, tokenizer = load(saved, "cpu")
    tokens = tokenizer("Who are you?", return_tensors="pt")
    found = loaded(**tokens).logits
    assert torch.equal(found, adapted.eval()(**tokens).logits)
    assert not torch.allclose(found, AutoModelForCausalLM.from_pretrained(small.model)(**tokens).logits, atol=1e-2)
