"""The recipes for large models, run with a small one put in by command-line overrides, and counted at full size."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Trainer,
)

import hf_galore
from hf_galore import GaLoreConfig
from hf_galore.cli.main import main
from hf_galore.integrations.target_modules import find_targets
from hf_galore.plan.cards import parse_size
from hf_galore.plan.needs import needed_at_a_guess
from hf_galore.plan.planner import GIB, MemoryPlan
from hf_galore.plan.processes import RankPlan, rank_plan
from hf_galore.plan.rehearsal import Record
from hf_galore.recipes import any_recipe, planning, run_record, stand_in
from hf_galore.recipes.checks import galore_config
from hf_galore.recipes.embedded_model import CACHE_VARIABLE, Embedded
from hf_galore.recipes.folders import configs_folder, known_models, known_recipes, recipes_folder
from hf_galore.recipes.kinds import command_of
from hf_galore.recipes.planning import plan_recipe
from tests.support.commands import options
from tests.support.pages import recipe_rows, rows_of_several_cards
from tests.support.releases import needs_fused_head

LLAMA2 = recipes_folder() / "llama2_7b_oasst2.yaml"
RECIPES = known_recipes()  # in whatever folder


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
    # The embedding's moments have 8 bits, as in the published 8-bit optimizer that the guide used.
    guides = GaLoreConfig(rank=1024, update_proj_gap=200, scale=2, embedding_bits=8)
    # Which changes nothing without clipping and accumulation, as in the guide.
    assert GaLoreConfig.from_optim_args(found["optim_args"]) == dataclasses.replace(guides, gradient_bits=8)
    assert found["max_grad_norm"] == 0
    assert "gradient_accumulation_steps" not in found


def test_llama2_trains_with_overrides_only(small: Embedded, tmp_path: Path) -> None:
    out = tmp_path / "out"
    smaller = {"model_name_or_path": small.model, "dataset_name": small.data, "per_device_train_batch_size": 2}
    smaller |= {"optim_args": "rank=16, update_proj_gap=2, scale=2", "learning_rate": 1e-3, "max_steps": 4}
    on_cpu = {"dtype": "float32", "bf16": "false", "use_cpu": "true"}
    often = {"eval_steps": 2, "save_steps": 2, "output_dir": out, "disable_tqdm": "true"}
    assert main(["sft", "--config", str(LLAMA2), *options(smaller | on_cpu | often)]) == 0

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


# ---- what the headers say of memory

# Of 8 columns beside each basis of Llama-2-7B.
NORM_PROBES = 14 / 1024
# Most that a recipe may take, and the card that its header names.
LIMITS = {"llama2_7b_oasst2.yaml": 18.5 + NORM_PROBES, "llama2_7b_oasst2_16gb.yaml": 14.4}


def planned(name: str, small: Embedded, *overrides: str) -> MemoryPlan:
    own = ["--model_name_or_path", str(small.model)] if name == "quickstart.yaml" else []
    return planned_once(name, *own, *overrides)


@functools.cache
def planned_once(name: str, *overrides: str) -> MemoryPlan:
    """Of a model of 7B a plan takes longer than most tests, and several look at the same."""
    return plan_recipe(recipes_folder() / name, overrides=overrides)


def test_the_quickstarts_recipe_is_planned_with_the_model_that_it_makes(
    small: Embedded, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(small.model.parents[1]))
    found = plan_recipe(recipes_folder() / "quickstart.yaml")
    assert found.phase_peaks == planned("quickstart.yaml", small).phase_peaks


# Of GLUE's tasks these differ in what memory depends on: the batch, and classes or a number.
GLUE = {"glue/roberta_base_mrpc.yaml", "glue/roberta_base_cola.yaml", "glue/roberta_base_stsb.yaml"}


@needs_fused_head
@pytest.mark.parametrize(
    "name",
    [
        name
        for name in RECIPES
        if (not name.startswith("glue/") or name in GLUE) and name not in rows_of_several_cards()
    ],
)
def test_a_recipe_takes_the_memory_that_its_header_says(name: str, small: Embedded) -> None:
    text = (recipes_folder() / name).read_text(encoding="utf-8")
    said = re.findall(r"^# .*hf-galore plan .*# peak: (\d+\.\d+) GiB$", text, flags=re.MULTILINE)
    assert len(said) == 1, "the header has a command that plans the recipe, and the peak that it gives"
    found = planned(name, small)
    assert found.peak_bytes / GIB == pytest.approx(float(said[0]), rel=0.01)
    assert found.peak_bytes <= LIMITS.get(name, math.inf) * GIB
    if name != "quickstart.yaml":
        card = re.search(r"on\s+(?:# )?one (\d+) GB card", text)
        assert card is not None
        assert f"--vram {card[1]}GB " in text
        assert found.expandable
        assert found.needed_bytes <= parse_size(f"{card[1]}GB")  # less than the card is sold with
        assert found.tokens_per_step == tokens_per_step(name)
        assert found.breakdown["parameters"] > GIB / 16
        assert found.breakdown["moments"] > GIB / 16
        # The row of docs/recipes.md.
        rows = recipe_rows()
        row = rows.get(name, rows["glue/roberta_base_mrpc.yaml"])  # which is that of the other tasks, too
        assert name in rows or name.startswith("glue/")
        assert (row.card, row.tokens) == (f"{card[1]} GB", f"{tokens_per_step(name):,}")
        assert float(row.peak) == pytest.approx(found.peak_bytes / GIB, rel=0.01)
        assert float(row.needs) == pytest.approx(found.needed_bytes / GIB, rel=0.01)


@pytest.mark.parametrize("name", [name for name in RECIPES if name.startswith("glue/") and name not in GLUE])
def test_a_task_of_glue_takes_what_mrpc_takes(name: str) -> None:
    """What it differs in takes no memory: it is not planned again."""
    found, mrpc = (settings(recipes_folder() / one) for one in (name, "glue/roberta_base_mrpc.yaml"))
    differing = {key for key in mrpc if found[key] != mrpc[key]}
    assert differing <= {"task_name", "learning_rate", "output_dir"}
    assert "--vram 8GB # peak: 5.98 GiB\n" in (recipes_folder() / name).read_text(encoding="utf-8")


def of_a_rank(name: str, layers: int) -> tuple[RankPlan, int]:
    """What a rank of a recipe for several cards has and its tokens a step, with so many layers."""
    found: list[RankPlan] = []

    def look(trainer: Trainer, record: Record) -> None:
        found.append(rank_plan(trainer, record, 8, sharded=True))

    planned = plan_recipe(recipes_folder() / name, layers=layers, look=look)
    return found[0], int(planned.tokens_per_step or 0)


@needs_fused_head
@pytest.mark.parametrize("name", rows_of_several_cards())
def test_a_recipe_for_several_cards_takes_of_each_what_its_header_says(name: str) -> None:
    """Of the 80 layers each adds the same: a few tell."""
    (few, tokens), (more, _) = (of_a_rank(name, layers) for layers in (2, 6))
    layers = AutoConfig.from_pretrained(
        configs_folder() / str(model_of(settings(recipes_folder() / name)))
    ).num_hidden_layers
    total = few.memory.total + (layers - 2) * (more.memory.total - few.memory.total) / 4
    text, row = (recipes_folder() / name).read_text(encoding="utf-8"), rows_of_several_cards()[name]
    said = re.search(r"--num_processes 8 --sharded --vram (\d+)GB # peak: (\d+\.\d+) GiB$", text, flags=re.MULTILINE)
    assert said is not None
    assert total / GIB == pytest.approx(float(said[2]), rel=0.01)
    needed = needed_at_a_guess(int(total), expandable=True)
    assert needed <= parse_size(f"{said[1]}GB")
    assert (row.card, row.tokens, row.peak) == (f"8 × {said[1]} GB", f"{8 * tokens:,}", said[2])
    assert float(row.needs) == pytest.approx(needed / GIB, rel=0.01)


def tokens_per_step(name: str) -> int:
    """In the guide's runs and those like them; in the paper's pretraining; in its fine-tuning and of pairs, at most."""
    if name.startswith("pretrain/"):
        return 512 * 256
    if name.startswith("glue/"):
        return (32 if "cola" in name else 16) * 512
    if name.startswith("dpo/"):
        return 16 * 2 * 1024
    return 4096


@needs_fused_head
@pytest.mark.parametrize(
    ("overrides", "most"),
    [
        ([], 18.5 + NORM_PROBES),
        (["--max_grad_norm", "1"], 19.3),  # the Trainer's default
        (["--gradient_accumulation_steps", "4", "--per_device_train_batch_size", "4"], 19.4),
        (["--gradient_accumulation_steps", "4"], 20.6),  # four times as many tokens
    ],
    ids=["as it is", "clipped", "accumulated in parts", "accumulated"],
)
def test_llama2_fits_a_24_gb_card_every_way(overrides: list[str], most: float, small: Embedded) -> None:
    found = planned(LLAMA2.name, small, *overrides)
    assert found.peak_bytes <= most * GIB
    assert found.needed_bytes <= parse_size("24GB") < parse_size("4090") < parse_size("3090")


# What an H200 was measured with: low-rank gradients were held in 16 bits then, and there were no norm probes.
MEASURED_WITH = ["--optim_args", "rank=1024, update_proj_gap=200, scale=2, embedding_bits=8, norm_probes=0"]


@needs_fused_head
@pytest.mark.parametrize(
    ("overrides", "reserved"),
    [
        ([], 18.69),
        (["--max_grad_norm", "1"], 21.08),
        (["--gradient_accumulation_steps", "4", "--per_device_train_batch_size", "4"], 21.10),
        (["--gradient_accumulation_steps", "4"], 22.38),
    ],
    ids=["as it is", "clipped", "accumulated in parts", "accumulated"],
)
def test_the_allocators_share_is_what_a_card_had(overrides: list[str], reserved: float, small: Embedded) -> None:
    """Beside what torch's allocator was seen to reserve on an H200, in GiB: docs/cards.md."""
    found = planned(LLAMA2.name, small, *MEASURED_WITH, *overrides)
    # The work spaces of that card are larger by 48 MiB than what a plan counts.
    assert found.expandable_bytes / GIB + 48 / 1024 == pytest.approx(reserved, rel=0.01)
    if not overrides:
        # Where nothing was evaluated, which by the model spares 0.25.
        assert found.segmented_bytes / GIB + 48 / 1024 == pytest.approx(19.25 + 0.25, rel=0.01)


