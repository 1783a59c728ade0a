"""What is refused of a plan for axolotl before anything is made, which needs no axolotl; the rest: `tests/beside`."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from hf_galore.errors import UserError
from hf_galore.recipes.axolotl_planning import full_rows, plan_axolotl

PLUGIN = "hf_galore.axolotl.GaLorePlugin"


def refusal(folder: Path, config: Any, **overrides: Any) -> str:
    file = folder / "config.yaml"
    file.write_text(config if isinstance(config, str) else yaml.safe_dump(config), "utf-8")
    with pytest.raises(UserError) as refused:
        plan_axolotl(file, overrides=overrides)
    return str(refused.value)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"rl": "dpo"}, "rl: dpo cannot be planned: plans are of language modelling (SFT). Leave it out"),
        ({"adapter": "lora"}, "adapter: lora cannot be planned: plans are of the training of all weights"),
        ({"torch_compile": True}, "torch_compile: True cannot be planned"),
        ({"pretraining_dataset": [{"path": "x" * 60}]}, "xxx... cannot be planned: plans are of data"),
        ({"liger_fused_linear_cross_entropy": True, "liger_rms_norm": True}, "liger_rms_norm: True cannot be planned"),
        ({"cut_cross_entropy": True}, "its kernels need a card"),
        ({"attn_implementation": "flex_attention"}, "flash_attention_2, sdpa and eager can"),
        ({"optimizer": "galore_adamw"}, "optimizer: galore_adamw without the plugin is transformers' own GaLore, of"),
        ("- a list", "is no configuration of axolotl"),
        ("a: [", "cannot be read as YAML"),
    ],
)
def test_what_cannot_be_planned_is_refused_by_name(config: Any, said: str, tmp_path: Path) -> None:
    assert said in refusal(tmp_path, config)


def test_overrides_are_refused_too(tmp_path: Path) -> None:
    assert "fsdp_config: {'x': 1} cannot be planned" in refusal(tmp_path, {"plugins": [PLUGIN]}, fsdp_config={"x": 1})


@pytest.mark.parametrize(
    ("target", "attention", "first"),
    [("cuda", "flash_attention_2", 1), ("cuda", "sdpa", 1), ("cuda", "eager", 0), ("cpu", "sdpa", 0)],
)
def test_documents_begin_where_a_mask_keeps_them_apart(target: Any, attention: str, first: int) -> None:
    config = SimpleNamespace(
        sequence_len=8,
        sample_packing=True,
        attn_implementation=attention,
        micro_batch_size=2,
        gradient_accumulation_steps=3,
        val_set_size=0.1,
        test_datasets=None,
        eval_batch_size=4,
    )
    train, evaluated = full_rows(config, target)
    assert train[0]["position_ids"] == list(range(first, first + 8))
    assert len(train[0]["input_ids"]) == 8
    assert len(train) == 2 * 3 * 2 * 3  # twice three steps
    assert evaluated is not None
    assert len(evaluated) == 2 * 4
