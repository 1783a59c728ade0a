"""The plugin beside the real axolotl: its configuration, its trainer, its command; on a CPU, with a tiny model.

What trains runs in one process of its own (`tests.support.axolotl_script`), for axolotl patches transformers for good.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hf_galore.plan.planner import GIB
from hf_galore.recipes.folders import recipes_folder
from tests.support.helpers import VOCABULARY, tiny_llama

pytest.importorskip("axolotl", reason="axolotl is not installed: tests/compat/axolotl.txt says how")

ROOT = Path(__file__).parents[2]
PLUGIN = "hf_galore.axolotl.GaLorePlugin"
LAYERWISE = {"optimizer": "galore_adamw_layerwise", "max_grad_norm": 0.0}
EIGHT_BIT = {"optimizer": "galore_adamw_8bit_layerwise"}
ADAMW = {"plugins": None, "optimizer": "adamw_torch", "optim_args": None, "optim_target_modules": None}

RECIPES = sorted(path.name for path in (recipes_folder() / "axolotl").glob("*.yaml"))

WIDE = 4096  # a vocabulary with which the logits are what most is needed for

Config = dict[str, Any]

# What is refused before anything is loaded, and what the message says.
REFUSED: dict[str, tuple[Config, str]] = {
    "another optimizer": ({"optimizer": "adamw_torch"}, "none of its own: galore_adamw"),
    "axolotl's Q-GaLore": ({"optimizer": "q_galore_adamw8bit"}, "none of its own"),
    "a misspelt optimizer": ({"optimizer": "galore_adamw_8bits"}, "Did you mean 'galore_adamw_8bit'?"),
    "no optimizer": ({"optimizer": None}, "no optimizer, for which axolotl takes adamw_torch_fused"),
    "the Trainer's key": ({"optim": "galore_adamw"}, "Its key is optimizer"),
    "a misspelt key": ({"optim_arg": {"rank": 8}}, "Its key is optim_args"),
    "an option beside": ({"rank": 8}, "Put it below optim_args"),
    "galore_rank": ({"galore_rank": 8}, "GaLore's options go below optim_args"),
    "qgalore_rank": ({"qgalore_rank": 8}, "would be ignored"),
    "no targets": ({"optim_target_modules": None}, "needs optim_target_modules"),
    "an unknown option": ({"optim_args": {"rnk": 8}}, "Did you mean 'rank'?"),
    "a text of options": ({"optim_args": "rank=8 scale=2"}, "GaLore's rank has to be an integer"),
    "FSDP": ({"fsdp_version": 2, "fsdp_config": {"reshard_after_forward": True}}, "does not work with fsdp_config"),
    "LoRA": ({"adapter": "lora", "lora_r": 8, "lora_alpha": 16, "lora_target_linear": True}, "adapter is 'lora'"),
    "fp16": ({**LAYERWISE, "fp16": True, "bf16": None}, "does not work with fp16"),
    "Adafactor's beta": ({"optimizer": "galore_adafactor", "adam_beta1": 0.8}, "no use for adam_beta1"),
}

# What trains otherwise than by default, and still as asked.
RATES: dict[str, tuple[Config, dict[float, int]]] = {
    "embedding_lr": ({"embedding_lr": 0.002}, {0.01: 19, 0.002: 2}),
    "embedding_lr_scale": ({"embedding_lr_scale": 0.5, **EIGHT_BIT}, {0.01: 19, 0.005: 2}),
    "lr_groups": (
        {"lr_groups": [{"name": "o", "modules": ["o_proj"], "lr": 0.003}], **LAYERWISE},
        {0.01: 19, 0.003: 2},
    ),
}

PLANNED: dict[str, Config] = {
    "plain": {},
    "layerwise, 8 bits": EIGHT_BIT,
    "evaluated, accumulated": {**LAYERWISE, "val_set_size": 0.2, "gradient_accumulation_steps": 2},
    "packed": {"sample_packing": True, "pad_to_sequence_len": True, "attn_implementation": "sdpa"},
    "AdamW": ADAMW,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a model in `model`, and texts in `data.jsonl`."""
    found = tmp_path_factory.mktemp("axolotl")
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i + 3 for i in range(VOCABULARY - 3)}}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    tokenizer.save_pretrained(found / "model")
    tiny_llama().save_pretrained(found / "model")
    tiny_llama(vocab_size=WIDE, architectures=["LlamaForCausalLM"]).config.save_pretrained(found / "wide")
    texts = (" ".join(f"w{(7 * i + j) % (VOCABULARY - 3)}" for j in range(14)) for i in range(64))
    (found / "data.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts), "utf-8")
    return found


def config_in(folder: Path, name: str, overrides: Config) -> Config:
    """A configuration that trains in seconds; what is `None` is left out."""
    config: Config = {
        "base_model": str(folder / "model"),
        "plugins": [PLUGIN],
        "datasets": [{"path": str(folder / "data.jsonl"), "ds_type": "json", "type": "completion"}],
        "dataset_prepared_path": str(folder / "prepared"),
        "val_set_size": 0,
        "sequence_len": 32,
        "micro_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "max_steps": 4,
        "learning_rate": 0.01,
        "lr_scheduler": "constant",
        "optimizer": "galore_adamw",
        "optim_target_modules": ["attn", "mlp"],
        "optim_args": {"rank": 16, "update_proj_gap": 3, "scale": 0.5},
        "bf16": False,
        "fp16": False,
        "attn_implementation": "eager",
        "gradient_checkpointing": True,
        "dataloader_pin_memory": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "seed": 42,
        "output_dir": str(folder / name.replace(" ", "_")),
    }
    return {key: value for key, value in {**config, **overrides}.items() if value is not None}


def environment() -> dict[str, str]:
    """Without a network, and without axolotl's telling its makers."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    quiet = {"AXOLOTL_DO_NOT_TRACK": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return {**os.environ, **quiet, "PYTHONPATH": path}


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[str, Config]:
    """What came of all that is run in the one process."""
    jobs = [("refused: " + name, "check", config) for name, (config, _) in REFUSED.items()]
    jobs += [("accepted", "check", {}), ("parts", "parts", {})]
    # axolotl keeps the plugin for the process: a configuration without it is not checked by it, nor registered.
    jobs += [("another's", "check", {**ADAMW, "plugins": ["axolotl.integrations.base.BasePlugin"]})]
    jobs += [("moved", "check_where_transformers_has_moved", {})]
    saved = {"save_strategy": "steps", "save_steps": 2, **EIGHT_BIT}
    jobs += [
        ("AdamW", "run_beside_the_trainer", ADAMW),
        ("plain", "run_beside_the_trainer", {}),
        ("layerwise", "run_beside_the_trainer", LAYERWISE),
        ("accumulated", "run_beside_the_trainer", {**EIGHT_BIT, "gradient_accumulation_steps": 2}),
        ("whole", "run", saved),
        ("resumed", "resume", {**saved, "resume_from_checkpoint": str(folder / "whole" / "checkpoint-2")}),
        ("all linear", "run", {"optim_target_modules": "all_linear", "optim_args": "rank=16, scale=0.5"}),
        ("another's trainer", "run", {"trainer_cls": "tests.support.axolotl_script.OwnOptimizerTrainer"}),
        ("another's optimizer", "run", {"trainer_cls": "tests.support.axolotl_script.GivenOptimizerTrainer"}),
    ]
    jobs += [(name, "run", config) for name, (config, _) in RATES.items()]
    for name, config in PLANNED.items():
        jobs += [(f"measured: {name}", "measure", config), (f"planned: {name}", "plan", config)]
    # The last, since Liger replaces the model's forward pass for good.
    plugins = [PLUGIN, "axolotl.integrations.liger.LigerPlugin"]
    wide = {"base_model": str(folder / "wide")}
    jobs += [("planned: wide", "plan", wide)]
    fused = {"plugins": plugins, "liger_fused_linear_cross_entropy": True}
    jobs += [("planned: wide, Liger's loss", "plan", {**wide, **fused})]
    written = [{"name": name, "do": do, "config": config_in(folder, name, config)} for name, do, config in jobs]
    (folder / "jobs.json").write_text(json.dumps(written), "utf-8")
    command = [sys.executable, "-m", "tests.support.axolotl_script", str(folder)]
    ran = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout[-5000:] + ran.stderr[-5000:]
    found: dict[str, Config] = json.loads((folder / "results.json").read_text("utf-8"))
    return found


def without_error(result: Config) -> Config:
    assert "error" not in result, result
    return result


# ---- it trains


@pytest.mark.parametrize(
    ("name", "kind"),
    [("plain", "GaLoreAdamW"), ("layerwise", "GaLoreAdamW"), ("accumulated", "GaLoreAdamW8bit"), ("AdamW", "AdamW")],
)
def test_it_ends_with_the_weights_of_transformers_trainer(results: dict[str, Config], name: str, kind: str) -> None:
    """Bit for bit; AdamW says that both are given the same."""
    found = without_error(results[name])
    assert found["differing"] == []
    assert found["optimizer"] == kind
    if name != "AdamW":
        assert found["targets"] == 14
        assert found["callbacks"].count("GaLoreCallback") == 1
        assert found["logs"][0]["galore/targets"] == 14
    losses = [entry["loss"] for entry in found["logs"]]
    assert len(losses) == 4
    assert losses[-1] < losses[0]
    assert all(float(entry["grad_norm"]) > 0 for entry in found["logs"])


def test_it_does_something_else_than_adamw(results: dict[str, Config], folder: Path) -> None:
    galore, adamw = (load_file(folder / name / "model.safetensors") for name in ("plain", "AdamW"))
    assert results["AdamW"]["targets"] == 0
    assert not torch.equal(galore["model.layers.0.mlp.up_proj.weight"], adamw["model.layers.0.mlp.up_proj.weight"])


def test_a_resumed_run_ends_as_a_whole_one(results: dict[str, Config], folder: Path) -> None:
    assert without_error(results["whole"])["optimizer"] == "GaLoreAdamW8bit"
    logs = without_error(results["resumed"])["logs"]
    assert logs[0]["from_checkpoint"] == 1
    assert len(logs) == 4
    whole, resumed = (load_file(folder / name / "model.safetensors") for name in ("whole", "resumed"))
    start = load_file(folder / "model" / "model.safetensors")
    assert {name for name in whole if not torch.equal(whole[name], resumed[name])} == set()
    assert not any(torch.equal(whole[name], start[name]) for name in whole if "proj" in name)


def test_all_linear_is_axolotls_word_for_it(results: dict[str, Config]) -> None:
    assert without_error(results["all linear"])["targets"] == 14


@pytest.mark.parametrize("name", RATES)
def test_rates_of_parts_of_the_model_are_as_asked(results: dict[str, Config], name: str) -> None:
    """How many parameters have which learning rate; and all 14 are projected still."""
    found = without_error(results[name])
    rates: dict[float, int] = {}
    for group in found["groups"]:
        rates[group["initial_lr"]] = rates.get(group["initial_lr"], 0) + group["parameters"]
    assert rates == RATES[name][1]
    assert found["targets"] == sum(group["parameters"] for group in found["groups"] if group["rank"] == 16) == 14


# ---- it refuses, and ends a run


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_train_otherwise_is_refused(results: dict[str, Config], name: str) -> None:
    found = results[f"refused: {name}"]
    assert found.get("error") == "ValidationError", found
    assert REFUSED[name][1] in found["message"]


def test_what_plans_need_of_axolotl_is_there(results: dict[str, Config]) -> None:
    assert results["parts"] == {"moved": []}


def test_a_configuration_that_is_right_is_registered(results: dict[str, Config]) -> None:
    assert results["accepted"] == {"registered": True}


def test_a_configuration_without_it_is_left_alone(results: dict[str, Config]) -> None:
    """Though it has AdamW, and the process had the plugin before."""
    assert results["another's"] == {"registered": False}


def test_where_it_cannot_register_the_run_ends(results: dict[str, Config]) -> None:
    assert results["moved"]["error"] == "ImportError"
    assert "Trainer.log is gone" in results["moved"]["message"]


def test_a_trainer_with_another_optimizer_ends_the_run(results: dict[str, Config]) -> None:
    found = results["another's trainer"]
    assert found["error"] == "ValueError"
    assert "optim='galore_adamw' was asked for, but OwnOptimizerTrainer.create_optimizer has made" in found["message"]
    found = results["another's optimizer"]
    assert found["error"] == "RuntimeError"
    assert "asks for galore_adamw by hf_galore.axolotl.GaLorePlugin, but the trainer's is AdamW." in found["message"]


# ---- its command


@pytest.mark.parametrize("name", PLANNED)
def test_a_plan_is_what_its_trainer_takes(results: dict[str, Config], name: str) -> None:
    """To the byte, and in each phase; but an evaluation, of which a plan has some granules of 512 bytes more."""
    planned, measured = (without_error(results[f"{kind}: {name}"]) for kind in ("planned", "measured"))
    evaluations = [found["phase_peaks"].pop("evaluation", 0) for found in (planned, measured)]
    assert evaluations[0] == pytest.approx(evaluations[1], abs=8 * 512)
    assert bool(evaluations[1]) == (name == "evaluated, accumulated")
    assert planned["phase_peaks"] == measured["phase_peaks"]
    assert planned["breakdown"] == measured["breakdown"]
    assert planned["expandable_bytes"] == measured["expandable_bytes"]


def test_ligers_fused_loss_can_be_planned(results: dict[str, Config]) -> None:
    """It has no logits, but the head's gradient, in the forward pass. What it takes on a card is not measured."""
    fused, usual = (without_error(results[f"planned: wide{which}"]) for which in (", Liger's loss", ""))
    logits, head = 4 * 64 * WIDE * 4, WIDE * 64 * 4  # four rows, padded to 64 tokens
    assert fused["peak_bytes"] <= usual["peak_bytes"] - logits
    assert fused["phase_peaks"]["forward"] >= fused["resident_bytes"] + head
    assert fused["notes"][0].startswith("The tokenizer of ")  # there is a config in the folder, and nothing else


def axolotl(*words: str) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name("axolotl")), *words]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_the_commands_of_axolotl(folder: Path, tmp_path: Path) -> None:
    """`axolotl train` trains, and ends where something is refused; `axolotl galore-plan` is there and plans."""
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config_in(folder, "by command", EIGHT_BIT)), "utf-8")
    ran = axolotl("train", str(file), "--launcher", "python")
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert "galore/captured_energy_median" in ran.stdout + ran.stderr
    ran = axolotl("train", str(file), "--launcher", "python", "--optimizer", "adamw_torch")
    assert ran.returncode == 1
    assert "optimizer is 'adamw_torch', which is none of its own" in ran.stderr

    planned = axolotl("galore-plan", str(file), "--vram", "24GB", "--json", str(tmp_path / "plan.json"))
    assert planned.returncode == 0, planned.stderr[-3000:]
    found = json.loads((tmp_path / "plan.json").read_text("utf-8"))
    assert found["fits"]
    assert found["tokens_per_step"] == 4 * 32
    assert f"{file} fits: it needs" in planned.stdout
    refused = axolotl("galore-plan", str(file), "--json", str(tmp_path / "none" / "plan.json"))
    assert refused.returncode == 2
    assert "there is no folder" in refused.stderr
    refused = axolotl("galore-plan", str(file), "--rl", "dpo")
    assert refused.returncode == 2
    assert "axolotl galore-plan: rl: dpo cannot be planned" in refused.stderr
    refused = axolotl("galore-plan", str(file), "--optimizer", "adamw_torch")
    assert refused.returncode == 2
    assert refused.stderr.splitlines()[-1].startswith("axolotl galore-plan: The configuration names the plugin")


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_trains_two_steps(name: str, tmp_path: Path) -> None:
    """As it stands, but for a model, data and sizes of a test, and for what is of a GPU: bf16 and flash attention."""
    marks = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    words = ["<pad>", *marks, "user", "assistant", "one", "two", "three"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=marks[0], eos_token=marks[1], additional_special_tokens=marks[2:]
    ).save_pretrained(tmp_path / "model")
    model = tiny_llama()
    model.save_pretrained(tmp_path / "model")
    talk = [{"role": "user", "content": "one two"}, {"role": "assistant", "content": "three two one"}]
    (tmp_path / "talks.jsonl").write_text("\n".join([json.dumps({"messages": talk})] * 64), "utf-8")
    data = [{"path": str(tmp_path / "talks.jsonl"), "ds_type": "json", "type": "chat_template"}]
    recipe = yaml.safe_load((recipes_folder() / "axolotl" / name).read_text("utf-8"))
    optim_args = {**recipe["optim_args"], "rank": 16}
    of_a_test = {"base_model": str(tmp_path / "model"), "datasets": data, "test_datasets": data, "max_steps": 2}
    of_a_cpu = {"bf16": False, "attn_implementation": "sdpa", "dataloader_pin_memory": False}
    folders = {"output_dir": str(tmp_path / "out"), "dataset_prepared_path": str(tmp_path / "prepared")}
    written = {**recipe, **of_a_test, **of_a_cpu, **folders, "sequence_len": 64, "optim_args": optim_args}
    (tmp_path / name).write_text(yaml.safe_dump(written), "utf-8")
    ran = axolotl("train", str(tmp_path / name), "--launcher", "python")
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
    state = json.loads((tmp_path / "out" / "checkpoint-2" / "trainer_state.json").read_text("utf-8"))
    assert state["global_step"] == 2
    assert any(entry.get("galore/targets") == 16 for entry in state["log_history"])  # with the embedding and the head
    before, after = (
        load_file(tmp_path / "model" / "model.safetensors"),
        load_file(tmp_path / "out" / "model.safetensors"),
    )
    assert all((after[key] != before[key]).any() for key in before)


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_takes_the_memory_that_its_header_says(name: str, tmp_path: Path) -> None:
    file = recipes_folder() / "axolotl" / name
    (command,) = (line for line in file.read_text("utf-8").splitlines() if "axolotl galore-plan" in line)
    said = float(command.rpartition("peak: ")[2].removesuffix(" GiB"))
    planned = axolotl("galore-plan", str(file), "--vram", "24GB", "--json", str(tmp_path / "plan.json"))
    assert planned.returncode == 0, planned.stderr[-3000:]
    found = json.loads((tmp_path / "plan.json").read_text("utf-8"))
    assert found["peak_bytes"] / GIB == pytest.approx(said, rel=0.01)
    assert found["fits"]
    assert "--vram 24GB" in command