@needs_fused_head
@pytest.mark.parametrize(
    ("optim", "expected"),
    [("adamw_torch", 50.6), ("adamw_bnb_8bit", 38.3), ("galore_adamw_8bit_layerwise", 20.45)],
)
def test_plans_of_others_agree_with_what_was_found_before(
    optim: str, expected: float, small: Embedded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In GiB, for Llama-2-7B at batch 16 × 256 and, of the published GaLore, rank 1024."""
    hf_galore.unregister()
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)  # which the published one calls wherever it is
    # Read again by our own parser, which knows more options than theirs: they are given theirs only.
    monkeypatch.setattr(stand_in, "galore_config", lambda training: None)
    monkeypatch.setattr(run_record, "register", lambda: None)
    monkeypatch.setattr(planning, "registered", contextlib.nullcontext)
    try:
        found = planned(LLAMA2.name, small, "--optim", optim, "--optim_args", "rank=1024, update_proj_gap=200, scale=2")
    finally:
        hf_galore.register()
    assert found.peak_bytes / GIB == pytest.approx(expected, rel=0.02)


def test_every_models_config_is_here() -> None:
    """So that a recipe can be planned without the Hub, and before its licence is accepted."""
    wanted = {model_of(settings(recipes_folder() / name)) for name in RECIPES} - {None}
    assert wanted <= set(known_models()) == set(PARAMETERS)
    for name, parameters in PARAMETERS.items():
        config = AutoConfig.from_pretrained(configs_folder() / name)
        with torch.device("meta"):
            model = (AutoModelForMaskedLM if "roberta" in name else AutoModelForCausalLM).from_config(config)
        assert sum(param.numel() for param in model.parameters()) == parameters, name


# As published, in the models' safetensors.
PARAMETERS = {
    "meta-llama/Llama-2-7b-hf": 6_738_415_616,
    "meta-llama/Meta-Llama-3-8B": 8_030_261_248,
    "meta-llama/Meta-Llama-3-70B": 70_553_706_496,
    "mistralai/Mistral-7B-v0.3": 7_248_023_552,
    "Qwen/Qwen3-30B-A3B-Base": 30_532_122_624,
    "Qwen/Qwen3-8B-Base": 8_190_735_360,
    "Qwen/Qwen3-14B-Base": 14_768_307_200,
    **dict.fromkeys(("Qwen/Qwen3-4B", "Qwen/Qwen3-4B-Base"), 4_022_468_096),
    **dict.fromkeys(("Qwen/Qwen3-1.7B", "Qwen/Qwen3-1.7B-Base"), 1_720_574_976),
    **dict.fromkeys(("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B-Base"), 596_049_920),
    # With the masked language model's head, whose matrix is the embedding.
    "FacebookAI/roberta-base": 124_697_433,
    # As GaLore's, with T5's 32,100 tokens for 32,000: 200 rows more.
    "llama_60m": 58_073_600 + 200 * 512,
    "llama_130m": 134_105_856 + 200 * 768,
    "llama_350m": 367_969_280 + 200 * 1024,
    "llama_1b": 1_339_082_752 + 200 * 2048,
    "llama_7b": 6_738_415_616 + 200 * 4096,
}


def model_of(recipe: dict[str, Any]) -> str | None:
    """The model that a recipe trains, or the config of one that it makes."""
    name: str | None = recipe.get("model_name_or_path", recipe.get("config_name"))
    return name


# ---- what every recipe has to hold to


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_right(name: str, small: Embedded) -> None:
    """Its keys and values, its optim_args, its targets in its model; the commands and the folder that it names."""
    path = recipes_folder() / name
    text = path.read_text(encoding="utf-8")
    recipe = settings(path)
    own = ["--model_name_or_path", str(small.model)] if name == "quickstart.yaml" else []
    parsed = any_recipe.parse(["--config", str(path), *own], "", "")  # raises where something is wrong
    command = command_of(path)
    assert path.parent.name == {"pretrain": "pretrain", "glue": "glue", "dpo": "dpo"}.get(
        command, recipes_folder().name
    )
    commands = re.findall(r"^#   (hf-galore .*?)(?: +# .*)?$", text, flags=re.MULTILINE)
    assert commands, "the header has the command that runs it"
    if name in rows_of_several_cards():
        launched = re.search(
            r"^#   accelerate launch .*--num_processes 8 \\\n# +-m hf_galore (\w+) --config (\S+)$", text, re.M
        )
        assert launched is not None
        assert launched.groups() == (command, name)
    else:
        assert any(line.startswith(f"hf-galore {command}") for line in commands)
    for line in commands:
        for word in (word for word in shlex.split(line) if word.endswith(".yaml")):
            assert (recipes_folder() / word).is_file(), line
    assert path.stem.startswith(recipe["output_dir"].replace("-", "_")) or name == "quickstart.yaml"
    config = galore_config(parsed.training)
    if config is None:
        assert not {"optim_args", "optim_target_modules"} & set(recipe), "they are GaLore's"
        return
    shapes = AutoConfig.from_pretrained(small.model if own else configs_folder() / str(model_of(recipe)))
    auto = AutoModelForSequenceClassification if command == "glue" else AutoModelForCausalLM
    with torch.device("meta"):
        model = auto.from_config(shapes)
    targets = find_targets(model, parsed.training.optim_target_modules, config)  # each entry matches something
    # Of few heads for keys and values, and of routers, which are no larger than the rank.
    small_ones = {name.removesuffix(".weight").rpartition(".")[2] for name in targets.too_small}
    assert small_ones <= {"k_proj", "v_proj", "gate"}
    elements = sum(weight.numel() for weight in targets.projected.values())
    assert elements > 0.4 * sum(param.numel() for param in model.parameters())


def test_no_recipe_is_nearly_another() -> None:
    """Of two for one model and one task at least three settings differ: fewer are for the command line.

    Weights in 8 bits make another model of it: each is for a card of its own.
    """

    def of(recipe: dict[str, Any]) -> tuple[Any, ...]:
        return model_of(recipe), recipe.get("task_name"), recipe.get("weight_bits")

    every = {name: settings(recipes_folder() / name) for name in RECIPES}
    for (first, one), (second, other) in itertools.combinations(every.items(), 2):
        if of(one) == of(other):
            differing = {key for key in {*one, *other} if one.get(key) != other.get(key)} - {"output_dir"}
            assert len(differing) >= 3, f"{first} and {second} differ in {differing} only"


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
