"""What the plugin for axolotl refuses, without axolotl; `tests/beside/test_axolotl.py` has what needs it."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from hf_galore.integrations.axolotl_checks import check_config, joined
from hf_galore.recipes.folders import known_recipes, recipes_folder

PLUGIN = "hf_galore.axolotl.GaLorePlugin"
RIGHT: dict[str, Any] = {
    "plugins": [PLUGIN],
    "base_model": "some/model",
    "optimizer": "galore_adamw_8bit_layerwise",
    "optim_target_modules": ["attn", "mlp"],
    "optim_args": {"rank": 512, "scale": 2, "stagger": False},
    "bf16": True,
}
# Some of axolotl's keys, with their defaults.
KNOWN: dict[str, Any] = {
    **dict.fromkeys(
        ("plugins", "base_model", "optimizer", "optim_target_modules", "optim_args", "bf16", "fp16", "adapter")
    ),
    "qgalore_rank": 256,
}
RECIPES = sorted((recipes_folder() / "axolotl").glob("*.yaml"))


def checked(processes: int = 1, **changes: Any) -> None:
    config = {key: value for key, value in {**RIGHT, **changes}.items() if value is not None}
    check_config(config, KNOWN, processes)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"optim_target_modules": "all_linear", "optim_args": None},
        {"optim_args": "rank=512, scale=2"},
        {"optim_args": {"rank": 512, "scale": "auto", "rule": "muon"}},
        {"qgalore_rank": 256},  # as axolotl fills it in before it checks a second time
        {"dp_shard_size": 1, "tensor_parallel_size": 1, "fsdp": [], "fsdp_config": {}},
        {"fp16": True},  # which bf16: true is stronger than
        {"optimizer": "galore_adamw_8bit", "fp16": True, "bf16": False},
        {"embedding_lr": 1e-6, "some_other_plugins_key": 1},
    ],
)
def test_what_is_right_is_accepted(changes: dict[str, Any]) -> None:
    checked(**changes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"optimizer": None}, "for which axolotl takes adamw_torch_fused. Set optimizer to one of galore_adamw, "),
        ({"optimizer": "adamw_torch_8bit"}, "is 'adamw_torch_8bit', which is none of its own"),
        ({"optimizer": "galore_adamw8bit"}, "Did you mean 'galore_adamw_8bit'"),
        ({"optimizer": None, "optim": "galore_adamw"}, "no key 'optim', and would ignore it. Its key is optimizer"),
        ({"optim_target_module": ["attn"]}, "Its key is optim_target_modules"),
        ({"update_proj_gap": 100}, "update_proj_gap is an option of GaLore, and axolotl ignores it here"),
        ({"galore_scale": 2}, "axolotl has no key 'galore_scale'"),
        ({"qgalore_rank": 128}, "qgalore_rank is for optimizer: q_galore_adamw8bit, and would be ignored"),
        ({"optim_target_modules": []}, "needs optim_target_modules"),
        ({"optim_args": {"ranks": 8}}, "Did you mean 'rank'"),
        ({"optim_args": {"rank": 0}}, "rank has to be an integer of at least 1, but was given 0"),
        ({"optim_args": ["rank=8"]}, "optim_args has to be a mapping"),
        ({"deepspeed": "zero3.json"}, "does not work with deepspeed, which shards or splits"),
        ({"fsdp_config": {"reshard_after_forward": True}}, "does not work with fsdp_config"),
        ({"tensor_parallel_size": 2}, "does not work with tensor_parallel_size"),
        ({"adapter": "qlora"}, "but adapter is 'qlora'"),
        ({"load_in_4bit": True}, "quantized ones (load_in_4bit) cannot be trained"),
        ({"loraplus_lr_ratio": 16}, "loraplus_lr_ratio is for adapters"),
        ({"fp16": True, "bf16": "auto"}, "does not work with fp16"),
        ({"processes": 2}, "does not work with 2 processes"),
        (
            {"processes": 2, "optimizer": "galore_adamw", "optim_args": {"projected_backward": True}},
            "galore_adamw with projected_backward: true does not work with 2 processes",
        ),
        ({"optimizer": "galore_adafactor", "adam_epsilon": 1e-6}, "has no use for adam_epsilon=1e-06"),
    ],
)
def test_what_would_train_otherwise_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=r"[.?]$") as refused:
        checked(**changes)
    assert said in str(refused.value)


def test_several_processes_train_without_hooks() -> None:
    checked(processes=2, optimizer="galore_adamw_8bit")


def test_options_are_joined_as_axolotl_joins_them() -> None:
    assert joined({"rank": 8, "stagger": False}) == "rank=8,stagger=False"
    assert joined("rank=8") == "rank=8"
    assert joined(None) is None


@pytest.mark.parametrize("path", RECIPES, ids=[path.name for path in RECIPES])
def test_a_recipe_is_accepted(path: Any) -> None:
    recipe = yaml.safe_load(path.read_text("utf-8"))
    assert recipe["plugins"] == [PLUGIN]
    check_config(recipe, dict.fromkeys(recipe))
    assert f"axolotl/{path.name}" not in known_recipes()


def test_there_are_recipes() -> None:
    assert RECIPES
