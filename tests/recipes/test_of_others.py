"""Configurations of other programs in recipes/: what can be said of them where those are not installed."""

from __future__ import annotations

import re

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from hf_galore import GaLoreConfig
from hf_galore.integrations.target_modules import find_targets
from hf_galore.optim.build import KINDS
from hf_galore.recipes.folders import OF_OTHERS, configs_folder, known_recipes, recipes_folder


@pytest.mark.parametrize("folder", OF_OTHERS)
def test_they_are_no_recipes_of_ours(folder: str) -> None:
    assert list((recipes_folder() / folder).glob("*.yaml"))
    assert [name for name in known_recipes() if name.startswith(f"{folder}/")] == []


def test_llamafactorys_projects_what_its_header_says() -> None:
    text = (recipes_folder() / "llamafactory" / "llama3_8b_alpaca.yaml").read_text("utf-8")
    settings = yaml.safe_load(text)
    assert settings["optim"] in KINDS
    config = AutoConfig.from_pretrained(configs_folder() / "meta-llama" / "Meta-Llama-3-8B")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    options = GaLoreConfig.from_optim_args(settings["optim_args"])
    found = find_targets(model, settings["optim_target_modules"], options)
    assert re.findall(r"GaLore projects (\d+) matrices", text) == [str(len(found.projected))]
