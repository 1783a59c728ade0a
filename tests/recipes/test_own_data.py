"""What the recipes for data of one's own show is what they train on, with nothing else to do."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from hf_galore.cli.main import main
from hf_galore.recipes import any_recipe
from hf_galore.recipes.embedded_model import Embedded
from hf_galore.recipes.folders import recipes_folder
from hf_galore.recipes.run_record import RecordedTrainer
from tests.support.commands import ON_CPU, options, weights

SMALLER = {
    **ON_CPU,
    "dtype": "float32",
    "optim_args": "rank=16, update_proj_gap=2, scale=1",
    "per_device_train_batch_size": 2,
    "max_length": 64,
    "max_steps": 1,
    "save_strategy": "no",
}


def shown(recipe: str) -> list[dict[str, Any]]:
    """The lines of data that a recipe's comments show, which may be broken."""
    text = (recipes_folder() / recipe).read_text(encoding="utf-8")
    lines = re.findall(r"^#   (\{.*(?:\n#    .*)*\})$", text, flags=re.MULTILINE)
    return [json.loads(line.replace("\n#   ", "")) for line in lines]


def write(folder: Path, row: dict[str, Any], names: tuple[str, ...] = ("train",)) -> Path:
    folder.mkdir()
    for name in names:
        (folder / f"{name}.jsonl").write_text((json.dumps(row) + "\n") * 4, encoding="utf-8")
    return folder


def learnt(trainer: RecordedTrainer) -> str:
    """What of the first row is learnt."""
    batch = next(iter(trainer.get_train_dataloader()))
    labels = batch["labels"][0]
    text: str = trainer.processing_class.decode(batch["input_ids"][0][labels != -100])
    return text


def test_a_conversation_in_my_data_is_trained_on_out_of_the_box(
    small: Embedded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the folder that holds my_data, by the command that the recipe names."""
    conversation, _ = shown("own_data.yaml")
    write(tmp_path / "my_data", conversation)
    monkeypatch.chdir(tmp_path)
    given = ["--config", "own_data.yaml", *options({**SMALLER, "model_name_or_path": small.model})]
    assert main(["sft", *given]) == 0
    assert set(weights(tmp_path / "own-data")) == set(weights(small.model))
    trainer = any_recipe.parse(given, "", "").make_trainer()
    assert learnt(trainer).strip().removesuffix("<|im_end|>").strip() == "On its way."


def test_a_prompt_with_its_completion(small: Embedded, tmp_path: Path) -> None:
    _, pair = shown("own_data.yaml")
    given = {**SMALLER, "model_name_or_path": small.model, "dataset_name": write(tmp_path / "data", pair)}
    given |= {"assistant_only_loss": "false", "output_dir": tmp_path / "out"}
    trainer = any_recipe.parse(["--config", "own_data.yaml", *options(given)], "", "").make_trainer()
    assert learnt(trainer).removesuffix(trainer.processing_class.eos_token).strip() == "Bonjour."


def test_pairs(small: Embedded, tmp_path: Path) -> None:
    """The recipe for DPO, with one's own data where it has another's."""
    (pair,) = shown("dpo/qwen3_0.6b_ultrafeedback.yaml")
    data = write(tmp_path / "my_pairs", pair, ("train", "test"))
    text = (recipes_folder() / "dpo" / "qwen3_0.6b_ultrafeedback.yaml").read_text(encoding="utf-8")
    own = re.sub(r"^datasets:.*\n(?:  .*\n)+test_split_size.*\n", f"dataset_name: {data}\n", text, flags=re.MULTILINE)
    assert own != text
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(own, encoding="utf-8")
    given = {**SMALLER, "model_name_or_path": small.model, "output_dir": tmp_path / "out"}
    assert main(["dpo", "--config", str(recipe), *options(given)]) == 0
    assert set(weights(tmp_path / "out")) == set(weights(small.model))
